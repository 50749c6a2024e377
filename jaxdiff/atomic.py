"""A file that appears whole or not at all: it is written beside its place, and then takes it."""

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """`with replacing(path) as temporary:` write the file `temporary`, which then takes the place of `path`.

    What was there stays where the block raises, or the process is killed. The file has the permissions of any new one,
    whoever writes it. Raises OSError as the file system does.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors makes its files private
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
