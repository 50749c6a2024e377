"""House rules that a machine can check. Each check is a function from source to complaints, tried on a bad case too."""

import ast
import importlib
import importlib.resources
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from experiments import cli

ROOT = Path(__file__).parent.parent
TOP = {
    "pyproject.toml",
    "README.md",
    "CHANGELOG.md",
    "LICENSE",
    "jaxdiff",
    "experiments",
    "tests",
    "colab",
}
HEAVY = {"torch", "tensorflow", "tensorflow_datasets", "grain", "tensorboardX", "clu", "transformers", "diffusers"}


def files(*folders):
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def outside(names):
    """Top-level names that have no place there."""
    return sorted(name for name in names if name not in TOP and not name.startswith("."))


def docstring_lines(node):
    first = node.body[0]
    return first.end_lineno - first.lineno + 1 if ast.get_docstring(node, clean=False) is not None else 0


def too_long(source):
    """Files of more than 400 lines; functions of more than 40, docstring not counted (tables of settings may be)."""
    complaints = [f"{len(source.splitlines())} lines"] if len(source.splitlines()) > 400 else []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name not in ("get_config", "base"):
            length = node.end_lineno - node.lineno + 1 - docstring_lines(node)
            complaints += [f"{node.name}: {length} lines"] if length > 40 else []
    return complaints


def undocumented(source):
    """The module, and public functions and classes at its top level, without a docstring."""
    tree = ast.parse(source)
    nodes = [n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef) and not n.name.startswith("_")]
    missing = [node.name for node in nodes if not ast.get_docstring(node) and node.name != "get_config"]
    return missing + (["module"] if source.strip() and not ast.get_docstring(tree) else [])


def imports(tree):
    """(module, names) of every import below `tree`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, ()) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            yield node.module or "", tuple(alias.name for alias in node.names)


def unsafe(source):
    """Ways to run code out of a data file, and errors of any kind swallowed."""
    tree = ast.parse(source)
    complaints = [m for m, _ in imports(tree) if m.split(".")[0] in ("pickle", "cPickle", "dill", "joblib", "shelve")]
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            complaints += [] if isinstance(node.value, ast.Constant) and node.value.value is False else ["allow_pickle"]
        if isinstance(node, ast.ExceptHandler):
            broad = node.type is None or getattr(node.type, "id", "") in ("Exception", "BaseException")
            complaints += ["broad except"] if broad and not isinstance(node.body[-1], ast.Raise) else []
    return sorted(complaints)


def heavy_at_import(source):
    """Optional or heavy packages imported by importing the module."""
    body = [n for n in ast.parse(source).body if isinstance(n, ast.Import | ast.ImportFrom | ast.If | ast.Try)]
    return sorted({m.split(".")[0] for node in body for m, _ in imports(node)} & HEAVY)


def bad_config(name, doc):
    """What the docstring of a config lacks: its command first, then the cost and what to expect."""
    commands = re.findall(r"^ {4}(.*)", doc, re.M)
    wanted = f"python -m experiments.train --config={name}"
    complaints = [] if commands and (commands[0] + " ").startswith(wanted + " ") else [f"first command is not {wanted}"]
    return complaints + [f"no line {word}" for word in ("Cost:", "Expect:") if not re.search(f"^{word}", doc, re.M)]


@pytest.mark.parametrize("path", files("jaxdiff", "experiments"), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_rules_of_a_source_file(path):
    source = path.read_text(encoding="utf-8")
    assert too_long(source) == []
    assert unsafe(source) == []
    assert not re.search(r"\b(TODO|FIXME|XXX)\b", source)
    assert max(map(len, source.splitlines()), default=0) <= 120
    if path.name != "bench_torch.py":
        assert heavy_at_import(source) == []
    assert undocumented(source) == []


def test_those_rules_can_be_broken():
    body = "\n".join(["    x = 1"] * 41)
    assert too_long(f"def f():\n{body}\n") == ["f: 42 lines"]
    assert too_long('def f():\n    """' + "a\n" * 50 + '"""\n') == []
    assert too_long("x = 1\n" * 401) == ["401 lines"]
    assert undocumented("def f():\n    pass\ndef _g():\n    pass\n") == ["f", "module"]
    assert unsafe("import pickle\nnp.load(f, allow_pickle=True)\ntry:\n    f()\nexcept Exception:\n    pass\n") == [
        "allow_pickle", "broad except", "pickle"
    ]  # fmt: skip
    assert heavy_at_import("import torch.nn\ntry:\n    import grain\nexcept ImportError:\n    pass\n") == [
        "grain",
        "torch",
    ]
    assert heavy_at_import("def f():\n    import torch\n") == []


def test_the_top_level_is_fixed():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("this is not a git checkout")
    assert outside({line.split("/")[0] for line in listed.stdout.splitlines()}) == []
    assert outside({"jaxdiff", "docs", ".ci", "setup.py"}) == ["docs", "setup.py"]


@pytest.mark.parametrize("name", cli.config_names())
def test_a_config_opens_with_its_command(name):
    doc = importlib.import_module(f"experiments.configs.{name}").__doc__
    assert bad_config(name, doc) == []


def test_a_config_without_its_command_is_caught():
    good = "Title.\n\n    python -m experiments.train --config=a --config.x=1\n\nCost: 1.\nExpect: 2.\n"
    assert bad_config("a", good) == []
    assert bad_config("b", good) == ["first command is not python -m experiments.train --config=b"]
    assert bad_config("a", good.replace("Cost", "Price")) == ["no line Cost:"]


def test_the_package_ships_its_types_and_its_data():
    assert importlib.resources.files("jaxdiff").joinpath("py.typed").is_file()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["tool"]["setuptools"]["package-data"]["jaxdiff"] == ["py.typed", "data/embedded/*"]
    needed = {re.split(r"[<>=\[]", line)[0] for line in project["project"]["dependencies"]}
    assert not needed & (HEAVY | {"tensorflow-datasets", "torchvision"})


def test_ci_runs_the_test_command_of_the_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"^python3 -m venv .*$", readme, re.M)
    assert len(commands) == 2
    assert commands[0].endswith("-m experiments.train --config=emoji")
    assert commands[1] in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
