"""Checkpoints: resumed runs are the uninterrupted run, and nothing that goes wrong loses an earlier step."""

import dataclasses
import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections import namedtuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import train
from jaxdiff.errors import CheckpointError, ConfigError
from jaxdiff.train import Checkpoints
from jaxdiff.train import mesh as mesh_lib
from jaxdiff.train.checkpoint import SaveError
from tests.oracles import reliability

OPTIMIZER = train.adam(1e-2, warmup_steps=3)
EMA = {"ema_0_99": 0.99}


def init(width=4):
    return train.create_state({"w": jnp.ones((width, 4)), "b": jnp.zeros(4)}, OPTIMIZER, ema=EMA)


def loss(params, key, batch):
    noise = jax.random.normal(key, batch.shape)
    return (((batch + noise) @ params["w"] + params["b"][None]) ** 2).mean(-1), {}


def batch(n):
    """A pure function of the step."""
    return np.random.default_rng(n).normal(size=(1, 8, 4)).astype(np.float32)


@pytest.fixture(scope="module")
def step():
    return train.make_step(loss, OPTIMIZER, key=jax.random.key(0), ema=EMA)


def assert_same_bits(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """A directory with steps 1 and 2 of a small tree."""
    directory = tmp_path_factory.mktemp("pristine")
    with Checkpoints(directory) as checkpoints:
        for n in (1, 2):
            checkpoints.save({"w": jnp.full((300,), float(n))}, n, {"n": n})
    return directory


@pytest.fixture
def folder(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "steps")


TEMPLATE = {"w": jax.ShapeDtypeStruct((300,), jnp.float32)}


def test_resumed_run_is_bit_identical(step, tmp_path):
    whole, losses = init(), []
    for n in range(10):
        whole, metrics = step(whole, batch(n))
        losses.append(float(metrics["loss"][0]))
    state = init()
    for n in range(5):
        state, _ = step(state, batch(n))
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.save(state, 5, {"config": {"lr": 0.01, "dims": [1, 2]}})
        state, _ = step(state, batch(5))  # donates what is being saved
    resumed, meta = Checkpoints(tmp_path).restore(jax.eval_shape(init))
    assert meta == {"config": {"lr": 0.01, "dims": [1, 2]}}
    assert jax.tree.structure(resumed) == jax.tree.structure(whole)
    again = []
    while int(resumed.step) < 10:
        resumed, metrics = step(resumed, batch(int(resumed.step)))
        again.append(float(metrics["loss"][0]))
    assert again == losses[5:]
    assert_same_bits(whole, resumed)


def test_donating_at_once_does_not_reach_the_file(tmp_path):
    spoil = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    tree = {f"w{i}": jnp.full((500, 500), float(i)) for i in range(4)}
    expected = jax.device_get(tree)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(tree, 0)
        jax.block_until_ready(spoil(tree))
    assert_same_bits(Checkpoints(tmp_path).restore(jax.eval_shape(lambda: expected))[0], expected)


def test_state_moves_between_meshes(tmp_path):
    many, one = mesh_lib.make(2, 4), mesh_lib.make(devices=jax.devices()[:1])
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(mesh_lib.born_sharded(many, lambda: init(2048)), 1)
    for mesh in (one, many):
        state, _ = Checkpoints(tmp_path).restore(mesh_lib.template(mesh, lambda: init(2048)))
        assert state.params["w"].sharding.mesh.size == mesh.size
        assert_same_bits(state, init(2048))


def test_same_step_is_saved_once_and_only_the_newest_are_kept(tmp_path):
    tree = {"w": jnp.ones(3)}
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert [checkpoints.save(tree, n) for n in (1, 2, 3, 3)] == [True, True, True, False]
    assert Checkpoints(tmp_path).save(tree, 3) is False
    assert Checkpoints(tmp_path).steps() == [2, 3]
    assert Checkpoints(tmp_path).latest() == 3


SHAPES = {"w": jax.ShapeDtypeStruct((4, 4), jnp.float32), "b": jax.ShapeDtypeStruct((4,), jnp.float32)}
OTHERS = {
    r"w is float32\[4, 4\] there and float32\[4, 5\] here": SHAPES | {"w": jax.ShapeDtypeStruct((4, 5), jnp.float32)},
    r"w is float32\[4, 4\] there and bfloat16\[4, 4\] here": SHAPES | {"w": jax.ShapeDtypeStruct((4, 4), jnp.bfloat16)},
    r"b float32\[4\] is only there": {"w": SHAPES["w"]},
    r"c float32\[4\] is only here": SHAPES | {"c": SHAPES["b"]},
}


@pytest.mark.parametrize("message", OTHERS)
def test_another_model_is_refused_with_the_difference(tmp_path, message):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(init(), 1)
    good = jax.eval_shape(init)
    for field in ("params", "ema_params"):
        other = OTHERS[message] if field == "params" else {"ema_0_99": OTHERS[message]}
        with pytest.raises(CheckpointError, match=f"{tmp_path / '1'} is of another model: {field}/.*{message}"):
            Checkpoints(tmp_path).restore(dataclasses.replace(good, **{field: other}))
    assert_same_bits(Checkpoints(tmp_path).restore(good)[0], init())


@pytest.mark.parametrize(("there", "here"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_floats_are_cast_only_on_request(tmp_path, there, here):
    values = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    tree = {"w": jnp.asarray(values).astype(there), "n": jnp.int32(7)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(tree, 1)
    template = {"w": jax.ShapeDtypeStruct((1000,), here), "n": jax.ShapeDtypeStruct((), jnp.int32)}
    message = rf"w is {there}\[1000\] there and {here}\[1000\] here. To have its numbers converted, pass cast=True"
    with pytest.raises(CheckpointError, match=message):
        checkpoints.restore(template)
    cast, _ = checkpoints.restore(template, cast=True)
    assert (cast["w"].dtype, int(cast["n"])) == (here, 7)
    rounded = values.astype(jnp.bfloat16)  # by ml_dtypes, to the nearest
    np.testing.assert_array_equal(np.asarray(cast["w"], np.float32), rounded.astype(np.float32))
    for other in ({"w": jax.ShapeDtypeStruct((999,), here)}, {"n": jax.ShapeDtypeStruct((), jnp.float32)}):
        with pytest.raises(CheckpointError, match=r"is of another model.*Restore it with the configuration"):
            checkpoints.restore(template | other, cast=True)


def test_long_difference_is_cut(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save({str(i): jnp.ones(1) for i in range(9)}, 1)
    with pytest.raises(CheckpointError, match="and 5 more"):
        Checkpoints(tmp_path).restore({"w": jnp.ones(1)})


def test_nothing_there_is_said_and_reading_writes_nothing(tmp_path):
    missing = Checkpoints(tmp_path / "none")
    assert missing.latest() is None
    for read in (lambda: missing.restore(TEMPLATE), missing.meta):
        with pytest.raises(CheckpointError, match=r"no checkpoint of jaxdiff in .*none. Train first"):
            read()
    missing.close()
    assert not (tmp_path / "none").exists()


def test_step_that_is_not_there_is_said(folder):
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 7 .* there are \[1, 2\]"):
        Checkpoints(folder).restore(TEMPLATE, 7)


def truncate_arrays(path):
    for file in (path / "state").rglob("d/*"):
        os.truncate(file, file.stat().st_size // 2)


DAMAGES = {
    "arrays": truncate_arrays,
    "metadata": lambda path: (path / "_CHECKPOINT_METADATA").unlink(),
    "half metadata": lambda path: os.truncate(path / "_CHECKPOINT_METADATA", 50),
    "manifest": lambda path: (path / "state" / "manifest.ocdbt").unlink(),
    "tree": lambda path: (path / "state" / "_METADATA").unlink(),
    "state": lambda path: shutil.rmtree(path / "state"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_newest_step_is_named_and_the_one_before_is_used(folder, damage):
    DAMAGES[damage](folder / "2")
    checkpoints = Checkpoints(folder, keep=2)
    with pytest.raises(CheckpointError, match=f"{folder / '2'} is damaged"):
        Checkpoints(folder).restore(TEMPLATE, 2)
    with pytest.warns(UserWarning, match=r"is damaged.*Falling back to step 1"):
        tree, meta = checkpoints.restore(TEMPLATE)
    assert meta == {"n": 1}
    np.testing.assert_array_equal(tree["w"], np.ones(300))
    with checkpoints:
        assert checkpoints.save({"w": jnp.full((300,), 9.0)}, 2, {"n": 9})
    assert (folder / "2.damaged").is_dir()
    assert Checkpoints(folder).restore(TEMPLATE)[1] == {"n": 9}


def test_when_all_are_damaged_it_is_an_error(folder):
    for n in "12":
        truncate_arrays(folder / n)
    with pytest.warns(UserWarning, match="Falling back"), pytest.raises(CheckpointError, match="1 is damaged"):
        Checkpoints(folder).restore(TEMPLATE)


def test_half_written_and_unnumbered_folders_are_ignored_and_the_former_cleaned(folder):
    (folder / "3.orbax-checkpoint-tmp" / "state.orbax-checkpoint-tmp").mkdir(parents=True)
    (folder / "notes").mkdir()
    assert Checkpoints(folder).latest() == 2
    with Checkpoints(folder) as checkpoints:
        checkpoints.save({"w": jnp.ones(300)}, 3)
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2", "3", "notes"]


def test_foreign_numbered_folder_is_refused_and_not_deleted(tmp_path):
    (tmp_path / "2024").mkdir()
    (tmp_path / "2024" / "photo").write_text("mine")
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.latest() is None
    for write in (checkpoints.prepare, lambda: checkpoints.save({"w": jnp.ones(3)}, 1)):
        with pytest.raises(CheckpointError, match=r"2024 is not a checkpoint of jaxdiff.*Move it away"):
            write()
    assert (tmp_path / "2024" / "photo").read_text() == "mine"


@pytest.mark.parametrize("write", [lambda c: c.prepare(), lambda c: c.save({"w": jnp.ones(3)}, 1)])
def test_directory_that_cannot_be_made_is_said(tmp_path, write):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot write a checkpoint in .*file/here.*choose another directory"):
        write(Checkpoints(tmp_path / "file" / "here"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_directory_is_said(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(CheckpointError, match="make it writable"):
        Checkpoints(tmp_path).prepare()


def test_full_disk_is_said_before_writing(folder, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("U", "total used free")(10**9, 10**9, 100))
    with pytest.raises(CheckpointError, match=r"state takes 4 MB and the disk has 0 MB left.*Free some"):
        Checkpoints(folder).save({"w": jnp.ones(10**6)}, 3)
    assert Checkpoints(folder).steps() == [1, 2]


def test_meta_and_names_that_cannot_be_saved_are_named(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(CheckpointError, match="meta must be what JSON can hold"):
        checkpoints.save({"w": jnp.ones(3)}, 1, {"f": object()})
    with pytest.raises(CheckpointError, match=r"leaf 'a\.b'"):
        checkpoints.save({"a.b": jnp.ones(3)}, 1)
    with pytest.raises(ConfigError, match="keep must be an integer >= 2, got 1"):
        Checkpoints(tmp_path, keep=1)
    assert list(tmp_path.iterdir()) == []


def save_and_wait(checkpoints, n):
    checkpoints.save({"w": jnp.full((300,), float(n))}, n, {"n": n})
    checkpoints.wait()


def assert_only_that_save_is_lost(checkpoints, failed):
    """Of the steps 1, 2 and 3, two kept, the third could not be saved, or the first could not be deleted."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is damaged
        for n in checkpoints.steps()[-2:]:
            np.testing.assert_array_equal(checkpoints.restore(TEMPLATE, n)[0]["w"], np.full(300, n, np.float32))
    assert checkpoints.steps()[-2:] == ([1, 2] if failed else [2, 3])
    save_and_wait(checkpoints, 4)
    assert sorted(path.name for path in checkpoints.directory.iterdir()) == (["2", "4"] if failed else ["3", "4"])


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_refuses_at_any_point_of_a_save_costs_that_save_at_most(folder, tmp_path, monkeypatch, number):
    """From one of ten of its 40 operations on, until the save has failed."""
    failed = 0
    for first in range(1, 41, 4):
        checkpoints = Checkpoints(shutil.copytree(folder, tmp_path / str(first) / "checkpoints"), keep=2)
        checkpoints.prepare()
        with monkeypatch.context() as patch:
            reliability.refuse(number, first, 10**6, patch.setattr)
            with pytest.raises(SaveError, match=os.strerror(number)):
                save_and_wait(checkpoints, 3)
        for thread in threading.enumerate():
            if thread.name.endswith("_handler"):  # of Orbax, which must not wait for what will never come
                thread.join(9)
                assert not thread.is_alive()
        failed += 3 not in checkpoints.steps()
        assert_only_that_save_is_lost(checkpoints, 3 not in checkpoints.steps())
    assert 5 <= failed <= 9  # and in the others it was a deletion that failed


def test_a_disk_that_is_really_full_costs_that_save_at_most(folder, tmp_path):
    """With room for 0, 1, ... 9 of the twelve pages of a step."""
    (tmp_path / "disk").mkdir()
    try:
        with reliability.disk(tmp_path / "disk") as disk:
            for pages in range(10):
                checkpoints, ballast = Checkpoints(shutil.copytree(folder, disk / str(pages)), keep=2), disk / "ballast"
                ballast.write_bytes(bytes(shutil.disk_usage(disk).free - 4096 * pages))
                with pytest.raises(SaveError, match=r"No space left|the disk has 0 MB left"):
                    save_and_wait(checkpoints, 3)
                ballast.unlink()
                assert_only_that_save_is_lost(checkpoints, failed=True)
    except PermissionError as error:
        pytest.skip(str(error))


LIMITED = """
import resource, signal, sys
import jax, jax.numpy as jnp
from jaxdiff.errors import CheckpointError
from jaxdiff.train import Checkpoints

checkpoints = Checkpoints(sys.argv[1], keep=2)
tree = lambda n: {"w": jax.random.normal(jax.random.key(n), (300, 300))}
checkpoints.save(tree(1), 1)
checkpoints.wait()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
try:
    checkpoints.save(tree(2), 2)
    checkpoints.wait()
except CheckpointError as error:
    print("REFUSED", error)
assert checkpoints.steps() == [1]
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
checkpoints.save(tree(2), 2)
checkpoints.close()
print("STEPS", checkpoints.steps())
"""


def test_write_that_fails_in_the_background_is_said_and_costs_nothing(tmp_path):
    """A limit on the size of files stands in for a disk that fills up during the save."""
    done = subprocess.run([sys.executable, "-c", LIMITED, tmp_path], capture_output=True, text=True, check=True)
    assert f"REFUSED cannot write a checkpoint in {tmp_path}" in done.stdout
    assert "STEPS [1, 2]" in done.stdout


ENDLESS = """
import sys
import jax.numpy as jnp
from jaxdiff.train import Checkpoints

with Checkpoints(sys.argv[1], keep=2) as checkpoints:
    for n in range(1, 10**6):
        checkpoints.save({"w": jnp.full((300, 1000), float(n))}, n)
        print(n, flush=True)
"""


def test_kill_while_saving_never_loses_the_earlier_step(tmp_path):
    template = {"w": jax.ShapeDtypeStruct((300, 1000), jnp.float32)}
    with subprocess.Popen([sys.executable, "-c", ENDLESS, tmp_path], stdout=-1, text=True) as child:
        while int(child.stdout.readline()) < 4:  # step n is reported when n - 1 is committed
            pass
        time.sleep(0.01)
        child.send_signal(signal.SIGKILL)
    latest = Checkpoints(tmp_path).latest()
    assert latest is not None
    assert latest >= 3
    tree, _ = Checkpoints(tmp_path).restore(template)
    np.testing.assert_array_equal(tree["w"], np.full((300, 1000), latest, np.float32))
