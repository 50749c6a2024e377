"""A run goes on when a save, a line or a picture cannot be written; only the end must be there."""

import errno
import json

import jax
import jax.numpy as jnp
import pytest

from experiments import train as job
from experiments import workdir
from experiments.saving import Saver, tolerated
from jaxdiff.errors import CheckpointError
from jaxdiff.train import Checkpoints, mesh, seal
from jaxdiff.train.checkpoint import SaveError
from tests.oracles import reliability

TREE = {"w": jnp.ones(3)}


def refusing(steps):
    """seal.write on a disk that is full at these steps."""
    write = seal.write

    def refuse(folder, step, **options):
        if step in steps:
            raise OSError(errno.ENOSPC, "No space left on device", str(folder))
        write(folder, step, **options)

    return refuse


def test_a_failed_save_is_a_warning_that_says_what_is_at_risk(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(seal, "write", refusing([20, 30]))
    with Checkpoints(tmp_path) as checkpoints:
        saver = Saver(checkpoints, {}, 0)
        for step in (10, 20, 30, 40):
            saver.save(TREE, step)
        saver.wait(45)
        assert checkpoints.steps() == [10, 40]
    said = capsys.readouterr().out.splitlines()
    assert [line.split("since ")[1] for line in said if "since" in line] == [
        "step 10: 20 step(s), 0.0 minutes.", "step 10: 30 step(s), 0.0 minutes.",
    ]  # fmt: skip
    assert sum(line.startswith("warning: cannot write a checkpoint in") for line in said) == 2


def test_a_disk_that_is_full_before_the_save_is_a_warning_but_at_the_end(tmp_path, monkeypatch, capsys):
    with Checkpoints(tmp_path) as checkpoints:
        saver = Saver(checkpoints, {}, 0)
        with monkeypatch.context() as patch:
            patch.setattr(
                job.checkpoint.shutil, "disk_usage", lambda path: reliability.shutil._ntuple_diskusage(1, 1, 0)
            )
            saver.save(TREE, 10)
            assert "since step 0: 10 step(s)" in capsys.readouterr().out
            with pytest.raises(SaveError, match="the disk has 0 MB left"):
                saver.save(TREE, 20, last=True)
        saver.save(TREE, 30, last=True)
    assert Checkpoints(tmp_path).steps() == [30]


def test_what_no_disk_could_take_is_an_error_at_once(tmp_path):
    with pytest.raises(CheckpointError, match="Rename it"):
        Saver(Checkpoints(tmp_path), {}, 0).save({"a.b": jnp.ones(3)}, 10)


def test_only_what_the_disk_did_is_tolerated(capsys):
    with tolerated("a picture"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert capsys.readouterr().out == "warning: a picture could not be written: [Errno 28] No space left on device\n"
    with pytest.raises(ZeroDivisionError), tolerated("a picture"):
        1 / 0  # noqa: B018


class Disk:
    """A file on a disk that takes `room` bytes."""

    def __init__(self, file):
        self.file, self.room = file, 30

    def write(self, data):
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = min(self.room, len(data))
        self.room -= taken
        return self.file.write(data[:taken])

    def close(self):
        self.file.close()


def test_lines_that_a_full_disk_does_not_take_come_later(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(workdir, "_tensorboard", lambda path, step: None)
    with workdir.Log(tmp_path, 0) as log:
        log.files["metrics"] = disk = Disk(log.files["metrics"])
        for step in range(5):
            log.write("metrics", step, {"loss": 0.1})
        disk.room = 200
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(5))
    assert capsys.readouterr().out.count("metrics.jsonl could not be written") == 4


def test_a_run_without_its_last_checkpoint_is_an_error_and_ends_well_when_there_is_room(tmp_path, monkeypatch, capsys):
    command = [*reliability.TOY, "--config.train.steps=9", f"--workdir={tmp_path / 'run'}"]
    monkeypatch.setattr(job, "save_grid", lambda *arguments: None)
    monkeypatch.setattr(job.check, "mesh", lambda config: mesh.make(devices=jax.devices()[:1]))
    with monkeypatch.context() as patch:
        patch.setattr(seal, "write", refusing([6, 9]))
        with pytest.raises(SaveError, match="No space left"):
            job.run(command)
    assert "since step 3: 6 step(s)" in capsys.readouterr().out
    assert job.run(command) == 0
    assert "resuming from step 3 of 9" in capsys.readouterr().out
