"""The seal: every damage to a step is seen, and a kill at any instant of a save leaves sound steps to go on from."""

import hashlib
import json
import os
import shutil
import threading
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import train
from jaxdiff.errors import CheckpointError
from jaxdiff.train import Checkpoints, seal
from tests.oracles import damage, reliability

TEMPLATE = {"w": jax.ShapeDtypeStruct((300,), jnp.float32)}
NORMAL = np.random.default_rng(0).normal(size=300).astype(np.float32)
FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """A directory with steps 1 and 2 of a small tree."""
    directory = tmp_path_factory.mktemp("pristine")
    with Checkpoints(directory) as checkpoints:
        for n in (1, 2):
            checkpoints.save({"w": n * NORMAL}, n, {"n": n})
    return directory


@pytest.fixture
def folder(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "steps")


def unseen(pristine, directory):
    """The damages to step 2 that its seal does not show; each is done to a fresh copy of the step."""
    missed, count = [], 0
    for one in damage.damages(pristine / "2", np.random.default_rng(0)):
        step = shutil.copytree(pristine / "2", directory / "2")
        one.apply(step)
        count += 1
        try:
            seal.check(step, 2)
            missed.append(one.name)
        except CheckpointError:
            pass
        shutil.rmtree(step)
    return missed, count


def test_every_damage_to_every_file_is_seen(pristine, tmp_path):
    missed, count = unseen(pristine, tmp_path)
    assert missed == []
    assert count > 150


def test_without_the_comparison_of_contents_that_test_is_red(pristine, tmp_path, monkeypatch):
    monkeypatch.setattr(seal, "_difference", lambda name, found, sealed: [])
    missed, _ = unseen(pristine, tmp_path)
    assert sum(name.startswith("bit") for name in missed) > 40


def test_orbax_alone_restores_a_flipped_bit_as_if_it_were_fine(folder, monkeypatch):
    monkeypatch.setattr(seal, "check", lambda folder, step: (True, None))
    array = max((folder / "2" / "state").rglob("d/*"), key=lambda path: path.stat().st_size)
    accepted = 0
    for position in range(0, array.stat().st_size, 7):
        damage.flip(array, position, 3)
        try:
            Checkpoints(folder).restore(TEMPLATE, 2)
            accepted += 1
        except CheckpointError:
            pass
        damage.flip(array, position, 3)
    assert accepted > 0


def test_the_files_that_differ_are_named_and_what_is_redone(folder):
    (folder / "2" / "notes.txt").write_text("mine")
    with pytest.warns(UserWarning, match=r"2 is damaged: notes.txt does not belong there\. Falling back to step 1: "):
        tree, _ = Checkpoints(folder).restore(TEMPLATE)
    np.testing.assert_array_equal(tree["w"], NORMAL)


def test_a_step_whose_name_for_its_leaves_is_damaged_is_not_taken_for_a_foreign_one(folder):
    """One bit makes of "leaves" another word: the step must be named as damaged, not left out without a word."""
    record = folder / "2" / "_CHECKPOINT_METADATA"
    damage.flip(record, record.read_bytes().index(b'"leaves"') + 1, 0)
    assert Checkpoints(folder).steps() == [1, 2]
    with pytest.warns(UserWarning, match="_CHECKPOINT_METADATA is not what was sealed"):
        Checkpoints(folder).restore(TEMPLATE)
    Checkpoints(folder).prepare()


def test_two_steps_that_changed_places_are_seen(folder):
    damage.swap(folder / "1", folder / "2")
    with pytest.warns(UserWarning, match="sealed as step 1"), pytest.raises(CheckpointError, match="sealed as step 2"):
        Checkpoints(folder).restore(TEMPLATE)


def test_a_newer_format_is_refused_and_not_passed_over(folder):
    text = json.loads((folder / "2" / seal.NAME).read_text())
    (folder / "2" / seal.NAME).write_text(seal._text(text["body"] | {"format": seal.FORMAT + 1}))
    with pytest.raises(CheckpointError, match=f"has the format {seal.FORMAT + 1}, and .* up to {seal.FORMAT}"):
        Checkpoints(folder).restore(TEMPLATE)


def test_the_seal_says_what_of_which_config_and_in_which_format(folder):
    body = json.loads((folder / "2" / seal.NAME).read_text())["body"]
    assert (body["format"], body["step"], body["finite"]) == (seal.FORMAT, 2, True)
    assert body["config"] == hashlib.sha256(b'{"n": 2}').hexdigest()
    assert set(body["files"]) == {str(p.relative_to(folder / "2")) for p in damage.files(folder / "2")} - {seal.NAME}


def test_a_config_that_is_not_the_one_handed_over_is_refused(folder):
    """Were the config lost on its way to the file, the digests of the files would not show it."""
    record = folder / "2" / "_CHECKPOINT_METADATA"
    record.write_text(record.read_text().replace('"n": 2', '"n": 3'))
    (folder / "2" / seal.NAME).unlink()
    seal.write(folder / "2", 2, finite=True, config=seal.digest({"n": 3}))
    assert Checkpoints(folder).restore(TEMPLATE)[1] == {"n": 3}
    (folder / "2" / seal.NAME).unlink()
    seal.write(folder / "2", 2, finite=True, config=seal.digest({"n": 2}))
    with pytest.warns(UserWarning, match="2 is damaged: the config in it is not the one that was sealed. Falling back"):
        assert Checkpoints(folder).restore(TEMPLATE)[1] == {"n": 1}


def test_numbers_that_are_not_finite_are_passed_over_unless_asked_for(folder):
    with Checkpoints(folder) as checkpoints:
        checkpoints.save({"w": jnp.full((300,), jnp.nan)}, 3)
    with pytest.warns(UserWarning, match="3 holds numbers that are not finite. Falling back to step 2"):
        meta = Checkpoints(folder).restore(TEMPLATE)[1]
    assert meta == {"n": 2}
    assert np.isnan(Checkpoints(folder).restore(TEMPLATE, 3)[0]["w"]).all()


def test_the_last_two_sound_steps_outlive_any_number_of_others(folder):
    """Newer ones that are not finite do not count; a damaged one does not either."""
    with Checkpoints(folder, keep=2) as checkpoints:
        for n in (3, 4, 5):
            checkpoints.save({"w": jnp.full((300,), jnp.inf)}, n)
    assert Checkpoints(folder).steps() == [1, 2, 3, 4, 5]
    damage.flip(max(damage.files(folder / "2"), key=os.path.getsize), 9, 0)
    with Checkpoints(folder, keep=2) as checkpoints:
        checkpoints.save({"w": jnp.ones(300)}, 6)
        checkpoints.wait()
        assert checkpoints.steps() == [1, 2, 3, 4, 5, 6]
        checkpoints.save({"w": jnp.ones(300)}, 7)
    assert Checkpoints(folder).steps() == [6, 7]


def test_the_newest_multiple_outlives_any_number_of_others(tmp_path):
    with Checkpoints(tmp_path, keep=2, every=4) as checkpoints:
        for n in (3, 4, 5, 6, 7):
            checkpoints.save({"w": n * NORMAL}, n)
        checkpoints.wait()
        assert checkpoints.steps() == [4, 6, 7]
        checkpoints.save({"w": NORMAL}, 8)
    assert Checkpoints(tmp_path).steps() == [7, 8]
    np.testing.assert_array_equal(Checkpoints(tmp_path).restore(TEMPLATE, among=[7, 3])[0]["w"], 7 * NORMAL)
    with pytest.raises(CheckpointError, match=r"none of the steps \[4\] is in .* Give one of \[7, 8\]"):
        Checkpoints(tmp_path).restore(TEMPLATE, among=[4])


def test_what_a_kill_leaves_is_cleared_at_the_start_and_nothing_else(folder):
    for name in ("3.saving", "3.saving.orbax-checkpoint-tmp", "1.deleting", "4.orbax-checkpoint-tmp-9"):
        shutil.copytree(folder / "2", folder / name)
    for name in ("notes", "5.damaged", "old.saving"):
        (folder / name).mkdir()
    Checkpoints(folder).prepare()
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2", "5.damaged", "notes", "old.saving"]


@pytest.mark.parametrize("number", range(1, seal.FORMAT + 1))
def test_every_format_there_was_stays_readable(number, tmp_path):
    folder = shutil.copytree(FIXTURES / f"checkpoint_format_{number}", tmp_path / "steps")
    template = {"w": jax.ShapeDtypeStruct((2, 3), jnp.float32), "n": jax.ShapeDtypeStruct((), jnp.int32)}
    with warnings.catch_warnings(record=True) as said:
        tree, meta = Checkpoints(folder).restore(template)
    assert [str(w.message) for w in said if "without a seal" in str(w.message)] == (
        [f"{folder / '7'} is of an earlier version, without a seal: damage would not be seen."] * (number == 1)
    )
    np.testing.assert_array_equal(tree["w"], np.arange(6.0).reshape(2, 3))
    assert (int(tree["n"]), meta) == (7, {"made": f"format {number}"})


OPTIMIZER = train.adam(1e-2)


def init():
    return train.create_state({"w": jnp.ones((4, 4))}, OPTIMIZER, ema={"slow": 0.9})


def loss(params, key, batch):
    return (((batch + jax.random.normal(key, batch.shape)) @ params["w"]) ** 2).mean(-1), {}


class Instants:
    """Copies a directory at every event of the file system: what a kill at that instant would leave."""

    def __init__(self, directory, copies):
        self.directory, self.copies = directory, copies
        self.lock, self.copying, self.names = threading.RLock(), False, []

    def __call__(self, event):
        with self.lock:
            if not self.copying:
                self.copying = True
                shutil.copytree(self.directory, self.copies / str(len(self.names)))
                self.names.append(" ".join(event.split(" ")[:2]))
                self.copying = False


def test_a_kill_at_any_instant_of_a_save_resumes_bit_for_bit(tmp_path, monkeypatch):
    """Steps 1, 2 and 3 are saved and two kept: whatever instant of the last save is copied, the run ends the same."""
    step = train.make_step(loss, OPTIMIZER, key=jax.random.key(0), ema={"slow": 0.9})
    batches = np.random.default_rng(0).normal(size=(5, 1, 8, 4)).astype(np.float32)
    state, directory = init(), tmp_path / "steps"
    with Checkpoints(directory, keep=2) as checkpoints:
        for n in range(5):
            state, _ = step(state, batches[n])
            if n < 2:
                checkpoints.save(state, n + 1)
            if n == 2:
                checkpoints.wait()
                with monkeypatch.context() as patch:
                    instants = Instants(directory, tmp_path)
                    reliability.watch(instants, patch.setattr)
                    checkpoints.save(state, 3)
                    checkpoints.wait()
    seen = set()
    for i, name in enumerate(instants.names):
        copy = Checkpoints(tmp_path / str(i), keep=2)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a kill damages nothing
            resumed, _ = copy.restore(jax.eval_shape(init))
        seen.add((name, copy.latest(), len(copy.steps())))
        while int(resumed.step) < 5:
            resumed, _ = step(resumed, batches[int(resumed.step)])
        jax.tree.map(np.testing.assert_array_equal, resumed, state)
        copy.prepare()
        assert all(path.name.isdecimal() for path in copy.directory.iterdir())
    assert {count for _, _, count in seen} == {2, 3}
    assert {("before fsync", 2, 2), ("before rename", 2, 2), ("after rename", 3, 3), ("before unlink", 3, 2)} <= seen
    assert len(instants.names) >= 70


def test_what_is_as_it_was_sealed_is_not_called_damaged(folder, monkeypatch):
    # A device without memory is no reason to go back to an older step.
    from orbax.checkpoint import v1 as ocp

    def full(*arguments):
        raise RuntimeError("RESOURCE_EXHAUSTED")

    monkeypatch.setattr(ocp, "load", full)
    with Checkpoints(folder) as checkpoints, warnings.catch_warnings():
        warnings.simplefilter("error")  # a fallback warns
        with pytest.raises(CheckpointError, match=r"2 is what was sealed, and yet .*RESOURCE_EXHAUSTED") as caught:
            checkpoints.restore(TEMPLATE)
    assert not isinstance(caught.value, seal.DamagedError)
