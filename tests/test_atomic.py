"""A file appears whole or not at all, with the permissions of any new file, and nothing is left beside it."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxdiff.atomic import replacing

KILLED = """
import os, pathlib, signal, sys
from jaxdiff.atomic import replacing
with replacing(sys.argv[1]) as temporary:
    temporary.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_new_file_takes_the_place_of_the_old_one(tmp_path):
    path = tmp_path / "a.json"
    for text in ("one", "two"):
        with replacing(path) as temporary:
            temporary.write_text(text)
            assert not path.exists() or path.read_text() == "one"
        assert path.read_text() == text
    assert list(tmp_path.iterdir()) == [path]


def test_what_was_there_stays_where_the_block_raises_or_is_killed(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")

    def fail():
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        fail()
    assert [path.read_text(), list(tmp_path.iterdir())] == ["old", [path]]
    status = subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False).returncode
    assert [status, path.read_text()] == [-signal.SIGKILL, "old"]


def test_permissions_are_those_of_any_new_file(tmp_path):
    before = os.umask(0o027)
    try:
        with replacing(tmp_path / "a.safetensors") as temporary:
            save_file({"x": np.zeros(2)}, temporary)  # which makes it private
    finally:
        os.umask(before)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o640
