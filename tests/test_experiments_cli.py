"""Configs and the command line: every mistake is answered by the nearest valid name, with status 2."""

import argparse
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from experiments import check, cli, inputs, latents
from experiments import model as models
from experiments import train as job
from jaxdiff import data, nets, schedule, solver
from jaxdiff.errors import ConfigError

SHAPES = {"cifar10": (32, 32, 3), "cifar10_edm": (32, 32, 3), "mnist": (28, 28, 1), "swissroll": (2,)}
TEXT = Path(__file__).parent / "fixtures" / "text" / "clip"


def parse(*argv):
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--config", default="emoji")
    return cli.parse(parser, argv)[0]


def test_overrides_take_the_type_of_the_field():
    config = parse(
        "--config.train.steps=7", "--config=mnist", "--config.data.flip", "true", "--config.net.multipliers=(1,2,4)",
        "--config.optimizer.learning_rate=1", "--config.sample.prompts=red heart,cat",
    )  # fmt: skip
    assert config.data.tfds == "mnist"
    assert config.train.steps == 7
    assert config.data.flip is True
    assert config.net.multipliers == (1, 2, 4)
    assert isinstance(config.optimizer.learning_rate, float)
    assert config.sample.prompts == ("red heart", "cat")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--config=cifar"], ["'cifar'", "'cifar10'"]),
        (["--config.train.batchsize=1"], ["train.batchsize", "'train.batch_size'"]),
        (["--config.train.steps=many"], ["train.steps", "integer", "'many'"]),
        (["--config.train.steps=1.5"], ["integer", "1.5"]),
        (["--config.data.flip=maybe"], ["true or false", "maybe"]),
        (["--config.net.multipliers=(1,x)"], ["net.multipliers", "integer", "'x'"]),
        (["--config.train.steps"], ["no value"]),
        (["--confg=emoji"], ["--confg", "'--config'"]),
        (["--config=no/such/file.py"], ["does not exist"]),
    ],
)
def test_mistakes_name_the_nearest(argv, words):
    with pytest.raises(ConfigError) as error:
        parse(*argv)
    for word in words:
        assert word in str(error.value)


def test_call_reads_names_with_options():
    table = {"one": lambda *, a=1, b=2.0: (a, b), "needs": lambda *, schedule, must: (schedule, must)}
    assert cli.call("thing", "one", table, schedule="unused") == (1, 2.0)
    assert cli.call("thing", "one(b=3e-4)", table) == (1, 3e-4)
    assert cli.call("thing", "needs(must='x')", table, schedule="s") == ("s", "x")
    for text, word in [
        ("ome", "'one'"),
        ("one(c=1)", "'c'"),
        ("one(1)", "name(option"),
        ("needs", "must"),
        ("one(", "cannot"),
    ]:
        with pytest.raises(ConfigError, match=word.replace("(", r"\(")):
            cli.call("thing", text, table, schedule="s")


@pytest.mark.parametrize(
    ("what", "text", "table"),
    [
        ("schedule", "cosine(s='x')", models.SCHEDULES), ("schedule", "ddpm_table(T=9.5)", models.SCHEDULES),
        ("weighting", "min_snr(gamma=None)", models.WEIGHTINGS), ("ema", "constant(decay='x')", models.EMAS),
        ("solver", "ddpm(variance=1)", solver.ALL), ("solver", "euler(sigma_range=1)", solver.ALL),
    ],
)  # fmt: skip
def test_options_of_another_type_are_refused(what, text, table):
    with pytest.raises(ConfigError, match=rf"option \w+ of {what} {text.split('(')[0]} must be"):
        cli.call(what, text, table, schedule=schedule.cosine())


def test_call_does_not_evaluate_code():
    with pytest.raises(ConfigError, match="cannot read"):
        cli.call("thing", "one(a=__import__('os').getcwd())", {"one": lambda a: a})


@pytest.mark.parametrize("name", sorted({*cli.config_names()} - {"finetune"}))  # which begins from a published model
def test_every_config_describes_a_model_that_can_be_built(name, tmp_path):
    config = cli.load_config(name)
    check.config(config)
    shape = SHAPES.get(name, (32, 32, 3))
    info = {"shape": shape, "num_classes": 10, "name": name}
    coder = None
    if config.frozen.autoencoder:  # which a machine that runs the tests may not have
        coder = latents.Coder(nets.AutoencoderKL((8, 8, 8), 1, groups=4), {})
    if config.frozen.text:
        config.frozen.text, config.frozen.cache, config.text.max_len = str(TEXT), str(tmp_path), 8
    tokenizer = models.tokenizer_for(config, ["red heart"], tmp_path)
    model = models.build(config, info, tokenizer, coder)
    models.sampler(model, config.sample)
    carry = jax.eval_shape(lambda: models.carry(model, config, jax.random.key(0)))
    assert carry["state"].params["net"]


def test_cifar10_is_the_network_and_the_recipe_of_ddpm():
    config = cli.load_config("cifar10")
    model = models.build(config, {"shape": (32, 32, 3), "num_classes": 10}, None)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 35_746_307
    assert (config.train.batch_size, config.train.steps, config.optimizer.warmup) == (128, 800_000, 5000)
    assert (config.sample.solver, config.sample.grid, config.sample.steps) == ("ddpm_large", "uniform", 1000)


def test_cifar10_edm_takes_the_steps_of_edm():
    """EDM sums the squared error over an image where the loss here is a mean: Adam's eps is what notices."""
    config = cli.load_config("cifar10_edm")
    summed = jnp.asarray([1e-6, -3e-8])  # gradients of the size of eps

    def step(gradient, optimizer):
        return optimizer.update(gradient, optimizer.init(summed), summed)[0]

    with jax.numpy_dtype_promotion("standard"):
        want = step(summed, optax.adam(1e-3 / config.optimizer.warmup, eps=1e-8))
        found = step(summed / (32 * 32 * 3), models.optimizer(config))
    np.testing.assert_allclose(found, want, rtol=1e-4)


def test_help_lists_every_config(capsys):
    with pytest.raises(SystemExit) as leave:
        job.run(["--help"])
    assert leave.value.code == 0
    text = capsys.readouterr().out
    for name in cli.config_names():
        assert name in text


@pytest.mark.parametrize(
    "override",
    [
        "seed=2147483648", "data.memory_gb=-1",
        "train.steps=0", "train.batch_size=0", "train.batch_size=-3", "optimizer.learning_rate=nan", "sample.scale=nan",
        "sample.scale=-1", "sample.steps=0", "sample.solver=dpmp_2m", "sample.grid=karas", "condition=captions",
        "diffusion.schedule=cosin", "diffusion.target=epsilon", "diffusion.weighting=min_snr(gama=5)", "net.name=unett",
        "net.groups=7", "data.size=33", "data.name=emojis", "train.dtype=float16", "mesh.data=3", "train.ema=warmed",
        "condition_dropout=2.0", "train.accumulate=5", "frozen.autoencoder=/nowhere", "frozen.text=/nowhere",
        "net.name=autoencoder", "diffusion.noise_offset=-1",
    ],
)  # fmt: skip
def test_bad_settings_are_refused_before_anything_is_compiled_or_written(override, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train", f"--workdir={tmp_path / 'run'}", f"--config.{override}"])
    monkeypatch.setattr(job, "fit", lambda job: pytest.fail("training began"))  # the first thing that compiles
    with pytest.raises(SystemExit) as leave:
        cli.main(job.run)
    assert leave.value.code == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert not list(tmp_path.iterdir())


def test_pictures_of_another_size_and_missing_conditions_are_named(monkeypatch):
    config = cli.load_config("mnist")
    dataset = data.arrays(jax.numpy.zeros((4, 16, 16, 1), "uint8").__array__())
    monkeypatch.setitem(inputs.SOURCES, "tfds", lambda c: dataset)
    with pytest.raises(ValueError, match=r"--config\.data\.size=16"):
        inputs.load(config)
    config.data.size = 16
    with pytest.raises(ValueError, match=r"--config\.condition=none"):
        inputs.load(config)


def test_missing_data_says_how_to_get_it(tmp_path):
    with pytest.raises(ConfigError, match=r"--config\.data\.path=DIR"):
        inputs.load(cli.load_config("folder"))
    config = cli.load_config("folder")
    config.data.path = str(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="nowhere"):
        inputs.load(config)


@pytest.mark.parametrize(
    ("raised", "status", "words"),
    [
        (ConfigError("wrong"), 2, "error: wrong\n"),
        (OSError(28, "No space left on device", "a.png"), 2, "error: [Errno 28] No space left on device: 'a.png'\n"),
        (KeyboardInterrupt(), 130, "interrupted; what was saved before is untouched\n"),
    ],
)
def test_what_goes_wrong_is_one_line_and_a_status(raised, status, words, capsys):
    def run(argv):
        raise raised

    with pytest.raises(SystemExit) as leave:
        cli.main(run)
    assert leave.value.code == status
    assert capsys.readouterr().err == words


def test_config_files_outside_the_package(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("from experiments.configs.emoji import get_config\n")
    assert isinstance(cli.load_config(str(file)), ConfigDict)
    file.write_text("x = 1\n")
    with pytest.raises(ConfigError, match="get_config"):
        cli.load_config(str(file))
