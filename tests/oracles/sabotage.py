"""Sabotage: break one thing in a solver; is it noticed? `python -m tests.oracles.sabotage [FILE ...] [--every N]`.

A mutant is the source of one file of jaxdiff/solver with one change: a number, an operator, a dropped term or factor, a
comparison, t for s, alpha for sigma, a function of jnp, a branch of `where`. The package is imported anew with it, and
the judge looks at the solvers that run the changed function, until it complains of one. Arguments' checks and their
messages are left alone: they have tests of their own. Mutants that change nothing are named in `EQUIVALENT`, with the
reason, and checked.
"""

import ast
import contextlib
import copy
import functools
import importlib
import itertools
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import jaxdiff
from jaxdiff import solver
from tests.oracles import judge

ROOM = Path(jaxdiff.__file__).parent / "solver"
PACKAGE = "jaxdiff.solver"
LIMIT = 120  # seconds for one solver; who takes longer is caught

OTHERS: dict[str, Callable[[Any], Any]] = {
    "ddim_inversion": lambda solvers: solvers.ddim_inversion,
    "heun_churn_range": lambda solvers: functools.partial(solvers.heun, gamma=0.2, sigma_range=(0.4, 0.9)),
    "euler_churn": lambda solvers: functools.partial(solvers.euler, gamma=0.2),
    "ddim_eta_half": lambda solvers: functools.partial(solvers.ddim, eta=0.5),
    "dpmpp_2m_sde_half": lambda solvers: functools.partial(solvers.dpmpp_2m_sde, eta=0.5),
    "dpmpp_3m_sde_half": lambda solvers: functools.partial(solvers.dpmpp_3m_sde, eta=0.5),
    "dpmpp_sde_half": lambda solvers: functools.partial(solvers.dpmpp_sde, eta=0.5),
    "sa_solver_less": lambda solvers: functools.partial(solvers.sa_solver, tau=0.7),
    "dpmpp_2m_sde_flow": lambda solvers: functools.partial(solvers.dpmpp_2m_sde, eta=0.0),
    "dpmpp_3m_sde_flow": lambda solvers: functools.partial(solvers.dpmpp_3m_sde, eta=0.0),
    "dpmpp_sde_flow": lambda solvers: functools.partial(solvers.dpmpp_sde, eta=0.0),
    "sa_solver_flow": lambda solvers: functools.partial(solvers.sa_solver, tau=0.0),
}
"""Settings that `solver.ALL` does not list, of a package of solvers; see `judge.STATED`."""

EQUIVALENT: dict[str, tuple[str, ...]] = {
    "what is not there yet has weight 0": (
        "dpm.py: dpmpp_2m: jnp.zeros_like -> jnp.ones_like",
        "dpm_sde.py: dpmpp_3m_sde: jnp.zeros_like -> jnp.ones_like",
        "polynomial.py: beyond_first: 0.0 -> 0.01 (2)",
        "polynomial.py: no_past: jnp.zeros_like -> jnp.ones_like",
    ),
    "the edge of a range": ("runge_kutta.py: _make_churn: sigma >= low -> sigma > low",),
    "sigma_s is 0 where it is read": (
        "runge_kutta.py: midpoint: alpha_s * x0 + sigma_s * eps -> alpha_s * x0 - sigma_s * eps",
        "runge_kutta.py: midpoint: eps -> x0 (2)",
        "runge_kutta.py: midpoint: sigma_s * eps -> sigma_s / eps",
    ),
    "a guard against 0 that does not occur there, or is masked": (
        "ancestral.py: ddim_inversion: 1.0 -> 1.11",
        "ancestral.py: ddim_inversion: alpha_t > 0 -> alpha_t >= 0",
        "ancestral.py: ddpm: jnp.where(sigma_s > 0, sigma_s / sigma_t, 1.0) -> sigma_s / sigma_t",
        "ancestral.py: ddpm: sigma_s -> sigma_t",
        "base.py: mix: jnp.where(sigma_t > 0, sigma_t, 1.0) -> sigma_t",
        "base.py: mix: sigma_t -> sigma_s",
        "base.py: predict: jnp.where(sigma > 0, sigma, 1.0) -> sigma",
        "dpm.py: dpmpp_2m: (schedule.sigma(s) > 0) & (h_prev > 0) -> schedule.sigma(s) > 0",
        "dpm.py: dpmpp_2m: 1.0 -> 1.11",
        "dpm.py: dpmpp_2m: h_prev > 0 -> h_prev >= 0",
        "dpm.py: dpmpp_2m: h_prev > 0 -> h_prev >= 0 (2)",
        "polynomial.py: phi: 1.0 -> 1.11",
        "runge_kutta.py: _make_churn: alpha -> sigma (2)",
        "runge_kutta.py: _make_churn: jnp.where(alpha > 0, alpha, 1.0) -> alpha",
        "runge_kutta.py: dpm2: 1.0 -> 1.11",
        "runge_kutta.py: dpm2: alpha_t > 0 -> alpha_t >= 0",
        "runge_kutta.py: dpm2: alpha_t > 0 -> alpha_t >= 0 (2)",
    ),
    "the same in law: noise of the other sign": (
        "ancestral.py: ddpm: mean + jnp.where(s > 0, std, 0.0) * noise(key, x, t, s) -> mean - jnp.where(s > "
        "0, std, 0.0) * noise(key, x, t, s)",
        "runge_kutta.py: _make_churn: ratio * x + std * process.normal(key, x.shape, x.dtype) -> ratio * x - "
        "std * process.normal(key, x.shape, x.dtype)",
    ),
    "only the ratio of two of them is read": (
        "dpm.py: dpmpp_2m: (schedule.logsnr(s) - schedule.logsnr(t)) / 2 -> (schedule.logsnr(s) - schedule.lo"
        "gsnr(t)) * 2",
        "dpm.py: dpmpp_2m: 2 -> 3",
    ),
    "a change below rounding, or a term that is not read": (
        "polynomial.py: : 18 -> 19",
        "polynomial.py: phi: 1 -> 2",
        "polynomial.py: phi: 1 -> 2 (2)",
        "polynomial.py: phi: _TERMS - 1 -> _TERMS",
        "polynomial.py: phi: h < 1 -> h <= 1",
    ),
    "only the type of t is read": ("multistep.py: deis: t -> s (5)",),
    "one number more than is read, or the same number": (
        "dpm.py: dpmpp_3m: 3 -> 4",
        "multistep.py: _adams_bashforth: 0 -> 1",
    ),
}
"""Why -> the mutants (`Mutant.name`, exactly) that are the same solver. The command holds them to it: see `moved`."""

IN_LAW = "the same in law: noise of the other sign"


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
    found, seen = [], {}
    for index, (function, node) in enumerate(_changeable(ast.parse(text), "")):
        for number, new in enumerate(_changes(node)):
            change = f"{file}: {function}: {ast.unparse(node)} -> {ast.unparse(new)}"
            seen[change] = seen.get(change, 0) + 1
            name = change if seen[change] == 1 else f"{change} ({seen[change]})"
            found.append(Mutant(name, file, function, functools.partial(_changed, text, index, number)))
    return found


def _changed(text: str, index: int, number: int) -> str:
    tree = ast.parse(text)
    node = list(_changeable(tree, ""))[index][1]
    return ast.unparse(_replaced(tree, node, list(_changes(node))[number]))


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


def _changes(node: ast.expr) -> Iterator[ast.expr]:
    """The expressions to put in the place of `node`."""
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not isinstance(node.value, bool):
        yield ast.Constant(node.value + 1 if isinstance(node.value, int) else node.value * 1.1 + 0.01)
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
        yield from (ast.Name(other, ast.Load()) for other in SWAPS.get(node.id, ()))
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
    finder = _Finder(mutant) if mutant else None
    try:
        if finder:
            sys.meta_path.insert(0, finder)
        yield importlib.import_module(PACKAGE)
    finally:
        if finder:
            sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if (name + ".").startswith(PACKAGE + ".")]:
            del sys.modules[name]
        sys.modules.update(own)
        jaxdiff.solver = own[PACKAGE]


class _Finder:
    """Finds the changed module before the file system does."""

    def __init__(self, mutant: Mutant):
        self.mutant, self.name = mutant, f"{PACKAGE}.{mutant.file.removesuffix('.py')}"

    def find_spec(self, name, path, target=None):
        return importlib.util.spec_from_loader(name, self) if name == self.name else None

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        exec(compile(self.mutant.source(), self.mutant.file, "exec"), module.__dict__)


@functools.cache
def users() -> dict[tuple[str, str], list[str]]:
    """(file, function) -> the names of the solvers that may run it, those that are judged fastest first."""
    calls = {path.name: _calls(path) for path in sorted(ROOM.glob("[!_]*.py"))}
    found: dict[tuple[str, str], list[str]] = {}
    for name in sorted([*solver.ALL, *OTHERS], key=lambda name: name not in solver.ORDER):
        make = _make(solver, name)
        plain = make.func if isinstance(make, functools.partial) else make
        todo = {plain.__name__} if plain.__name__ != "<lambda>" else set(plain.__code__.co_names)
        reached = {(file, top) for file, tops in calls.items() for top in tops if top in todo}
        while True:
            more = {key for file, top in reached for key in _callees(calls, file, calls[file][top])} - reached
            if not more:
                break
            reached |= more
        for key in reached:
            found.setdefault(key, []).append(name)
    return found


def _calls(path: Path) -> dict[str, set[str]]:
    """function -> all names in it."""
    tops = [node for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef)]
    return {top.name: {node.id for node in ast.walk(top) if isinstance(node, ast.Name)} for top in tops}


def _callees(calls, file: str, names: set[str]) -> Iterator[tuple[str, str]]:
    for name in names:
        homes = [file] if name in calls[file] else [other for other, tops in calls.items() if name in tops]
        yield from ((home, name) for home in homes)


def verdict(mutant: Mutant) -> str | None:
    """The first complaint about any solver that runs the mutant, or None: it lives."""

    def too_long(*_):
        raise TimeoutError

    for name in _names(mutant):
        before = signal.signal(signal.SIGALRM, too_long)
        signal.alarm(LIMIT)
        try:
            with package(mutant) as solvers:
                complaint = next(judge.complaints(_make(solvers, name), judge.stated(name)), None)
        except ImportError:  # no mutant touches an import: the package itself is being changed
            raise
        except Exception as error:  # whatever else a mutant does, it is caught
            complaint = f"{type(error).__name__}: {error}"
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)
        if complaint:
            return f"{name}: {complaint}".splitlines()[0][:160]
    return None


def _make(solvers: Any, name: str) -> Any:
    return solvers.ALL[name] if name in solvers.ALL else OTHERS[name](solvers)


def moved(mutant: Mutant) -> float:
    """How far the mutant's ends are from those of the solver, over all problems of the judge (inf: not finite)."""
    return max((_distance(mutant, name) for name in _names(mutant)), default=float("inf"))


def _distance(mutant: Mutant, name: str) -> float:
    with package(None) as solvers:
        right = _ends(solvers, name)
    with package(mutant) as solvers:
        found = _ends(solvers, name)
    both = np.isfinite(right) == np.isfinite(found)
    return float(np.nanmax(np.abs(found - right) / (1 + np.abs(right)))) if both.all() else float("inf")


def _ends(solvers: Any, name: str) -> np.ndarray:
    up, ends = judge.stated(name).up, []
    with jax.enable_x64(True):
        run = judge.walk(_make(solvers, name))
        for family_name, _, reach, data, x, _ in judge.problems():
            family = judge.FAMILIES[family_name]
            kinds = ("full",) if reach == "full" else ("t", "uneven", "logsnr", "start")
            for kind, num_steps in itertools.product(kinds, (1, 2, 3, 10)):
                times = judge.grid(kind, family, num_steps)[:: -1 if up else 1]
                ends.append(run(jax.random.key(0), family, data, x, judge.padded(times), num_steps).ravel())
    return np.concatenate(ends)


def _names(mutant: Mutant) -> list[str]:
    names = users().get((mutant.file, mutant.function), [])
    if not mutant.function:
        names = list(dict.fromkeys(name for (file, _), some in users().items() if file == mutant.file for name in some))
    return names


def files() -> list[str]:
    """The files of the room that hold solvers of `solver.ALL`."""
    return sorted({file for file, _ in users()})


def main(names: list[str], every: int = 1) -> None:
    """Judge all mutants of the files, or one in `every`, and print who lives, and the share caught."""
    total = caught = same = 0
    for file in names or files():
        for mutant in mutants(file)[::every]:
            if why := equivalent(mutant):
                same += 1
                if why != IN_LAW and not moved(mutant) < 1e-11:
                    print(f"WRONG   {mutant.name}: is named as equivalent, and moves the end", flush=True)
                continue
            words = verdict(mutant)
            total, caught = total + 1, caught + bool(words)
            print(f"caught  {mutant.name}  [{words}]" if words else f"LIVES   {mutant.name}", flush=True)
    print(f"{caught} of {total} caught, {caught / max(total, 1):.1%}; {same} more are named as equivalent")


if __name__ == "__main__":
    from tests import conftest

    assert conftest
    *few, every = sys.argv[1:] if sys.argv[-2:-1] == ["--every"] else (*sys.argv[1:], "1")
    main([word for word in few if word != "--every"], int(every))
