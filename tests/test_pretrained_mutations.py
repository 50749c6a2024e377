"""Damaged and forged files: named errors, nothing executed, little memory. The whole is a command of its own.

python -m tests.oracles.mutations --count 10000
"""

import json
import pickle
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest

from jaxdiff.errors import CheckpointError, UnsafeFileError
from jaxdiff.pretrained import files

ROOT = Path(__file__).parents[1]


def test_two_hundred_mutations():
    command = [sys.executable, "-m", "tests.oracles.mutations", "--count", "200", "--seed", "7"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    counted = {line.split()[1]: int(line.split()[0]) for line in done.stdout.splitlines()[:-2]}
    assert sum(counted.values()) == 200
    assert counted["CheckpointError"] > 100
    assert counted["UnsafeFileError"] > 5
    assert counted["DataError"] > 5  # the tokenizer's
    assert "audit events: none" in done.stdout


HEARD = """
import os, pickle, sys
from pathlib import Path
from tests.oracles import mutations
watch = mutations.Watch(Path("/nowhere"))
watch.active = True
pickle.loads(pickle.dumps(mutations.Bomb()))
open(os.devnull).close()
exec("pass")
watch.active = False
print(sorted({event.split()[0] for event in watch.events}))
"""


def test_the_watch_hears_a_pickle(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", HEARD], env={"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "PATH": "/bin:/usr/bin"},
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "a pickle was run" in done.stdout
    assert "['exec', 'open', 'os.system', 'pickle.find_class']" in done.stdout
    assert (tmp_path / "PICKLE_WAS_RUN").exists()


@pytest.mark.parametrize("protocol", range(6))
def test_no_pickle_is_read_under_any_name(tmp_path, protocol):
    content = pickle.dumps({"state_dict": [1.0, 2.0]}, protocol=protocol)
    for name in ("model.safetensors", "config.json", "model.safetensors.index.json"):
        (tmp_path / name).write_bytes(content)
    # those of protocols 0 and 1 begin as anything may, and so are only damaged
    error = UnsafeFileError if protocol > 1 else CheckpointError
    for read in (
        files.read,
        files.config,
        lambda folder: files.read(folder / "model.safetensors.index.json"),
    ):
        with pytest.raises(error):
            read(tmp_path)


def peak(call, *arguments):
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError):
            call(*arguments)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("part", ["[],", "{},", '{"a":1},', "1.5,", '"ab",', "[[[[]]]],"])
def test_json_that_would_swell_is_not_parsed(tmp_path, part):
    (tmp_path / "config.json").write_text("[" + part * (2**20 // len(part)) + "0]")
    assert peak(files.config, tmp_path) < 4 * 2**20


def test_without_that_guard_it_would_swell(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_VALUES", 2**30)
    (tmp_path / "config.json").write_text("[" + "[]," * (2**20 // 3) + "0]")
    assert peak(files.config, tmp_path) > 16 * 2**20


def test_the_index_of_a_thousand_tensors_is_no_bomb(tmp_path):
    """As long as real ones: FLUX has 780 tensors, SDXL's U-Net 1,680; without blanks, so as dense as can be."""
    shards = {f"down_blocks.{i}.conv.bias": "diffusion_pytorch_model-00001-of-00002.safetensors" for i in range(20_000)}
    text = json.dumps({"weight_map": shards}, separators=(",", ":"))
    (tmp_path / "model.safetensors.index.json").write_text(text)
    assert files.config(tmp_path, "model.safetensors.index.json")["weight_map"] == shards
