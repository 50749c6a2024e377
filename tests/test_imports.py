"""Imports point one way, and `import jaxdiff` is light."""

import ast
import subprocess
import sys
from pathlib import Path

import jaxdiff

ROOT = Path(jaxdiff.__file__).parent
CHAIN = [
    {"types", "errors", "atomic"},
    {"schedule"},
    {"target"},
    {"process"},
    {"denoise", "discrete"},
    {"loss"},  # beside the denoiser, but for the one helper that calls a network
    {"guide"},
    {"solver"},
    {"sample"},
    {"likelihood"},
]
LEAVES = {"nets", "text", "data", "metrics", "train"}  # know no diffusion mathematics
ABOVE = {"pipelines": {"nets"}, "pretrained": {"nets", "text", "pipelines"}}  # all of the mathematics, and these
FORBIDDEN = {"torch", "tensorflow", "experiments"}


def imported(path: Path) -> set[str]:
    """The names imported anywhere in a file, as 'jaxdiff.room' or as the top-level package."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "jaxdiff":
            names |= {f"jaxdiff.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module if node.level == 0 else "a relative import")
    return {".".join(name.split(".")[: 2 if name.startswith("jaxdiff") else 1]) for name in names}


def allowed(room: str) -> set[str]:
    """The rooms that `room` may import."""
    if room in LEAVES:
        return {"types", "errors", "atomic", room}
    below: set[str] = set()
    for level in CHAIN:
        if room in level:
            return below | {room}
        below |= level
    return below | {room} | ABOVE.get(room, set())


def violations(root: Path) -> list[str]:
    """'file imports name' for each import against the direction."""
    found = []
    for path in sorted(root.rglob("*.py")):
        room = path.relative_to(root).parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        legal = {f"jaxdiff.{name}" for name in allowed(room)}
        for name in sorted(imported(path)):
            own = name.startswith("jaxdiff") and name not in legal
            if own or name in FORBIDDEN | {"a relative import"}:
                found.append(f"{path.relative_to(root)} imports {name}")
    return found


def test_imports_point_one_way():
    assert violations(ROOT) == []


def test_the_direction_check_can_fail(tmp_path):
    (tmp_path / "nets").mkdir()
    (tmp_path / "nets" / "unet.py").write_text("from jaxdiff import schedule\nfrom jaxdiff.types import Array\n")
    (tmp_path / "target.py").write_text("def f():\n    from jaxdiff.process import q_sample\n")
    (tmp_path / "guide.py").write_text("import torch.nn\nfrom . import sample\nfrom jaxdiff.denoise import from_net\n")
    assert violations(tmp_path) == [
        "guide.py imports a relative import",
        "guide.py imports torch",
        "nets/unet.py imports jaxdiff.schedule",
        "target.py imports jaxdiff.process",
    ]


def test_import_is_light():
    """Less than half a CPU second beyond jax, and nothing heavy comes with it."""
    code = """
import sys, time
import jax
start = time.process_time()
import jaxdiff as jd
cost = time.process_time() - start
jd.schedule.cosine()
print(cost, *(m for m in ("torch", "tensorflow", "flax", "optax", "orbax", "tokenizers", "PIL") if m in sys.modules))
"""
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
        for _ in range(2)
    ]
    answers = [run.stdout.split() for run in runs]
    assert all(answer[1:] == [] for answer in answers)
    assert min(float(answer[0]) for answer in answers) < 0.5
