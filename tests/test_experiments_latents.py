"""Training in latents, tiny: an autoencoder, a model in its latents, frozen text encoders; resumed bit for bit."""

import json
import os
import shutil
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image
from safetensors.numpy import load_file, save_file

from experiments import autoencoder, cli, evaluate, inputs, latents, sample, trained
from experiments import export as exporting
from experiments import model as models
from experiments import train as job
from jaxdiff import data, pretrained, text
from jaxdiff.errors import CheckpointError, ConfigError, DataError
from jaxdiff.metrics import lpips
from jaxdiff.nets import AutoencoderKL, vae

TEXT = Path(__file__).parent / "fixtures" / "text" / "clip"
COMMON = [
    "--config.data.size=8", "--config.train.batch_size=8", "--config.train.steps=6", "--config.train.steps_per_call=1",
    "--config.train.log_every=2", "--config.train.checkpoint_every=2", "--config.train.sample_every=0",
    "--config.sample.num=4", "--config.optimizer.warmup=1",
]  # fmt: skip
CODER = ["--config=emoji_autoencoder", "--config.net.channels=(4,4)", "--config.net.groups=2", *COMMON]
CONFIG = """
from ml_collections import ConfigDict

from experiments.configs import latent_emoji


def get_config():
    c = latent_emoji.get_config()
    c.net = ConfigDict({"name": "dit", "patch_size": 2, "width": 8, "depth": 1, "heads": 1})  # compiles in no time
    c.text.update({"dim": 8, "depth": 0, "heads": 1})
    c.sample.steps = 2
    return c
"""
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With 40 small emoji and their names in pictures.npz."""
    made = tmp_path_factory.mktemp("latents")
    emoji = data.emoji(8)
    np.savez(made / "pictures.npz", images=emoji.images[:40], captions=emoji.captions[:40])
    return made


@pytest.fixture(scope="module")
def coder(folder):
    """The run of an autoencoder, six steps long."""
    assert job.run([*CODER, pictures_of(folder), f"--workdir={folder / 'coder'}"]) == 0
    return folder / "coder"


def pictures_of(folder):
    return f"--config.data.path={folder / 'pictures.npz'}"


@pytest.fixture(scope="module")
def latent(folder, coder):
    """A run in its latents."""
    assert job.run([*command(folder, coder), f"--workdir={folder / 'latent'}"]) == 0
    return folder / "latent"


def command(folder, coder, cache="cache"):
    """The command line of a very small training in the latents of `coder`."""
    (folder / "tiny.py").write_text(CONFIG)
    given = [f"--config.frozen.autoencoder={coder}", f"--config.frozen.cache={folder / cache}"]
    return [f"--config={folder / 'tiny.py'}", pictures_of(folder), *given, *COMMON]


@pytest.fixture
def small():
    """An autoencoder of few parameters, untrained, and pictures for it."""
    net = AutoencoderKL((8, 8), 1, 2, groups=4, mid_attention=False, scale=2.0, shift=0.25)
    params = jax.jit(net.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    pictures = RNG.integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)
    return latents.Coder(net, params), data.arrays(pictures, np.arange(20), [str(i) for i in range(20)])


def interrupted(argv, directory, monkeypatch):
    """Run `argv` twice: the first time stopped by a signal between two checkpoints."""
    orders = data.orders

    def interrupting(seed, step, *args, **kwargs):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return orders(seed, step, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(data, "orders", interrupting)
        assert job.run([*argv, f"--workdir={directory}"]) == 143
    assert not (directory / "vae").exists()
    assert job.run([*argv, f"--workdir={directory}"]) == 0


def assert_same_run(one, other):
    assert (one / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()
    first, second = trained.restore(one), trained.restore(other)
    assert first.step == second.step == 6
    jax.tree.map(np.testing.assert_array_equal, first.params, second.params)


# --- the autoencoder


def test_an_autoencoder_is_trained_by_the_ordinary_job(coder):
    lines = [json.loads(line) for line in (coder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert set(lines[0]) == {"step", "loss", "grad_norm", "bad_steps", "error", "kl", "lpips"}
    assert lines[-1]["loss"] < lines[0]["loss"]
    for line in lines:
        assert line["loss"] == pytest.approx(line["error"] + 0.05 * line["kl"], rel=1e-5)
    (picture,) = (coder / "samples").iterdir()
    assert Image.open(picture).size == (8 * (2 * 16 + 2), 8 * (2 * 8 + 2))  # two by two pairs, and the gaps


def test_an_interrupted_autoencoder_is_bit_identical(coder, folder, tmp_path, monkeypatch):
    interrupted([*CODER, pictures_of(folder)], tmp_path / "run", monkeypatch)
    assert_same_run(coder, tmp_path / "run")
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        assert (coder / "vae" / name).read_bytes() == (tmp_path / "run" / "vae" / name).read_bytes()


def test_what_it_leaves_is_its_average_with_latents_of_unit_variance(coder, folder, tmp_path):
    net, params = pretrained.vae.load(coder / "vae")
    jax.tree.map(np.testing.assert_array_equal, params, trained.restore(coder).params["net"])
    z = latents.encode(data.array_file(folder / "pictures.npz"), latents.open_coder(coder), tmp_path)
    assert abs(z.images.mean()) < 1e-4
    assert z.images.std() == pytest.approx(1, abs=1e-4)
    assert net.scale != 1


def test_the_loss_is_its_definition(monkeypatch):
    """Against plain NumPy, for an encoder and a decoder that are known."""
    mean, log_variance = RNG.normal(size=(2, 3, 2, 2, 2)).astype(np.float32)
    x = RNG.integers(0, 256, (3, 4, 4, 3), dtype=np.uint8)
    seen = []

    class Net:
        def apply(self, params, given, method):
            seen.append(given)
            found = vae.Latents(jnp.asarray(mean), jnp.asarray(log_variance))
            return found if method == "encode" else jnp.zeros((3, 4, 4, 3))

    monkeypatch.setattr(lpips, "distance", lambda weights, a, b: weights * jnp.abs(a - b).max((1, 2, 3)))
    model = autoencoder.Autoencoder(Net(), (4, 4, 3), False, "l2", 0.5, 10.0, 0.1)
    losses, aux = model.loss({"net": {}}, jax.random.key(0), {"image": jnp.asarray(x)})
    pixels = x / 127.5 - 1
    error, far = (pixels**2).mean((1, 2, 3)), np.abs(pixels).max((1, 2, 3))
    # KL(N(m, v) || N(0, 1)) = (m^2 + v - 1 - log v) / 2 for each latent
    kl = 0.5 * (mean**2 + np.exp(log_variance) - 1 - log_variance).sum((1, 2, 3)) / (4 * 4 * 3)
    np.testing.assert_allclose(aux["kl"], kl, rtol=1e-5)
    np.testing.assert_allclose(losses, error + 0.5 * kl + 0.1 * 10 * far, rtol=1e-5)
    noise = (seen[1] - mean) / np.exp(log_variance / 2)  # what is decoded is a draw
    assert abs(noise.mean()) < 4 / noise.size**0.5
    assert 0.5 < noise.std() < 1.5
    absolute = autoencoder.Autoencoder(Net(), (4, 4, 3), False, "l1", 0.0, None, 1.0)
    losses, _ = absolute.loss({"net": {}}, jax.random.key(0), {"image": jnp.asarray(x)})
    np.testing.assert_allclose(losses, np.abs(pixels).mean((1, 2, 3)), rtol=1e-5)


def test_lpips_is_read_where_it_is_asked_for(tmp_path):
    config = cli.load_config("emoji_autoencoder")
    config.autoencoder.lpips = str(tmp_path / "none.safetensors")
    with pytest.raises(DataError, match=r"none\.safetensors"):
        models.build(config, {"shape": (32, 32, 3)}, None)
    with pytest.raises(ConfigError, match="31 x 31"):
        models.build(config, {"shape": (16, 16, 3)}, None)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("condition", "caption", "pictures alone"),
        ("frozen.autoencoder", "x", "pictures alone"),
        ("autoencoder.error", "l3", "l1, l2"),
        ("net.groups", "7", "multiples of groups"),
        ("net.scale", "2.0", "unknown"),
    ],
)
def test_an_autoencoder_that_cannot_be_is_refused(key, value, words):
    config = cli.load_config("emoji_autoencoder")
    if key == "net.scale":  # which is measured
        config.net.scale = 1.0
    cli.override(config, key, value)
    with pytest.raises(ConfigError, match=words):
        models.build(config, {"shape": (8, 8, 3)}, None)


def test_pictures_of_a_size_that_does_not_divide_are_refused():
    with pytest.raises(ConfigError, match="multiples of 4"):
        models.build(cli.load_config("emoji_autoencoder"), {"shape": (10, 8, 3)}, None)


def test_an_autoencoder_draws_nothing(coder, tmp_path):
    for command in (sample.run, evaluate.run):
        with pytest.raises(ConfigError, match=r"--config=latent_emoji --config\.frozen\.autoencoder="):
            command([f"--workdir={coder}"])


def test_latents_that_are_all_alike_have_no_scale(small):
    coder, dataset = small
    with pytest.raises(ConfigError, match="Train the autoencoder longer"):
        autoencoder.measured(coder.net, jax.tree.map(jnp.zeros_like, coder.params), dataset.images)


# --- latents


def test_latents_are_those_of_the_autoencoder(small, tmp_path):
    coder, dataset = small
    found = latents.encode(dataset, coder, tmp_path, batch=3)
    mean = coder.net.apply(coder.params, dataset.images / np.float32(127.5) - 1, method="encode").mean
    np.testing.assert_allclose(found.images, (mean - 0.25) * 2, atol=1e-4)
    assert found.images.dtype == np.float32
    assert found.captions == dataset.captions
    np.testing.assert_array_equal(found.labels, dataset.labels)
    z = jnp.asarray(found.images)
    again = coder.net.apply(coder.params, z / 2 + 0.25, method="decode").clip(-1, 1)
    np.testing.assert_allclose(coder.decode(coder.params, z), again, atol=1e-6)


def test_latents_are_made_once_for_the_same_weights_and_pictures(small, tmp_path, monkeypatch):
    coder, dataset = small
    made = []

    def count(self, params, x):
        made.append(len(x))
        return jnp.zeros((len(x), *self.shape(x.shape[1:])))

    monkeypatch.setattr(latents.Coder, "encode", count)
    monkeypatch.setattr(latents.jax, "jit", lambda function: function)

    def batches(coder, dataset):
        made.clear()
        latents.encode(dataset, coder, tmp_path, batch=2)
        return len(made)

    monkeypatch.setattr(latents, "PARTS", 4)
    assert batches(coder, dataset) == 12  # three files of four batches
    assert batches(coder, dataset) == 0
    other = latents.Coder(coder.net, jax.tree.map(lambda x: x + 1e-6, coder.params))
    assert batches(other, dataset) == 12
    assert batches(latents.Coder(coder.net.clone(scale=2.5), coder.params), dataset) == 12
    images = dataset.images.copy()
    images[7, 3, 3, 1] ^= 1
    assert batches(coder, data.arrays(images)) == 12
    (middle, *_) = tmp_path.glob(f"latents-*/{8:08d}.safetensors")
    for part in tmp_path.glob(f"latents-*/{8:08d}.safetensors"):
        part.unlink()
    assert batches(coder, dataset) == 4, middle


def test_pictures_that_cannot_be_read_have_no_latents(small, tmp_path):
    coder, dataset = small
    some = data.Dataset(dataset.images, skipped={3: "damaged"})
    found = latents.encode(some, coder, tmp_path / "cache", batch=20)
    assert found.skipped == {3: "damaged"}
    assert np.isnan(found.images[3]).all()
    for i, picture in enumerate(dataset.images):
        Image.fromarray(picture).save(tmp_path / f"{i:02d}.png")
    (tmp_path / "05.png").write_bytes(b"no picture")
    streamed = latents.encode(data.open_folder(tmp_path, 8), coder, tmp_path / "cache", batch=20)
    assert list(streamed.skipped) == [5]
    good = [i for i in range(20) if i not in (3, 5)]
    np.testing.assert_allclose(streamed.images[good], found.images[good], atol=1e-6)
    shown = autoencoder.some(data.open_folder(tmp_path, 8), 20)
    assert shown.shape == (20, 8, 8, 3)


def test_a_run_in_latents_draws_pictures(latent, coder, tmp_path):
    run = trained.load(latent)
    assert run.model.shape == (4, 4, 4)
    assert run.info["shape"] == [8, 8, 3]
    settings, cond = run.config.sample, run.model.captions(["red heart"])
    x = trained.draw(run, settings, cond, run.model.null(1), [0], 1)
    assert x.shape == (1, 8, 8, 3)
    assert np.abs(x).max() <= 1
    kept = jax.tree.map(np.asarray, {k: v for k, v in run.params.items() if k != "vae"})
    assert set(kept) == {"net", "text"}  # what was trained; the autoencoder comes along
    opened = latents.open_coder(coder)
    jax.tree.map(np.testing.assert_array_equal, run.params["vae"], opened.params)
    (picture,) = (latent / "samples").iterdir()
    assert data.read_metadata(picture)["step"] == "6"


def test_an_interrupted_run_in_latents_is_bit_identical(latent, coder, folder, tmp_path, monkeypatch):
    interrupted(command(folder, coder, "another cache"), tmp_path / "run", monkeypatch)
    first, second = (json.loads((run / "frozen.json").read_text()) for run in (latent, tmp_path / "run"))
    assert first == second
    assert_same_run(latent, tmp_path / "run")


def test_other_weights_below_a_run_are_refused(latent, coder, folder, tmp_path):
    assert json.loads((latent / "frozen.json").read_text()) == {"autoencoder": latents.open_coder(coder).fingerprint}
    moved = shutil.copytree(latent, tmp_path / "run")
    other = shutil.copytree(coder / "vae", tmp_path / "vae")
    settings = json.loads((moved / "config.json").read_text())
    settings["frozen"]["autoencoder"] = str(other)
    (moved / "config.json").write_text(json.dumps(settings))
    assert trained.load(moved).step == 6  # the same weights in another place
    path = other / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["decoder.conv_in.bias"] = weights["decoder.conv_in.bias"] + np.float32(1e-3)
    save_file(weights, path, metadata={"format": "pt"})
    for act in (lambda: trained.load(moved), lambda: job.Job(trained.workdir.load(moved)[0], moved)):
        with pytest.raises(CheckpointError, match="its weights have changed"):
            act()


def test_the_sampler_of_a_run_in_latents_is_exported_whole(latent, tmp_path, monkeypatch):
    assert exporting.run([f"--workdir={latent}", f"--out={tmp_path / 'sampler'}", "--batch=1"]) == 0
    monkeypatch.chdir(tmp_path / "sampler")
    names = {}
    exec((tmp_path / "sampler" / "README.md").read_text().split("```python")[1].split("```")[0], names)
    assert names["pictures"].shape == (1, 8, 8, 3)
    run = trained.load(latent)
    wanted = trained.draw(run, run.config.sample, run.model.captions(["red heart"]), run.model.null(1), [0], 1)
    np.testing.assert_allclose(names["samples"], wanted, atol=1e-4)


def test_held_out_captions_are_looked_up_among_held_out_pictures(latent, tmp_path, monkeypatch):
    images, captions = data.emoji(8).images[:24], [f"caption {i}" for i in range(24)]
    np.savez(tmp_path / "held_out.npz", images=images, captions=captions)
    drawn = []

    def draw(run, settings, cond, null, seeds, batch):
        drawn.append((np.asarray(cond["ids"]), np.asarray(null["ids"])))
        own = np.random.default_rng(0).choice(24, size=12, replace=False)
        told = (drawn[-1][0] != drawn[-1][1]).any()
        return np.asarray(data.decode(images[own if told else (own + 1) % 24]))  # perfect, or always another's

    monkeypatch.setattr(evaluate.prompts.trained, "draw", draw)
    monkeypatch.setattr(evaluate.Evaluation, "row", lambda *_: [None])
    monkeypatch.setattr(evaluate.Evaluation, "accuracy", lambda *_: None)
    argv = [f"--workdir={latent}", "--num=6", "--prompts=12", "--top=1", f"--held-out={tmp_path / 'held_out.npz'}"]
    monkeypatch.setattr(evaluate, "write", lambda directory, result: drawn.append(result))
    monkeypatch.setattr(
        evaluate.Evaluation, "floors", lambda self: self.tables.append({"rows": [{"nfe": 1, "name": ""}]})
    )
    assert evaluate.run(argv) == 0
    result = drawn[-1]
    assert result["bits_per_dim"] is None
    assert result["held_out_prompts"]["recall_at_1"] == 1
    assert result["held_out_prompts"]["chance"] == 1 / 24
    assert result["held_out_without"]["recall_at_1"] < 0.2
    lines = evaluate.report.markdown({**result, "features": []})
    assert "of held-out captions, among held-out pictures: own picture in the top 1: 100.0% of 12 prompts" in lines
    assert "without the captions: own picture" in lines


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("data.flip", "true", r"--config\.data\.flip=false"),
        ("sample.clip", "true", r"--config\.sample\.clip=false"),
    ],
)
def test_settings_that_do_not_go_with_latents_are_refused(small, key, value, words):
    config = cli.load_config("latent_emoji")
    cli.override(config, key, value)
    with pytest.raises(ConfigError, match=words):
        models.sampler(models.build(config, {"shape": (8, 8, 3)}, text.train(["a"], 500), small[0]), config.sample)


@pytest.mark.parametrize("shape", [(8, 8, 1), (9, 8, 3), (2,)])
def test_pictures_that_the_autoencoder_does_not_take_are_refused(small, shape):
    with pytest.raises(ConfigError, match=r"frozen\.autoencoder"):
        small[0].shape(shape)


def test_an_autoencoder_that_is_not_there_or_not_trained_to_its_end_is_named(coder, tmp_path):
    with pytest.raises(CheckpointError, match="--config=emoji_autoencoder"):
        latents.open_coder(tmp_path)
    unfinished = shutil.copytree(coder, tmp_path / "unfinished", ignore=shutil.ignore_patterns("vae"))
    with pytest.raises(CheckpointError, match="to its end first"):
        latents.open_coder(unfinished)


# --- frozen text encoders


@pytest.fixture
def texts(tmp_path):
    return latents.open_texts(TEXT, tmp_path / "cache", max_len=8)


def test_captions_are_what_the_published_encoder_makes_of_them(texts):
    captions = ["a red heart", "", "the same", "a red heart"]
    rows = texts.rows(captions)
    model, params = pretrained.text.clip_text(TEXT)
    ids, mask = text.open_tokenizer(TEXT).encode(captions, 8)
    wanted = model.apply(params, ids)
    np.testing.assert_allclose(rows["tokens"], wanted.tokens, atol=1e-5)
    np.testing.assert_allclose(rows["pooled"], wanted.pooled, atol=1e-5)
    np.testing.assert_array_equal(rows["mask"], mask)
    assert texts.widths == (rows["tokens"].shape[-1], rows["pooled"].shape[-1])


def test_captions_are_encoded_once(texts, monkeypatch):
    before = texts.rows(["one", "two"])
    assert latents.open_texts(TEXT, texts.cache, max_len=9).fingerprint != texts.fingerprint
    monkeypatch.setattr(latents.text.CLIPText, "apply", lambda *_: pytest.fail("encoded again"))
    again = latents.open_texts(TEXT, texts.cache, max_len=8).rows(["two", "one"])
    np.testing.assert_array_equal(again["tokens"], before["tokens"][::-1])


def test_a_run_told_by_a_published_encoder(coder, folder, tmp_path, monkeypatch):
    given = [f"--config.frozen.text={TEXT}", "--config.text.max_len=77", "--config.condition_dropout=0.5"]
    run = tmp_path / "run"
    assert job.run([*command(folder, coder), *given, f"--workdir={run}"]) == 0
    loaded = trained.load(run)
    assert set(loaded.params) == {"net", "vae"}  # no text encoder is trained
    assert not (run / "tokenizer.json").exists()
    assert set(json.loads((run / "frozen.json").read_text())) == {"autoencoder", "text"}
    assert sample.run([f"--workdir={run}", "--prompt", "red heart", "--num=2", f"--out={tmp_path / 'a.png'}"]) == 0
    with pytest.raises(ConfigError, match="cannot be exported"):
        exporting.run([f"--workdir={run}", f"--out={tmp_path / 'sampler'}"])


def test_a_caption_that_is_dropped_is_the_empty_one(texts):
    config = cli.load_config("latent_emoji")
    config.condition_dropout, config.text.max_len = 0.5, 8
    config.frozen.text, config.frozen.cache = str(TEXT), str(texts.cache)
    config.frozen.autoencoder = ""
    model = models.build(config, {"shape": (4, 4, 3), "num_classes": 0}, texts)
    batch = {"image": jnp.zeros((64, 4, 4, 3)), **model.captions(["red heart"] * 64)}
    kept = model._drop(jax.random.key(0), batch)
    empty, given = texts.rows(["", "red heart"])["tokens"]
    same = [(np.asarray(kept["tokens"]) == row).all((1, 2)) for row in (empty, given)]
    assert (same[0] ^ same[1]).all()
    assert 16 < same[0].sum() < 48
    np.testing.assert_array_equal(model.embed({}, kept)["token_mask"], kept["mask"])


def test_what_is_no_text_encoder_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"frozen\.text"):
        latents.open_texts(tmp_path, max_len=8)
    shutil.copytree(TEXT, tmp_path / "bert")
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ConfigError, match="got 'bert'"):
        latents.open_texts(tmp_path / "bert", max_len=8)
    with pytest.raises(ConfigError, match="at most 77"):
        latents.open_texts(TEXT, max_len=78)
    config = ConfigDict({"frozen": {"text": str(TEXT)}, "condition": "label"})
    with pytest.raises(ConfigError, match=r"frozen\.text=''"):
        latents.texts_of(config)


def test_rows_of_the_host_come_along_with_the_batches():
    dataset = data.arrays(np.zeros((5, 2, 2, 3), np.uint8))
    along = {"tokens": np.arange(10.0).reshape(5, 2)}
    batch = next(inputs.batches(dataset, seed=0, step=0, batch_size=3, steps=2, along=along))
    np.testing.assert_array_equal(batch["tokens"], along["tokens"][batch["index"]])
    assert batch["tokens"].shape == (2, 3, 2)
