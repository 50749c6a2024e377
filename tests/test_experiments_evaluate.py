"""Evaluation end to end, tiny: every figure beside its floors, the same after a kill, and what is refused."""

import json

import jax
import numpy as np
import pytest

from experiments import density, evaluate, features, generate, scores, trained
from experiments import train as job
from jaxdiff import data, train
from jaxdiff.errors import CheckpointError, ConfigError, DataError
from jaxdiff.metrics import stats

CONFIG = """
from ml_collections import ConfigDict

from experiments.configs import mnist


def get_config():
    c = mnist.get_config()
    c.net = ConfigDict({"name": "dit", "patch_size": 4, "width": 16, "depth": 1, "heads": 2})  # compiles in no time
    c.data.size = 8
    c.optimizer.warmup = 1
    c.sample.steps = 2
    c.train.update({"batch_size": 16, "steps": 4, "steps_per_call": 2, "log_every": 2, "sample_every": 0})
    return c
"""
RNG = np.random.default_rng(0)
FIGURES = {"fd", "kid", "kid_std", "precision", "recall", "density", "coverage", "nearest", "nearer", "copied"}


def pictures(count):
    labels = np.arange(count, dtype=np.int32) % 2
    noise = RNG.normal(0, 40, (count, 8, 8, 1))
    return np.clip(noise + 60 + 120 * labels[:, None, None, None], 0, 255).astype(np.uint8), labels


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A labelled run of four steps on 200 pictures, with 120 held out."""
    folder = tmp_path_factory.mktemp("evaluate")
    (folder / "tiny.py").write_text(CONFIG)
    for name, count in (("train", 200), ("held_out", 120)):
        x, y = pictures(count)
        np.savez(folder / f"{name}.npz", images=x, labels=y)
    data = f"--config.data.path={folder / 'train.npz'}"
    assert job.run([f"--config={folder / 'tiny.py'}", data, f"--workdir={folder / 'run'}"]) == 0
    return folder / "run"


def arguments(run):
    held_out = run.parent / "held_out.npz"
    return [f"--workdir={run}", "--num=80", "--batch=16", "--bits=8", "--classifier=30", f"--held-out={held_out}"]


@pytest.fixture(scope="module")
def result(run):
    """A sweep over two numbers of steps with two seeds."""
    assert evaluate.run([*arguments(run), "--steps", "1", "2", "--seed", "0", "1"]) == 0
    return json.loads((run / "evaluate.json").read_text())


def test_every_row_has_every_figure_and_the_floors_come_first(result):
    (table,) = result["features"]
    assert (table["name"], table["title"]) == ("pixels 8 x 8", "FD (pixels 8 x 8)")
    assert [row["name"] for row in table["rows"]] == [
        "held-out", "Gaussian fit", "samples, 2 network calls, scale 2", "samples, 4 network calls, scale 2"
    ]  # fmt: skip
    for row in table["rows"]:
        assert set(row["figures"]) == FIGURES
        assert row["n"] == 80
        assert all(np.isfinite(value["mean"]) for value in row["figures"].values())
    assert all(row["figures"]["fd"]["std"] > 0 for row in table["rows"][2:])  # over two seeds
    held_out, normal, *samples = (row["figures"]["kid"]["mean"] for row in table["rows"])
    assert held_out < normal < min(samples)  # two clusters are no Gaussian, and four steps teach nothing


def test_the_statistics_of_the_reference_are_kept_with_their_contract(run, result):
    kept = stats.load(run / "evaluate" / "reference-pixels8x8.safetensors")
    assert (kept.count, kept.contract) == (200, result["features"][0]["contract"])
    x = np.load(run.parent / "train.npz")["images"].reshape(200, -1) / 127.5 - 1
    np.testing.assert_allclose(kept.mean, x.mean(0), atol=1e-6)
    np.testing.assert_allclose(kept.covariance, np.cov(x.T), atol=1e-6)


def test_the_report_says_the_same(run, result):
    text = (run / "evaluate.md").read_text()
    assert "FID" not in text  # no Inception was given
    for row in result["features"][0]["rows"]:
        assert f"| {row['name']} | 80 | {row['figures']['fd']['mean']:.3f}" in text
    assert "Averaged parameters of step 4; seeds 0, 1. Reference: 200 training examples of train." in text
    bits = result["bits_per_dim"]
    assert f"| probability flow | {bits['flow']['mean']:.3f} +- {bits['flow']['se']:.3f} | 8 |" in text
    assert f"decoded at sigma = 2/255 | {bits['bound']['mean']:.3f} +-" in text
    assert (run / "evaluate.png").stat().st_size > 5000


def test_a_killed_evaluation_goes_on_and_ends_the_same(run, result, monkeypatch):
    parts = sorted((run / "evaluate").glob("*/*.safetensors"))
    draws = [path for path in parts if path.parent.name.startswith("samples")]
    assert len(draws) == 4 * 5
    for path in draws[3:6]:
        path.unlink()
    draws[7].write_bytes(draws[7].read_bytes()[:200])  # as a machine that lost power leaves it
    made = []
    monkeypatch.setattr(generate.tqdm, "update", lambda *_: made.append(1))
    monkeypatch.setattr(evaluate.Evaluation, "bits", lambda *_: None)  # neither is kept, nor are they quick
    monkeypatch.setattr(evaluate.Evaluation, "accuracy", lambda *_: None)
    assert evaluate.run([*arguments(run), "--steps", "1", "2", "--seed", "0", "1"]) == 0
    assert len(made) == 4
    again = json.loads((run / "evaluate.json").read_text())
    assert {key: again[key] for key in ("features", "protocol")} == {
        key: result[key] for key in ("features", "protocol")
    }


def test_more_samples_keep_those_that_are_there(run, result, monkeypatch):
    loaded = trained.load(run)
    (chosen, *_) = evaluate.variants(
        evaluate._parser().parse_args(["--workdir=x", "--steps", "1"]), loaded.config, "label"
    )
    dataset, mesh = evaluate.inputs.load(loaded.config), train.mesh.make()
    options = {"folder": run / "evaluate", "mesh": mesh, "batch": 16}
    few = generate.draw(loaded, dataset, chosen, 0, 80, **options)
    more = generate.draw(loaded, dataset, chosen, 0, 90, **options)
    np.testing.assert_array_equal(more.x[:80], few.x)
    np.testing.assert_array_equal(more.own[:80], few.own)
    assert len(np.unique(more.own)) == 90  # each condition once before any comes again


def test_bits_and_accuracy_are_there(result):
    bits = result["bits_per_dim"]
    assert bits["of"] == "held-out"
    assert 0 < bits["gaussian"]["mean"] < bits["flow"]["mean"]
    assert bits["bound"]["n"] == bits["flow"]["n"] == 8
    scored = result["classification_accuracy"]
    assert list(scored) == ["80 samples, 2 network calls, scale 2", "80 real ones"]
    assert scored["80 real ones"] > 0.95


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--num=0"], "--num"), (["--batch=0"], "--batch"), (["--seed", "0", "-1"], "--seed"),
        (["--seed=5000"], "--seed"), (["--bits=-1"], "--bits"), (["--scale=nan"], "scale"), (["--steps=0"], "--steps"),
        (["--solver=unipd_2"], "unipc_2"),
        (["--held-out=tset"], "no splits"), (["--inception=none.safetensors"], "cannot read"), (["--nmu=4"], "--num"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_anything_is_drawn(run, argv, words, monkeypatch):
    monkeypatch.setattr(generate, "draw", lambda *_, **__: pytest.fail("drawing began"))
    monkeypatch.setattr(evaluate.Evaluation, "floors", lambda *_: pytest.fail("measuring began"))
    with pytest.raises((ConfigError, DataError), match=words):
        evaluate.run([f"--workdir={run}", *argv])


def test_a_folder_without_a_run(tmp_path):
    with pytest.raises(CheckpointError, match=r"experiments\.train"):
        evaluate.run([f"--workdir={tmp_path}"])


def test_floors_alone_need_no_model(run, tmp_path):
    given = [f"--config.data.path={run.parent / 'train.npz'}", "--config.data.size=8", "--num=70", "--batch=16"]
    assert evaluate.run(["--config=mnist", *given, f"--workdir={tmp_path / 'floors'}"]) == 0
    result = json.loads((tmp_path / "floors" / "evaluate.json").read_text())
    rows = result["features"][0]["rows"]
    assert [row["name"] for row in rows] == ["the other half of the data", "Gaussian fit"]
    assert rows[0]["figures"]["precision"]["mean"] > rows[1]["figures"]["precision"]["mean"] + 0.1


def test_the_gaussian_has_the_moments_of_the_data():
    x = (RNG.normal(size=(3000, 4)) @ RNG.normal(size=(4, 4)) + [1, 2, 3, 4]).astype(np.float32).reshape(3000, 2, 2)
    made = scores.gaussian(x, 40_000, seed=1)
    assert made.dtype == np.float32
    flat, drawn = x.reshape(-1, 4), made.reshape(-1, 4)
    np.testing.assert_allclose(drawn.mean(0), flat.mean(0), atol=4 * flat.std(0).max() / 200)
    spread = np.abs(np.cov(flat.T)).max()
    np.testing.assert_allclose(np.cov(drawn.T), np.cov(flat.T), atol=5 * spread / 200 * np.sqrt(2))
    pixels = scores.gaussian(pictures(50)[0], 20)
    assert pixels.dtype == np.uint8
    assert pixels.shape == (20, 8, 8, 1)


def test_copies_of_the_data_are_told_from_new_pictures():
    real, held_out = RNG.normal(size=(2, 60, 6))
    given = scores.reference(real, held_out, {"features": "test"})
    assert scores.score(given, real)["nearest"] == 0
    assert scores.score(given, real)["copied"] == 1
    fresh = scores.score(given, held_out)
    assert (fresh["nearest"], fresh["nearer"]) == (1, 0.5)


def test_no_distance_is_given_where_its_covariance_would_be_singular():
    given = scores.reference(*RNG.normal(size=(2, 40, 30)), {})
    assert scores.score(given, RNG.normal(size=(30, 30)))["fd"] is None
    assert scores.score(given, RNG.normal(size=(31, 30)))["fd"] > 0


def test_bits_of_a_gaussian_are_its_entropy():
    """White noise of std 20 in pixels: log2(20 sqrt(2 pi e)) bits, rounding and dequantising cancel."""
    x = np.clip(np.rint(RNG.normal(128, 20, (6000, 2, 2, 1))), 0, 255).astype(np.uint8)
    found = density.gaussian(x[:3000], x[3000:])
    assert found["mean"] == pytest.approx(np.log2(20 * np.sqrt(2 * np.pi * np.e)), abs=4 * found["se"] + 0.01)


def test_the_floors_of_more_examples_use_the_features_of_fewer(tmp_path):
    made = []

    def run(x):
        jax.debug.callback(lambda: made.append(1))
        return x.reshape(len(x), -1)

    chosen = features.Features("test", "FD", {}, run)
    extract = features.Extractor(tmp_path, chosen, train.mesh.make(), 8)
    x = RNG.normal(size=(40, 3)).astype(np.float32)
    first = extract("rows", x, 16)
    jax.effects_barrier()
    assert (len(made), len(first)) == (2, 16)
    np.testing.assert_array_equal(extract("rows", x), x)
    jax.effects_barrier()
    assert len(made) == 5


def test_parts_are_read_and_made_again_where_they_are_not_whole(tmp_path):
    asked = []

    def make(rows):
        asked.append(rows.tolist())
        return rows[:, None].astype(np.float32)

    assert features.in_parts(tmp_path / "a", 5, 2, make)[:, 0].tolist() == [0, 1, 2, 3, 4]
    assert asked == [[0, 1], [2, 3], [4, 4]]
    (tmp_path / "a" / "00000002.safetensors").write_bytes(b"x")
    assert features.in_parts(tmp_path / "a", 6, 2, make)[:, 0].tolist() == [0, 1, 2, 3, 4, 5]
    assert asked[3:] == [[2, 3], [4, 5]]


@pytest.mark.parametrize(("shape", "small"), [((16, 16, 3), (8, 8, 3)), ((8, 8, 1), (8, 8, 1)), ((5,), (5,))])
def test_small_pixels_average_constant_blocks(shape, small):
    chosen = features.pixels(shape)
    x = RNG.uniform(-1, 1, (3, *small)).astype(np.float32)
    big = np.repeat(np.repeat(x, shape[0] // small[0], 1), shape[0] // small[0], 2) if len(shape) == 3 else x
    found = np.asarray(jax.jit(chosen.run)(big)).reshape(x.shape)
    if shape == small:
        np.testing.assert_array_equal(found, x)
    else:
        assert np.abs(found - x).mean() < 0.5 * np.abs(x).mean()
    np.testing.assert_allclose(np.asarray(chosen.run(np.full((1, *shape), 0.25, np.float32))), 0.25, rtol=1e-6)


def test_statistics_of_other_weights_do_not_mix():
    """The contract of the FID's features holds the digest of the weights."""
    one, other = ({"features": "inception", "weights_sha256": text} for text in "ab")
    with pytest.raises(ConfigError, match="weights_sha256"):
        stats.merge(*(stats.of(RNG.normal(size=(5, 2)), contract) for contract in (one, other)))


def test_examples_that_cannot_be_used_are_not_compared_with():
    images = np.arange(10, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 1), np.uint8)
    real = evaluate.real_examples(data.Dataset(images, skipped={3: "damaged", 8: "damaged"}), None)
    assert sorted([*real.x[:, 0, 0, 0], *real.held_out[:, 0, 0, 0]]) == [0, 1, 2, 4, 5, 6, 7, 9]
