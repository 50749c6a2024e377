"""The README: its Python runs, its commands are understood, its table names what there is, its solver is a real one."""

import importlib
import inspect
import itertools
import re
import shlex
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import check, cli, compare, inputs, memory, pretrained, train, trained
from experiments import model as models
from jaxdiff import (
    data,
    discrete,
    errors,
    guide,
    likelihood,
    loss,
    metrics,
    nets,
    sample,
    schedule,
    solver,
    target,
    text,
)
from jaxdiff import pipelines as latents
from jaxdiff import pretrained as weights
from jaxdiff import train as training
from jaxdiff.metrics import classify, inception, lpips  # noqa: F401  (the table names them as parts of metrics)
from jaxdiff.train import hosts
from tests import test_solver

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
ROOMS = {
    "Schedules": schedule, "Targets": target, "Weightings": loss, "Time samplers": loss, "Solvers": solver,
    "Time grids": sample, "Likelihood": likelihood, "Discrete data": discrete,
    "Guidance": guide, "Networks": nets, "Data": data, "Text": text, "Training": training, "Metrics": metrics,
    "Published weights": weights, "Latent pipelines": latents,
}  # fmt: skip


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.M | re.S)


def commands():
    """(module, arguments) of every command of ours in the README."""
    for line in "".join(blocks("sh")).splitlines():
        words = shlex.split(line.rpartition("&&")[2])
        if "-m" in words and words[words.index("-m") + 1].startswith("experiments."):
            yield words[words.index("-m") + 1], words[words.index("-m") + 2 :]


def table():
    """{row: names in code style}"""
    rows = re.findall(r"^\| ([A-Z][a-z ]+) \| (.*) \|$", README, re.M)
    return {row: set(re.findall(r"`(\w+)`", cells)) for row, cells in rows}


class Understood(Exception):
    """The command line was read to its end."""


@pytest.fixture(scope="module")
def names():
    """What the Python blocks define, run one after the other as a reader would."""
    found, known = {}, (dict(solver.ALL), dict(solver.ORDER))
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        for number, block in enumerate(blocks("python")):
            exec(compile(block, f"README block {number}", "exec"), found)
    assert solver.ALL["my_midpoint"] is found["my_midpoint"]
    yield found
    for table, before in zip((solver.ALL, solver.ORDER), known, strict=True):
        table.clear()
        table.update(before)


def understand(module, words, monkeypatch, directory):
    """Run a command up to where it has read its arguments and would begin to work."""

    def stop(*args, **kwargs):
        raise Understood

    monkeypatch.chdir(directory)
    monkeypatch.setattr(hosts, "start", lambda *given: None)
    monkeypatch.setattr(trained, "load", stop)
    monkeypatch.setattr(compare, "hold", stop)
    monkeypatch.setattr(pretrained.published, "load", stop)
    monkeypatch.setattr(memory, "lowered", stop)
    for place, name in ((train, "Job"), (train.finetune, "Tuning")):
        monkeypatch.setattr(place, name, lambda config, workdir: stop(check.config(config)))
    with pytest.raises(Understood):
        importlib.import_module(module).run(words)


def test_the_python_of_the_readme_runs_and_gives_the_shapes_it_says(names):
    assert names["samples"].shape == (16, 2)
    assert names["losses"].shape == (4,)
    assert names["made"].shape == (4, 16, 3)
    assert names["pictures"].shape == (1, 16, 16, 3)
    for array in (names["samples"], names["losses"], names["made"]):
        assert np.isfinite(array).all()
    assert jax.tree.structure(names["gradient"]) == jax.tree.structure(names["params"])


@pytest.mark.parametrize("case", list(commands()), ids=lambda case: " ".join([case[0], *case[1]]))
def test_the_commands_of_the_readme_are_understood(case, monkeypatch, tmp_path):
    if case[1] == ["--help"]:
        with pytest.raises(SystemExit):
            importlib.import_module(case[0]).run(case[1])
        return
    understand(*case, monkeypatch, tmp_path)


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("experiments.train", ["--config=emojis"]),
        ("experiments.train", ["--config=emoji", "--config.train.batchsize=4"]),
        ("experiments.train", ["--config=emoji", "--config.train.steps=0"]),
        ("experiments.sample", ["--workdir=runs/emoji", "--promt", "a"]),
    ],
)
def test_a_wrong_command_would_be_caught(module, words, monkeypatch, tmp_path):
    with pytest.raises(errors.ConfigError):
        understand(module, words, monkeypatch, tmp_path)


def test_the_readme_has_commands_of_every_kind():
    assert {module for module, _ in commands()} >= {"experiments.train", "experiments.sample", "experiments.export"}


def test_the_table_names_only_what_there_is():
    assert set(table()) == set(ROOMS)
    for row, listed in table().items():
        missing = [name for name in listed if not hasattr(ROOMS[row], name)]
        assert missing == [], row
    assert not hasattr(solver, "dpmpp_9m")  # this check can fail


def test_the_table_names_all_there_is():
    rows = table()
    assert rows["Schedules"] == set(models.SCHEDULES) | {"from_betas", "shift", "zero_terminal_snr"}
    assert rows["Targets"] == set(models.TARGETS)
    assert rows["Weightings"] == set(models.WEIGHTINGS) | {"hybrid"}
    assert rows["Time samplers"] == set(models.TIMES) | {"importance"}
    assert rows["Time grids"] == {f"{name}_grid" for name in sample.GRIDS}
    assert rows["Networks"] == set(nets.__all__)
    helpers = {"fresh", "predict"}
    assert rows["Solvers"] == {name for name in solver.__all__ if name.islower()} - helpers
    public = {name for name, value in vars(guide).items() if getattr(value, "__module__", "") == guide.__name__}
    assert rows["Guidance"] == {name for name in public if not name.startswith("_")}


def test_the_way_to_prepare_a_set_is_the_one_of_the_error():
    how = data.sources._how_to_prepare("cifar10", Path("DIR"))
    for part in how.partition(": ")[2].split(" && "):
        assert part.strip() in README


def judges(name):
    """(test, arguments) for the tests of test_solver that go through solver.ALL or solver.ORDER, applied to `name`."""
    for title, test in vars(test_solver).items():
        if not title.startswith("test_") or not re.search(r"solver\.(ALL|ORDER)", inspect.getsource(test)):
            continue
        values = {m.args[0]: list(m.args[1]) for m in getattr(test, "pytestmark", []) if m.name == "parametrize"}
        listed = set(values.get("name", ())) & (set(solver.ALL) - {name})
        if listed and not listed >= set(solver.ORDER) - {name}:
            continue  # it is for the stochastic ones
        few = 3 if listed else 1
        choices = {key: [name] if key == "name" and listed else some[:few] for key, some in values.items()}
        for case in itertools.product(*choices.values()):
            yield test, dict(zip(choices, case, strict=True))


def test_the_solver_of_the_readme_passes_the_tests_of_all_solvers(names):
    called = set()
    for test, arguments in judges("my_midpoint"):
        test(**arguments)
        called.add(test.__name__)
    assert called >= {"test_order_of_convergence", "test_the_step_to_clean_data_returns_the_denoised"}


def test_a_wrong_solver_would_be_caught(names, monkeypatch):
    monkeypatch.setitem(solver.ORDER, "my_midpoint", 3)
    with pytest.raises(AssertionError):
        test_solver.test_order_of_convergence("my_midpoint", "cosine")


def test_the_guidance_of_the_readme_keeps_what_is_known(names):
    used = schedule.cosine()
    mask = np.arange(4)[None, :] < 2
    known = np.full((3, 4), 0.5, np.float32)
    guided = names["keep"](lambda x, t: 0.1 * x, known, mask)
    x = sample.sample(jax.random.key(0), guided, jax.numpy.ones((3, 4)), [1.0, 0.5, 0.0], solver.ddim(used))
    np.testing.assert_allclose(x[:, :2], 0.5, atol=1e-6)
    assert (np.abs(x[:, 2:]) < 0.5).all()


def test_the_data_source_of_the_readme_is_one_of_the_job(names, monkeypatch):
    config = cli.load_config("mnist")
    config.data.name, config.data.size = "stripes", 16
    with pytest.raises(errors.ConfigError, match="unknown data"):
        inputs.load(config)
    monkeypatch.setitem(inputs.SOURCES, "stripes", lambda c: names["stripes"](size=c.size))
    dataset = inputs.load(config)
    assert dataset.images.shape == (64, 16, 16, 1)
    assert dataset.num_classes == 4
    assert set(np.unique(dataset.images)) == {0, 255}


def test_all_links_lead_to_files():
    root = Path(__file__).parent.parent
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert link.startswith("http") or (root / link).exists(), link
    for path in re.findall(r"`((?:jaxdiff|experiments|colab|tests)/[\w/.]*)`", README):
        assert (root / path).exists(), path
