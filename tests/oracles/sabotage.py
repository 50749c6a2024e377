"""Sabotage: break one thing in a solver; is it noticed? `python -m tests.oracles.sabotage [FILE ...] [--every N]`.

A mutant is the source of one file of jaxdiff/solver with one change: a number, an operator, a dropped term or factor, a
comparison, t for s, alpha for sigma, a function of jnp, a branch of `where`. The package is imported anew with it, and
the checks of `tests/test_printed.py` that run the changed function are made, until one complains. Arguments' checks and
their messages are left alone: they have tests of their own. Mutants that change nothing are named in `EQUIVALENT`, with
the reason; the command says where a check sees one of them after all.
"""

import ast
import contextlib
import copy
import functools
import importlib
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jaxdiff
from jaxdiff import solver
from tests.oracles import parts, printed

ROOM = Path(jaxdiff.__file__).parent / "solver"
PACKAGE = "jaxdiff.solver"
LIMIT = 60  # seconds for one check; who takes longer is caught
CRASH = "crash: "
_DERIVATIVE = "_derivative"

EQUIVALENT: dict[str, tuple[str, ...]] = {
    "what is not there yet has weight 0": (
        "base.py: no_step: jnp.zeros_like -> jnp.ones_like",
        "polynomial.py: no_past: jnp.zeros_like -> jnp.ones_like",
        "polynomial.py: beyond_first: 0.0 -> 0.01 (2)",
        "polynomial.py: beyond_first: k - 1 -> k",
        "sa.py: sa_solver: jnp.zeros_like -> jnp.ones_like",
        "sa.py: sa_solver: jnp.zeros_like -> jnp.ones_like (2)",
        "unipc.py: unipc: 0 -> 1 (3)",
    ),
    "its factor is 0": (
        "ancestral.py: ddim: jnp.zeros_like -> jnp.ones_like",
        "multistep.py: plms: t -> s (2)",
        "unipc.py: _moments: 0 -> 1",
        "unipc.py: unipc: 0 * h -> 0 / h",
        "unipc.py: unipc: 0 * h -> 0",
        "unipc.py: unipc: 0 * h -> 0 / h (2)",
        "unipc.py: unipc: 0 * h -> 0 (2)",
    ),
    "where it is read, sigma is 0 and alpha 1": (
        "adaptive.py: adaptive: schedule.alpha(s) * estimate(denoise(x, last)) -> estimate(denoise(x, last))",
        "dpm_sde.py: dpmpp_sde: schedule.alpha(s) * x0 -> x0",
        "langevin.py: annealed_langevin: schedule.alpha(s) * estimate(denoise(x, t)) -> estimate(denoise(x, t))",
        "runge_kutta.py: midpoint: alpha_s * x0 -> x0",
    ),
    "there sigma_s is 0, and the noise of such a step is not read": (
        "ancestral.py: _between: jnp.where(sigma_s > 0, sigma_s / sigma_t, 1.0) -> sigma_s / sigma_t",
        "ancestral.py: _between: sigma_s > 0 -> sigma_s >= 0",
        "ancestral.py: _between: sigma_s -> sigma_t",
        "ancestral.py: _between: 1.0 -> 1.11",
    ),
    "in steps down sigma_t > 0, in steps up alpha_s > 0: this guard does not act": (
        "base.py: mix: jnp.where(sigma_t > 0, sigma_t, 1.0) -> sigma_t",
        "base.py: mix: sigma_t > 0 -> sigma_t >= 0",
        "base.py: mix: sigma_t -> sigma_s",
        "base.py: mix: 1.0 -> 1.11",
        "restart.py: _up: jnp.where(alpha_s > 0, alpha_s, 1.0) -> alpha_s",
        "restart.py: _up: alpha_s > 0 -> alpha_s >= 0",
        "restart.py: _up: 1.0 -> 1.11",
    ),
    "a guard inside of another one, for derivatives by times": (
        "base.py: over: jnp.where(b > 0, b, 1.0) -> b",
        "base.py: over: b > 0 -> b >= 0 (2)",
        "langevin.py: annealed_langevin: jnp.where(alpha_t > 0, alpha_t, 1.0) -> alpha_t",
        "langevin.py: annealed_langevin: alpha_t > 0 -> alpha_t >= 0",
        "runge_kutta.py: _make_churn: jnp.where(alpha > 0, alpha, 1.0) -> alpha",
        "runge_kutta.py: _make_churn: alpha > 0 -> alpha >= 0 (2)",
        "runge_kutta.py: _make_churn: alpha -> sigma (2)",
    ),
    "any number but 0 would do, what is made of it is not read": (
        "base.py: over: 1.0 -> 1.11",
        "base.py: predict: 1.0 -> 1.11",
        "langevin.py: annealed_langevin: 1.0 -> 1.11",
        "polynomial.py: phi: 1.0 -> 1.11",
        "runge_kutta.py: _make_churn: 1.0 -> 1.11",
        "runge_kutta.py: dpm2: 1.0 -> 1.11",
    ),
    "a change below rounding": (
        "consistency.py: tcd: 0.0 -> 0.01",
        "polynomial.py: : 18 -> 19",
        "polynomial.py: phi: 1 -> 2",
        "polynomial.py: phi: _TERMS - 1 -> _TERMS + 1",
        "polynomial.py: phi: _TERMS - 1 -> _TERMS",
        "polynomial.py: phi: h < 1 -> h <= 1",
        "brownian.py: _stationary: 1 -> 2 (3)",
    ),
    "one number more than is read, or the same number": (
        "dpm_sde.py: dpmpp_3m_sde: 3 -> 4",
        "dpm.py: dpmpp_3m: 3 -> 4",
        "multistep.py: _adams_bashforth: 0 -> 1",
        "multistep.py: _adams_bashforth: 1 -> 2 (2)",
    ),
    "only its type is read": (
        "adaptive.py: adaptive: t -> s (2)",
        "multistep.py: deis: t -> s (4)",
        "multistep.py: deis: t -> s (5)",
        "multistep.py: ipndm: t -> s (3)",
        "multistep.py: plms: t -> s (6)",
        "multistep.py: pndm: t -> s (8)",
    ),
    "fresh noise does not look at the times": (
        "brownian.py: brownian_path: t -> s (2)",
        "brownian.py: brownian_path: s -> t (2)",
    ),
    "an increment of the path does not depend on where it starts": ("brownian.py: _stationary: 0 -> 1",),
    "at a node, both sides of it give its value": (
        "brownian.py: _stationary: logsnr >= left + width / 2 -> logsnr > left + width / 2",
    ),
}
"""Why -> the mutants (`Mutant.name`, exactly) that are the same solver. The command holds them to it."""


def equivalent(mutant: "Mutant") -> str | None:
    """Why the mutant changes nothing, if it is named so."""
    return next((why for why, names in EQUIVALENT.items() if mutant.name in names), None)


SWAPS: dict[str, tuple[str, ...]] = {
    "t": ("s",), "s": ("t",), "alpha": ("sigma",), "sigma": ("alpha",), "alpha_t": ("alpha_s",),
    "alpha_s": ("alpha_t",), "sigma_t": ("sigma_s",), "sigma_s": ("sigma_t",), "x0": ("eps",), "eps": ("x0",),
    "exp": ("expm1",), "expm1": ("exp",), "log1p": ("log",), "log": ("log1p",), "sqrt": ("square",),
    "square": ("sqrt",), "maximum": ("minimum",), "minimum": ("maximum",), "zeros_like": ("ones_like",),
    "zeros": ("ones",), "inf": ("e",),
}  # fmt: skip
OPERATORS: dict[type, tuple[type, ...]] = {
    ast.Add: (ast.Sub,), ast.Sub: (ast.Add,), ast.Mult: (ast.Div,), ast.Div: (ast.Mult,),
    ast.Gt: (ast.LtE, ast.GtE), ast.Lt: (ast.GtE, ast.LtE), ast.GtE: (ast.Lt, ast.Gt), ast.LtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,), ast.And: (ast.Or,), ast.Or: (ast.And,),
    ast.BitAnd: (ast.BitOr,), ast.BitOr: (ast.BitAnd,),
}  # fmt: skip


class Mutant(NamedTuple):
    """One change: `name` says it, `file` is the changed one, `function` the function it is in, `source()` its text."""

    name: str
    file: str
    function: str
    source: Callable[[], str]


def mutants(file: str) -> list[Mutant]:
    """All mutants of a file of the room, in the order of its source."""
    text = (ROOM / file).read_text(encoding="utf-8")
    found, seen, tree = [], {}, ast.parse(text)
    for index, (function, node) in enumerate(_changeable(tree, "")):
        for number, new in enumerate(_changes(node, _bound(tree, function))):
            change = f"{file}: {function}: {ast.unparse(node)} -> {ast.unparse(new)}"
            seen[change] = seen.get(change, 0) + 1
            name = change if seen[change] == 1 else f"{change} ({seen[change]})"
            found.append(Mutant(name, file, function, functools.partial(_changed, text, function, index, number)))
    return found


def _changed(text: str, function: str, index: int, number: int) -> str:
    tree = ast.parse(text)
    node = list(_changeable(tree, ""))[index][1]
    return ast.unparse(_replaced(tree, node, list(_changes(node, _bound(tree, function)))[number]))


def _bound(tree: ast.Module, function: str) -> set[str]:
    """The names that are given a value in a function of the module: no other name can take a name's place."""
    top = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function]
    nodes = [node for each in top for node in ast.walk(each)]
    stored = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    return stored | {node.arg for node in nodes if isinstance(node, ast.arg)}


def _changeable(node: ast.AST, function: str) -> Iterator[tuple[str, ast.expr]]:
    """(function, expression) of all expressions that compute: no imports, annotations, checks or docstrings."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "names", "decorator_list"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or _is_check(child) or _is_alias(child):
                continue
            inside = child.name if isinstance(child, ast.FunctionDef) and not function else function
            if isinstance(child, ast.expr):
                yield inside, child
            yield from _changeable(child, inside)


def _is_check(node: ast.AST) -> bool:
    refuses = isinstance(node, ast.If) and any(isinstance(inner, ast.Raise) for inner in node.body)
    named = isinstance(node, ast.FunctionDef) and node.name.startswith("_check")
    called = isinstance(node, ast.Expr) and "_check" in ast.unparse(node)
    return refuses or named or called or isinstance(node, ast.Raise | ast.Import | ast.ImportFrom)


def _is_alias(node: ast.AST) -> bool:
    return isinstance(node, ast.AnnAssign) and ast.unparse(node.annotation) == "TypeAlias"


def _changes(node: ast.expr, bound: set[str]) -> Iterator[ast.expr]:
    """The expressions to put in the place of `node`, in a function with these names."""
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not isinstance(node.value, bool):
        yield ast.Constant(node.value + 1 if isinstance(node.value, int) else node.value * 1.1 + 0.01)
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
        yield from (ast.Name(other, ast.Load()) for other in SWAPS.get(node.id, ()) if other in bound)
    if isinstance(node, ast.Attribute):
        for other in SWAPS.get(node.attr, ()):
            yield ast.Attribute(node.value, other, ast.Load())
    if isinstance(node, ast.BinOp | ast.BoolOp):
        yield from (_with(node, op=other()) for other in OPERATORS.get(type(node.op), ()))
    if isinstance(node, ast.BinOp) and not isinstance(node.op, ast.Pow | ast.BitOr):
        yield from (node.left, node.right)
    if isinstance(node, ast.Compare):
        yield from (_with(node, ops=[other()]) for other in OPERATORS.get(type(node.ops[0]), ()))
    if isinstance(node, ast.UnaryOp):
        yield node.operand
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "jnp.where":
        yield from node.args[1:]


def _with(node: Any, **fields: Any) -> Any:
    changed = copy.copy(node)
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed


def _replaced(tree: ast.AST, target: ast.AST, new: ast.AST) -> ast.AST:
    class Replace(ast.NodeTransformer):
        def visit(self, node):
            return new if node is target else self.generic_visit(node)

    return ast.fix_missing_locations(Replace().visit(tree))


@contextlib.contextmanager
def package(mutant: Mutant | None) -> Iterator[Any]:
    """`jaxdiff.solver` imported anew, with the mutant in the place of its file."""
    own = {name: module for name, module in sys.modules.items() if (name + ".").startswith(PACKAGE + ".")}
    for name in own:
        del sys.modules[name]
    finder = _Finder(mutant)
    sys.meta_path.insert(0, finder)
    try:
        yield importlib.import_module(PACKAGE)
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if (name + ".").startswith(PACKAGE + ".")]:
            del sys.modules[name]
        sys.modules.update(own)
        jaxdiff.solver = own[PACKAGE]


class _Finder:
    """Finds the modules of the room before the file system does: compiled once, but for the changed one."""

    def __init__(self, mutant: Mutant | None):
        self.mutant = mutant

    def find_spec(self, name, path, target=None):
        inside = (name + ".").startswith(PACKAGE + ".")
        return importlib.util.spec_from_loader(name, self, is_package=name == PACKAGE) if inside else None

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        file = "__init__.py" if module.__name__ == PACKAGE else f"{module.__name__.removeprefix(PACKAGE + '.')}.py"
        changed = self.mutant is not None and self.mutant.file == file
        code = compile(self.mutant.source(), file, "exec") if changed else _code(file)
        exec(code, module.__dict__)


@functools.cache
def _code(file: str) -> Any:
    return compile((ROOM / file).read_text(encoding="utf-8"), file, "exec")


def checks() -> dict[str, Callable[[Any], str | None]]:
    """What a mutant is put to: every solver beside its paper, its derivatives, and the parts that are no solver."""
    derivatives = {name + _DERIVATIVE: case.derivative for name, case in printed.DIFFERENTIATED.items()}
    return {**printed.CASES, **parts.CHECKS, **derivatives}


@functools.cache
def reached(name: str) -> frozenset[tuple[str, str]]:
    """The (file, function) of the room that a check runs; a derivative runs what its values do."""
    if name.endswith(_DERIVATIVE):
        return reached(name.removesuffix(_DERIVATIVE))
    found = set()

    def note(frame, event, _):
        if event == "call" and frame.f_code.co_filename.startswith(str(ROOM)):
            found.add((Path(frame.f_code.co_filename).name, frame.f_code.co_qualname.split(".")[0]))

    check, before = checks()[name], sys.getprofile()
    sys.setprofile(note)
    try:
        complaint = check(solver)
    finally:
        sys.setprofile(before)
    if complaint:
        raise AssertionError(f"the solver itself is off: {name}: {complaint}")
    return frozenset(found)


def concerned(mutant: Mutant) -> Iterator[str]:
    """The checks that run the mutant: those named after its function first, derivatives last."""
    stem = mutant.function or mutant.file.removesuffix(".py")
    for name in sorted(checks(), key=lambda name: (name.endswith(_DERIVATIVE), not name.startswith(stem), len(name))):
        whole = {file for file, _ in reached(name)} if not mutant.function else ()
        if (mutant.file, mutant.function) in reached(name) or mutant.file in whole:
            yield name


def verdict(mutant: Mutant) -> str | None:
    """The first complaint of a check that runs the mutant, or None: it lives. "crash: ..." where it does not run."""
    for name in concerned(mutant):
        with _no_longer_than(LIMIT):
            try:
                with package(mutant) as solvers:
                    complaint = checks()[name](solvers)
            except ImportError:  # no mutant touches an import: the package itself is being changed
                raise
            except Exception as error:  # whatever else a mutant does, it is caught
                complaint = f"{CRASH}{type(error).__name__}: {error}"
        if complaint:
            return f"{name}: {complaint}".splitlines()[0][:160]
    return None


@contextlib.contextmanager
def _no_longer_than(seconds: int) -> Iterator[None]:
    def too_long(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def files() -> list[str]:
    """All files of the room but its front page."""
    return sorted(path.name for path in ROOM.glob("[!_]*.py"))


def main(names: list[str], every: int = 1) -> None:
    """Judge all mutants of the files, or one in `every`, and print who lives, and the share caught."""
    total = caught = crashed = same = 0
    for file in names or files():
        start = time.perf_counter()
        for mutant in mutants(file)[::every]:
            words = verdict(mutant)
            if why := equivalent(mutant):
                same += 1
                if words:
                    print(f"WRONG   {mutant.name}: is named as equivalent ({why}), and is caught [{words}]", flush=True)
                continue
            total, caught, crashed = total + 1, caught + bool(words), crashed + (words is not None and CRASH in words)
            print(f"caught  {mutant.name}  [{words}]" if words else f"LIVES   {mutant.name}", flush=True)
        print(f"        {file}: {time.perf_counter() - start:.0f} s", flush=True)
    share = f"{caught / max(total, 1):.1%}"
    print(f"{caught} of {total} caught, {share}, {crashed} of them as they crash; {same} more are named as equivalent")


if __name__ == "__main__":
    from tests import conftest

    assert conftest
    *few, every = sys.argv[1:] if sys.argv[-2:-1] == ["--every"] else (*sys.argv[1:], "1")
    main([word for word in few if word != "--every"], int(every))
