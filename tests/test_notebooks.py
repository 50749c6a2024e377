"""The notebooks: each runs from its first cell to its last with tiny settings, and the .ipynb is what the .py says.

The .py files are the source. After a change, write the notebooks anew:  jupytext --to ipynb colab/*.py
"""

import os
import sys
from pathlib import Path

import jax
import jupytext
import matplotlib
import nbformat
import pytest

COLAB = Path(__file__).parent.parent / "colab"
SOURCES = sorted(COLAB.glob("*.py"))
# Overrides of the cell tagged "parameters": small enough for one CPU core, and every line still runs.
TINY = {
    "01_train_and_sample": {
        "WORKDIR": "run",
        "PROMPTS": ["red heart", "dog face"],
        "SCALES": [1.0],
        "COUNTS": [2],
        "OVERRIDES": [
            "--config.data.size=8", "--config.net.channels=16", "--config.net.multipliers=1,",
            "--config.net.attention_levels=0,", "--config.net.cross_levels=0,", "--config.net.groups=8",
            "--config.net.num_blocks=1", "--config.net.head_channels=16", "--config.net.patch_size=1",
            "--config.text.dim=16", "--config.text.depth=0", "--config.train.batch_size=16", "--config.train.steps=10",
            "--config.train.steps_per_call=1", "--config.train.log_every=5", "--config.train.sample_every=0",
            "--config.sample.num=4", "--config.sample.steps=2",
        ],
    },
    "02_pure_functions": {"STEPS": 20, "BATCH": 16, "WIDTH": 8, "SAMPLES": 50},
    "03_stable_diffusion": {
        "FOLDER": str(COLAB.parent / "tests" / "fixtures" / "tiny_sd"), "STEPS": 2, "SCALES": [1.0, 5.0],
        "STRENGTHS": [0.5],
    },
}  # fmt: skip


def content(notebook):
    """What has to agree: the kind, the text and the tags of each cell (not ids, outputs or versions)."""
    return [(cell.cell_type, cell.source, cell.metadata.get("tags", [])) for cell in notebook.cells]


def execute(notebook, overrides):
    """Run the code cells in one namespace, with `overrides` put over the cell tagged parameters; returns it."""
    names = {"__name__": "notebook"}
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type != "code":
            continue
        exec(compile(cell.source, f"cell {number}", "exec"), names)
        if "parameters" in cell.metadata.get("tags", []):
            unknown = set(overrides) - set(names)
            assert not unknown, f"the notebook has no parameter {unknown}"
            names |= overrides
    return names


@pytest.fixture
def figures(monkeypatch, tmp_path):
    """The number of figures that were shown; nothing is opened, and files go to a directory of the test."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = []

    def show():
        for number in pyplot.get_fignums():
            pyplot.figure(number).canvas.draw()  # a picture that cannot be drawn fails here
            shown.append(number)
        pyplot.close("all")

    monkeypatch.setattr(pyplot, "show", show)
    monkeypatch.chdir(tmp_path)
    yield shown
    pyplot.close("all")


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_the_notebook_runs(source, figures):
    notebook = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    # As a reader runs it: JAX's default promotion. The check for reused keys stays on.
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        execute(notebook, TINY[source.stem])
    assert len(figures) >= 5


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_the_notebook_is_what_its_source_says(source):
    notebook = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    nbformat.validate(notebook)
    assert content(notebook) == content(jupytext.read(source)), "run: jupytext --to ipynb colab/*.py"
    assert not any(cell.get("outputs") for cell in notebook.cells)


def test_every_notebook_has_a_source_and_a_test():
    assert {path.stem for path in COLAB.glob("*.ipynb")} == {path.stem for path in SOURCES} == set(TINY)


def test_a_stale_notebook_and_a_failing_cell_are_caught(figures):
    notebook = jupytext.reads("# %% tags=['parameters']\nn = 2\n# %%\nassert n == 3\n", "py:percent")
    stale = jupytext.reads("# %% tags=['parameters']\nn = 1\n# %%\nassert n == 3\n", "py:percent")
    assert content(notebook) != content(stale)
    with pytest.raises(AssertionError):
        execute(notebook, {})
    with pytest.raises(AssertionError, match="no parameter"):
        execute(notebook, {"m": 3})
    assert execute(notebook, {"n": 3})["n"] == 3


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_the_first_cell_installs_only_in_colab_and_keeps_its_jax(source, monkeypatch):
    first = next(cell.source for cell in jupytext.read(source).cells if cell.cell_type == "code")
    commands = []
    monkeypatch.setattr("subprocess.run", lambda command, **_: commands.append(command))
    exec(first, {})
    assert commands == []
    monkeypatch.setitem(sys.modules, "google.colab", os)
    with pytest.raises(ValueError, match="SOURCE is empty"):
        exec(first, {})
    exec(first.replace('SOURCE = ""', 'SOURCE = "git+https://example.org/a"'), {})
    assert f"jax=={jax.__version__}" in commands[0]
    assert "jaxdiff @ git+https://example.org/a" in commands[0]
