"""The comparison of a VAE, a GAN and a diffusion model: each loss is what it says, and the command goes on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import compare, features, rivals, scores, workdir
from jaxdiff import data, train
from jaxdiff.errors import ConfigError

SHAPE = (8, 8, 3)
BATCH = {"image": jnp.asarray(np.random.default_rng(0).integers(0, 256, (4, *SHAPE)), jnp.uint8)}
PLAN = {"parameters": {"GAN": 5}, "steps": {"GAN": 3}, "settings": {"minutes": 2.0}}
SMALL = [
    "--config.data.size=8", "--config.net.channels=16", "--config.net.multipliers=1", "--config.net.head_channels=8",
    "--config.net.attention_levels=0", "--config.train.batch_size=4", "--config.sample.steps=2",
]  # fmt: skip


def test_the_vaes_loss_is_its_formula_written_out():
    rival = rivals.vae(4, SHAPE)
    params = rival.init(jax.random.key(0))
    losses, _ = jax.jit(rival.loss)(params, jax.random.key(1), BATCH)
    x = np.asarray(BATCH["image"]) / 127.5 - 1
    encoded = np.asarray(rivals.Encoder(4, 128).apply(params["encoder"], jnp.asarray(x, jnp.float32)), np.float64)
    mean, std = encoded[:, :64], np.exp(encoded[:, 64:])
    z = mean + std * np.asarray(jax.random.normal(jax.random.key(1), (4, 64)))
    decoded = np.asarray(rivals.Decoder(4, SHAPE).apply(params["decoder"], jnp.asarray(z, jnp.float32)))
    kl = 0.5 * (mean**2 + std**2 - 1 - np.log(std**2)).sum(1)  # of N(mean, std^2) to N(0, 1)
    np.testing.assert_allclose(losses, 96 * np.log(((decoded - x) ** 2).mean()) + kl, rtol=1e-4)


def test_each_player_of_the_gan_moves_by_its_own_term_alone():
    rival = rivals.gan(4, SHAPE)
    params = rival.init(jax.random.key(0))
    gradient = jax.jit(jax.grad(lambda p: rival.loss(p, jax.random.key(1), BATCH)[0].mean()))(params)
    critic, generator = rivals.Encoder(4, 1), rivals.Decoder(4, SHAPE)
    x, z = (
        jnp.asarray(np.asarray(BATCH["image"]) / 127.5 - 1, jnp.float32),
        jax.random.normal(jax.random.key(1), (4, 64)),
    )

    def fooled(p):
        return jax.nn.softplus(-critic.apply(params["critic"], generator.apply(p, z))).mean()

    def wrong(p):
        fake = generator.apply(params["generator"], z)
        slopes = [jax.grad(lambda one: critic.apply(p, one[None])[0, 0])(one) for one in x]
        penalty = sum((slope**2).sum() for slope in slopes) / 4 / 2
        return (jax.nn.softplus(-critic.apply(p, x)) + jax.nn.softplus(critic.apply(p, fake))).mean() + penalty

    expected = {
        "generator": jax.jit(jax.grad(fooled))(params["generator"]),
        "critic": jax.jit(jax.grad(wrong))(params["critic"]),
    }
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-5), gradient, expected)


def test_the_rivals_have_the_parameters_asked_for():
    for make in (rivals.vae, rivals.gan):
        assert 100_000 <= compare.size(compare.as_large(make, 100_000, SHAPE)) < 130_000


def test_samples_that_are_not_finite_or_of_one_colour_have_failed_and_copies_have_no_recall(tmp_path):
    real = np.random.default_rng(0).integers(0, 256, (60, *SHAPE), np.uint8)
    chosen = features.pixels((2, 2, 3))
    extract = features.Extractor(tmp_path, chosen, train.mesh.make(devices=jax.devices()[:1]), 20)
    given = scores.reference(extract("a", real[:40, :2, :2]), extract("b", real[40:, :2, :2]), chosen.contract)
    decoded = np.asarray(data.decode(real[:, :2, :2]))
    good = compare.measure(extract, given, decoded[:40])
    assert good["fd"] < 1e-6
    assert good["coverage"] == 1
    copies = compare.measure(extract, given, np.concatenate([decoded[:1]] * 39 + [decoded[1:2]]))
    assert copies["coverage"] < 0.5
    bad = [np.full_like(decoded, np.nan), np.full_like(decoded, 0.5)]
    assert [compare.measure(extract, given, samples) for samples in bad] == [None, None]
    row = compare.row("GAN", 40, [good, None, None])
    assert row["name"] == "GAN (2 of 3 failed)"
    assert row["figures"]["fd"] == {"mean": good["fd"], "std": None}
    assert "too few" in compare.markdown("FD", [compare.row("GAN", 40, [None])], PLAN)


def test_the_command_makes_one_table_and_one_figure_and_goes_on(tmp_path, capsys):
    words = [f"--workdir={tmp_path}", "--minutes=1e-6", "--seeds=1", *SMALL]
    assert compare.run(words) == 0
    table = capsys.readouterr().out
    rows = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("|")]
    assert rows[2:] == ["held out", "Gaussian fit", "VAE", "GAN", "diffusion"]
    kept = next((tmp_path / "diffusion_0").iterdir())
    first = kept.stat().st_mtime_ns
    (tmp_path / "compare.png").unlink()
    assert compare.run(words) == 0  # nothing is trained again
    assert capsys.readouterr().out == table
    assert (tmp_path / "compare.png").exists()
    assert kept.stat().st_mtime_ns == first
    assert workdir.load_json(tmp_path / "compare.json")["plan"]["steps"] == {"VAE": 1, "GAN": 1, "diffusion": 1}
    with pytest.raises(ConfigError, match=r"minutes: was 1e-06, now 2.0"):
        compare.run([word for word in words if "minutes" not in word])


def test_what_cannot_be_compared_is_refused_before_anything_runs(tmp_path):
    for words, message in (
        (["--minutes=nan"], "--minutes must be > 0"),
        (["--seeds=0"], "--seeds >= 1"),
        (["--config=swissroll"], "pictures whose sides are multiples of 4"),
    ):
        with pytest.raises(ConfigError, match=message):
            compare.run([f"--workdir={tmp_path / 'new'}", *words])
    assert not (tmp_path / "new").exists()
