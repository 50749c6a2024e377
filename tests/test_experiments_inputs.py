"""From configs to examples: files of many kinds, and pictures streamed from disk exactly as if they were in memory."""

import gzip
import itertools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from experiments import cli, inputs, sample, trained
from experiments import export as exporting
from experiments import train as job
from jaxdiff import data
from jaxdiff.errors import ConfigError, DataError

RNG = np.random.default_rng(0)
PICTURES = RNG.integers(0, 256, (7, 8, 8, 3), dtype=np.uint8)
CONFIG = """
from ml_collections import ConfigDict
from experiments.configs import folder

def get_config():
    c = folder.get_config()
    c.net = ConfigDict({"name": "dit", "patch_size": 4, "width": 8, "depth": 1, "heads": 1})
    c.condition, c.data.size = "label", 8
    c.train.batch_size, c.train.steps, c.train.steps_per_call = 8, 3, 3
    c.sample.num = c.sample.steps = 1
    return c
"""


@pytest.fixture
def folder(tmp_path):
    for i, picture in enumerate(PICTURES):
        path = tmp_path / "pictures" / ("ant" if i < 3 else "bee") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path)
    return tmp_path / "pictures"


@pytest.fixture
def tiny(folder, tmp_path):
    """The command line of a very small training on the folder."""
    (tmp_path / "tiny.py").write_text(CONFIG)
    return [f"--config={tmp_path / 'tiny.py'}", f"--config.data.path={folder}"]


def config_of(name, path, **settings):
    config = cli.load_config(name)
    config.data.path = str(path)
    for key, value in settings.items():
        config.data[key] = value
    return config


def write_idx(folder, count=5, size=28):
    folder.mkdir()
    sizes = b"".join(n.to_bytes(4, "big") for n in (count, size, size))
    images = b"\0\0\x08\x03" + sizes + bytes(count * size * size)
    (folder / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
    labels = b"\0\0\x08\x01" + count.to_bytes(4, "big") + bytes(range(count))
    (folder / "train-labels-idx1-ubyte").write_bytes(labels)


def test_mnist_is_read_from_its_own_files(tmp_path):
    write_idx(tmp_path / "fashion")
    dataset = inputs.load(config_of("mnist", tmp_path / "fashion"))
    assert dataset.shape == (28, 28, 1)
    assert dataset.labels.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("name", ["folder", "mnist"])
def test_array_files_are_read_by_any_config(tmp_path, name):
    np.savez(tmp_path / "a.npz", images=PICTURES, labels=np.arange(7))
    np.testing.assert_array_equal(inputs.load(config_of(name, tmp_path / "a.npz", size=8)).images, PICTURES)
    np.save(tmp_path / "wide.npy", PICTURES[:, :4])
    with pytest.raises(DataError, match="squares"):
        inputs.load(config_of("folder", tmp_path / "wide.npy", size=4))


def test_a_path_that_would_not_be_read_is_refused(folder):
    with pytest.raises(ConfigError, match="--config=folder"):
        inputs.load(config_of("emoji", folder))


def test_streamed_batches_are_those_in_memory(folder):
    pytest.importorskip("grain", reason="needs jaxdiff[grain]")
    memory, disk = (inputs.load(config_of("folder", folder, size=8, memory_gb=gb)) for gb in (1.0, 0.0))
    assert isinstance(memory, data.Dataset)
    assert isinstance(disk, data.ImageFolder)
    assert inputs.describe(memory) == inputs.describe(disk)
    rows = [inputs.arrays(dataset, "label", None, 0) for dataset in (memory, disk)]
    assert set(rows[1]) == {"label"}
    feeds = [inputs.batches(d, seed=3, step=4, batch_size=5, steps=2) for d in (memory, disk)]
    for one, other in itertools.islice(zip(*feeds, strict=True), 3):
        for i in range(2):
            first, second = (
                inputs.take(row, {name: value[i] for name, value in batch.items()})
                for row, batch in zip(rows, (one, other), strict=True)
            )
            assert set(first) == set(second) == {"image", "label"}
            jax.tree.map(np.testing.assert_array_equal, first, second)


def test_streaming_trains_the_same_parameters(tiny, tmp_path):
    pytest.importorskip("grain", reason="needs jaxdiff[grain]")
    for name, gigabytes in (("memory", 1.0), ("disk", 0.0)):
        assert job.run([*tiny, f"--config.data.memory_gb={gigabytes}", f"--workdir={tmp_path / name}"]) == 0
    memory, disk = trained.load(tmp_path / "memory"), trained.load(tmp_path / "disk")
    assert memory.step == disk.step == 3
    jax.tree.map(np.testing.assert_array_equal, memory.params, disk.params)


def test_classes_are_drawn_and_exported(tiny, tmp_path, monkeypatch):
    run = tmp_path / "run"
    assert job.run([*tiny, f"--workdir={run}"]) == 0
    out, each = tmp_path / "a.png", tmp_path / "each"
    argv = ["--label", "1", "0", "--num=2", "--scale=2", f"--out={out}", f"--each={each}"]
    assert sample.run([f"--workdir={run}", *argv]) == 0
    assert json.loads(data.read_metadata(out)["prompts"]) == [1, 1, 0, 0]
    files = sorted(each.iterdir())
    assert [data.read_metadata(path)["prompt"] for path in files] == ["1", "1", "0", "0"]
    assert {Image.open(path).size for path in files} == {(8, 8)}
    with pytest.raises(ConfigError, match="0 ant, 1 bee; got 2"):
        sample.run([f"--workdir={run}", "--label", "2"])
    assert exporting.run([f"--workdir={run}", f"--out={tmp_path / 'sampler'}", "--batch=2", "--scale=2"]) == 0
    monkeypatch.chdir(tmp_path / "sampler")
    names = {}
    exec((tmp_path / "sampler" / "README.md").read_text().split("```python")[1].split("```")[0], names)
    loaded = trained.load(run)
    settings = loaded.config.sample
    settings.scale = 2.0
    cond = {"label": jnp.zeros(2, jnp.int32)}
    wanted = trained.draw(loaded, settings, cond, loaded.model.null(2), [0, 1], 2)
    np.testing.assert_allclose(names["samples"], wanted, atol=1e-4)


def test_pictures_that_break_later_cost_no_step(tiny, folder, tmp_path, monkeypatch):
    pytest.importorskip("grain", reason="needs jaxdiff[grain]")
    batches, files = inputs.batches, sorted(folder.rglob("*.png"))
    whole = [file.read_bytes() for file in files]

    def breaking(*args, **kwargs):
        yield next(batches(*args, **kwargs))
        for file in files[:5]:
            file.write_bytes(b"no picture")
        yield from batches(*args, **kwargs)

    argv = [*tiny, "--config.data.memory_gb=0", "--config.train.steps_per_call=1", f"--workdir={tmp_path / 'run'}"]
    with monkeypatch.context() as patch:
        patch.setattr(inputs, "batches", breaking)
        with pytest.raises(DataError, match=r"5 of 7 records(.|\n)*0\.png cannot be read"):
            job.run(argv)
    assert trained.load(tmp_path / "run").step == 1
    listed = tmp_path / "run" / "skipped_records.jsonl"
    assert sorted(json.loads(line)["record"] for line in listed.read_text().splitlines()) == [0, 1, 2, 3, 4]
    with pytest.raises(DataError, match="5 of 7 records"):  # they are still bad
        job.run(argv)
    for file, content in zip(files[1:5], whole[1:5], strict=True):
        file.write_bytes(content)
    assert job.run(argv) == 0
    assert [json.loads(line)["record"] for line in listed.read_text().splitlines()] == [0]


def test_streaming_without_grain_says_what_to_type(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "grain", None)
    with pytest.raises(DataError, match=r"pip install 'jaxdiff\[grain\]'(.|\n)*memory_gb="):
        inputs.load(config_of("folder", folder, size=8, memory_gb=0.0))


def test_a_resumed_run_tells_of_new_examples_and_refuses_other_classes(tiny, folder, tmp_path, capsys):
    argv = [*tiny, f"--workdir={tmp_path / 'run'}"]
    assert job.run([*argv, "--config.train.steps=1", "--config.train.steps_per_call=3"]) == 0
    (folder / "ant" / "0.png").unlink()
    assert job.run(argv) == 0
    assert "had 7 examples and has 6 now" in capsys.readouterr().out
    before = (tmp_path / "run" / "data.json").read_text()
    (folder / "ant").rename(folder / "wasp")
    with pytest.raises(DataError, match="label_names was"):
        job.run(argv)
    assert (tmp_path / "run" / "data.json").read_text() == before
    assert json.loads(before)["label_names"] == ["ant", "bee"]
