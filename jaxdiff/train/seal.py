"""The seal of a folder: the size and the sha256 of every file in it, written last, by which any later change is seen.

    seal.json = {"body": {"format", "step", "finite", "config": sha256, "files": {name: [bytes, sha256]}},
                 "sha256": that of the body}

`config` is the sha256 of what the caller handed over beside the arrays, taken in memory, before any of it was written:
what is read back must have the same. The text of the seal is a function of its content, so that a change of the seal
itself is seen too, by one byte.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from jaxdiff.errors import CheckpointError

NAME = "seal.json"
FORMAT = 3  # 1 had no seal, 2 no config
_SHOWN = 3


class DamagedError(CheckpointError):
    """This folder is not what was saved; another one may be."""


def write(folder: Path, step: int, *, finite: bool, config: str) -> None:
    """Seal `folder`: every file, the folders and the seal are on the disk when this returns, in this order.

    `finite` says whether every number saved is, `config` is the `digest` of what was saved beside them. Raises OSError
    where the disk does not take it.
    """
    files = {name: _measure(folder / name, sync=True) for name in _names(folder)}
    for path, _, _ in os.walk(folder):
        sync(Path(path))
    temporary = folder / f"{NAME}.tmp"
    with temporary.open("w", encoding="utf-8") as file:
        file.write(_text({"format": FORMAT, "step": step, "finite": finite, "config": config, "files": files}))
        file.flush()
        os.fsync(file.fileno())
    os.rename(temporary, folder / NAME)
    sync(folder)


def check(folder: Path, step: int) -> tuple[bool, str | None]:
    """Read all of `folder` and compare it with its seal; returns its `finite` and its `config` (None in format 2).

    Raises DamagedError naming the files that differ, CheckpointError where a newer jaxdiff wrote it.
    """
    body = _read(folder)
    if body["format"] > FORMAT:
        raise CheckpointError(
            f"{folder} has the format {body['format']}, and this version of jaxdiff reads up to {FORMAT}. "
            "Install the version that wrote it."
        )
    if body["step"] != step:
        raise DamagedError(f"{folder} is damaged: it was sealed as step {body['step']}.")
    names = _names(folder)
    bad = [f"{name} is missing" for name in body["files"] if name not in names]
    bad += [f"{name} does not belong there" for name in names if name not in body["files"]]
    for name in [name for name in names if name in body["files"]]:
        bad += _difference(name, _measure(folder / name), body["files"][name])
    if bad:
        more = f"; and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
        raise DamagedError(f"{folder} is damaged: {'; '.join(bad[:_SHOWN])}{more}.")
    return body["finite"], body.get("config")


def digest(value: Any) -> str:
    """sha256 of `value` as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def sync(folder: Path) -> None:
    """What was made, renamed or removed in `folder` is on the disk when this returns."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _names(folder: Path) -> list[str]:
    """Every file of `folder`, and what else is no folder, but the seal."""
    paths = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return sorted(name for path in paths if (name := path.relative_to(folder).as_posix()) != NAME)


def _measure(path: Path, *, sync: bool = False) -> list[Any]:
    """[bytes, sha256] of a file."""
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
            if sync:
                os.fsync(file.fileno())
            return [os.fstat(file.fileno()).st_size, found]
    except OSError as error:
        if sync:
            raise
        raise DamagedError(f"{path} cannot be read ({error.strerror}).") from error


def _difference(name: str, found: list[Any], sealed: list[Any]) -> list[str]:
    if found[0] != sealed[0]:
        return [f"{name} has {found[0]} bytes and was sealed with {sealed[0]}"]
    return [] if found == sealed else [f"{name} is not what was sealed"]


def _text(body: dict[str, Any]) -> str:
    return json.dumps({"body": body, "sha256": digest(body)}, sort_keys=True, indent=1)


def _read(folder: Path) -> dict[str, Any]:
    try:
        text = (folder / NAME).read_bytes().decode()
        body = json.loads(text)["body"]
        if _text(body) == text:
            return body
        cause = "its text is not its own"
    except FileNotFoundError:
        raise DamagedError(f"{folder} is damaged: it has no {NAME}.") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        cause = f"{type(error).__name__}: {error}"
    raise DamagedError(f"{folder} is damaged: its {NAME} has been changed ({cause}).")
