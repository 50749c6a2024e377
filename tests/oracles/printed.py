"""Solvers beside their papers: the same problem for a solver of jaxdiff, step by step, and for its paper's formulas.

    Levels     sigma / alpha = a t / (1 - b t),  alpha^p + w sigma^p = 1: a schedule in NumPy, for both sides
    Problem    levels, uneven times, a start, D(x, t) of no special form, a list of normal draws
    papers     tests.oracles.papers: generators of x after each step, float64, written from the papers
    follows    where a solver leaves its paper: in x after a step, or in what it asks of the network, when and how often

Nothing is compiled: conditionals and loops of JAX are taken by Python (`eagerly`), so that a case costs some tens of
milliseconds, and a mutant of a solver (see `sabotage`) about as much.
"""

import contextlib
import functools
import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff import process, solver
from jaxdiff.denoise import LearnedRange, LearnedVariance
from tests.oracles import papers

TOLERANCE = 1e-9
_DRAWS = np.random.default_rng(0).standard_normal((200, 2, 2))
_MOST = 40.0  # |lambda| of a schedule of jaxdiff


class Levels(NamedTuple):
    """A schedule: p = 2 keeps the variance, p = 1 is a straight flow, w = 0 explodes."""

    a: float = 1.0
    b: float = 1.0
    w: float = 1.0
    p: float = 2.0

    def _norm(self, t):
        return ((1 - self.b * t) ** self.p + self.w * (self.a * t) ** self.p) ** (1 / self.p)

    def alpha(self, t):
        return (1 - self.b * t) / self._norm(t)

    def sigma(self, t):
        return self.a * t / self._norm(t)

    def half_logsnr(self, t):
        """lambda = log(alpha / sigma), within +-40."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.clip(np.log(np.asarray(1 - self.b * t)) - np.log(np.asarray(self.a * t)), -_MOST, _MOST)

    def rho(self, t):
        return np.exp(-self.half_logsnr(t))

    def time(self, half_logsnr):
        """The t of a lambda, in [0, 1]."""
        with np.errstate(invalid="ignore", over="ignore"):
            rho = np.exp(-half_logsnr)
            inside = np.clip(rho / (self.a + self.b * rho), 0.0, 1.0)
        return np.where(half_logsnr >= _MOST, 0.0, np.where(half_logsnr <= -_MOST, 1.0, inside))


class Schedule:
    """`Levels` as a schedule of jaxdiff, for arrays with values."""

    def __init__(self, levels: Levels):
        self.levels = levels

    def alpha(self, t):
        return jnp.asarray(self.levels.alpha(np.asarray(t)))

    def sigma(self, t):
        return jnp.asarray(self.levels.sigma(np.asarray(t)))

    def logsnr(self, t):
        return jnp.asarray(2 * self.levels.half_logsnr(np.asarray(t)))

    def inverse(self, logsnr):
        return jnp.asarray(self.levels.time(np.asarray(logsnr) / 2))


class Problem:
    """One run: `levels`, `times` and the start `x`; what is asked and drawn is written down."""

    def __init__(self, levels: Levels, times: tuple[float, ...]):
        self.levels, self.times = levels, times
        self.x = np.array([[-0.9, 1.3], [0.4, -1.7]]) * levels.sigma(times[0])
        self.asked: list[tuple[float, np.ndarray]] = []
        self.drawn = 0

    def steps(self) -> Iterator[tuple[float, float]]:
        return itertools.pairwise(self.times)

    def ask(self, x: np.ndarray, t: float) -> np.ndarray:
        """D(x, t)."""
        self.asked.append((float(t), np.array(x)))
        with np.errstate(invalid="ignore"):  # a broken solver may ask anything
            return answer(np, x, t)

    def both(self, x: np.ndarray, t: float) -> tuple[np.ndarray, np.ndarray]:
        """(D, eps)."""
        x0 = self.ask(x, t)
        return x0, (x - self.levels.alpha(t) * x0) / self.levels.sigma(t)

    def draw(self, t: float | None = None, s: float | None = None) -> np.ndarray:
        """The next normal draw; where the caller names its span, it is another one for another span."""
        self.drawn += 1
        return _spanned(_DRAWS[self.drawn - 1], t, s)


def answer(numpy: Any, x: Any, t: Any) -> Any:
    """D(x, t), in NumPy or JAX's."""
    return 0.5 * numpy.sin(1.4 * x + 2.0 * t) + 0.3 * numpy.cos(3.0 * t) + 0.1 * x


def learned(x0: Any) -> Any:
    """What a network with a learned variance answers besides x0."""
    return 0.4 + 0.3 * (jnp if isinstance(x0, jax.Array) else np).cos(5 * x0)


def _spanned(draw: np.ndarray, t: Any, s: Any) -> np.ndarray:
    return draw if t is None else draw * (1 + 0.1 * float(t) + 0.2 * float(s))


VP, FLOW, VE, SKEW = Levels(), Levels(p=1.0), Levels(5.0, 0.0, 0.0, 1.0), Levels(3.0, 0.5, 0.3, 1.5)
WIDE = Levels(w=0.25)  # sigma(1) = 2
MIDDLE = (0.9, 0.78, 0.71, 0.5, 0.42, 0.25, 0.18, 0.05)
WHOLE = (1.0, 0.8, 0.65, 0.5, 0.3, 0.12, 0.0)
PROBLEMS = (
    (VP, MIDDLE),
    (WIDE, WHOLE),
    (SKEW, MIDDLE),
    (VE, (1.0, 0.6, 0.4, 0.15, 0.0)),
    (FLOW, (1.0, 0.3)),
    (VP, (0.6, 0.0)),
    (FLOW, (0.5, 0.4999, 0.3)),
)
"""(levels, times): uneven steps, from alpha = 0 to sigma = 0, single steps, a short one."""
UPWARD = tuple((levels, times[::-1]) for levels, times in PROBLEMS)
AT_HALF = ((FLOW, (0.7, 0.5, 0.3)),)  # sigma / alpha is 1 there, exactly: the edge of a range
FINE = ((VP, (0.5, 0.005, 0.002)),)
LONG = ((FLOW, (0.97, 0.93, 0.005, 0.0)),)
LOW = ((VP, (0.6, 0.3, 0.099, 0.0905, 0.03)),)  # sigma / alpha is 0.11, then 0.0995


@contextlib.contextmanager
def eagerly(both: bool = False) -> Iterator[None]:
    """float64, and `cond`, `fori_loop` and `scan` of JAX taken by Python, so that all values are there.

    both: of a `cond` both branches are taken and one is chosen, as under `vmap`.
    """

    def cond(which, yes, no, *operands):
        if both:
            return jax.tree.map(lambda a, b: jnp.where(which, a, b), yes(*operands), no(*operands))
        return yes(*operands) if bool(which) else no(*operands)

    def fori_loop(low, high, body, carry):
        for i in range(low, high):
            carry = body(jnp.asarray(i), carry)
        return carry

    def scan(body, carry, xs):
        for i in range(len(jax.tree.leaves(xs)[0])):
            carry, _ = body(carry, jax.tree.map(lambda leaf, i=i: leaf[i], xs))
        return carry, None

    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.enable_x64(True))
        stack.enter_context(jax.debug_key_reuse(False))  # told by the draws themselves, and ten times as fast
        for name, ours in (("cond", cond), ("fori_loop", fori_loop), ("scan", scan)):
            stack.enter_context(mock.patch.object(jax.lax, name, ours))
        yield


@functools.cache
def _key_data(n: int) -> np.ndarray:
    return np.asarray(jax.random.key_data(jax.random.split(jax.random.key(n), 2)))


def walk(make: Callable[..., Any], problem: Problem, x: Any, denoise: Callable[..., Any]) -> tuple[list[Any], int]:
    """x after each step of `make(schedule, noise)`, and the number of draws. Call in `eagerly`.

    A draw is told by its key: one key used twice is one draw.
    """
    numbers: dict[bytes, int] = {}

    def noise(key, x, t, s):
        number = numbers.setdefault(np.asarray(jax.random.key_data(key)).tobytes(), len(numbers))
        return jnp.asarray(_spanned(_DRAWS[number], t, s))

    def normal(key, shape, dtype):
        return jnp.broadcast_to(noise(key, None, None, None), shape).astype(dtype)

    with mock.patch.object(process, "normal", normal):
        solve, xs = make(Schedule(problem.levels), noise), []
        memory = solve.init(x)
        for n, (t, s) in enumerate(problem.steps()):
            keys = jax.random.wrap_key_data(jnp.asarray(_key_data(n)))
            x, memory = solve.step(keys, denoise, x, jnp.asarray(t), jnp.asarray(s), memory)
            xs.append(x)
    return xs, len(numbers)


class Case(NamedTuple):
    """make(solvers, schedule, noise) -> a solver, from a package of solvers; its paper; what D is wrapped into.

    both: derivatives are asked for with both branches of all conditionals taken, as `vmap` does.
    """

    make: Callable[..., Any]
    paper: Callable[[Problem], Iterator[np.ndarray]]
    problems: tuple[tuple[Levels, tuple[float, ...]], ...] = PROBLEMS
    wrap: Callable[..., Any] = jnp.asarray
    both: bool = True

    def __call__(self, solvers: Any) -> str | None:
        """Where the solver leaves its paper, in words, or None: it never does."""
        drawn = printed = 0
        for levels, times in self.problems:
            ours, theirs = Problem(levels, times), Problem(levels, times)
            denoise = lambda x, t, ours=ours: self.wrap(jnp.asarray(ours.ask(np.asarray(x), float(t))))  # noqa: E731
            with eagerly():
                xs, draws = walk(functools.partial(self.make, solvers), ours, jnp.asarray(ours.x), denoise)
            if words := _difference(xs, list(self.paper(theirs)), ours.asked, theirs.asked):
                return f"{words}, on {levels}, times {times}"
            drawn, printed = drawn + draws, printed + theirs.drawn
        return f"draws {drawn} times, and has no noise" if drawn and not printed else None

    def derivative(self, solvers: Any) -> str | None:
        """Whether the derivative by x, from alpha = 0 to sigma = 0, is that of the values."""
        for levels, times in self.problems[1:2]:
            problem = Problem(levels, times[::2])

            def end(x, problem=problem):
                denoise = lambda x, t: self.wrap(answer(jnp, x, t))  # noqa: E731
                return (
                    walk(functools.partial(self.make, solvers), problem, x, denoise)[0][-1] * jnp.asarray(_DRAWS[-1])
                ).sum()

            with eagerly(self.both):
                x, along = jnp.asarray(problem.x), jnp.asarray(_DRAWS[-2])
                found = float((jax.grad(end)(x) * along).sum())
                right = float(end(x + 1e-5 * along) - end(x - 1e-5 * along)) / 2e-5
            if not np.isclose(found, right, rtol=1e-6, atol=1e-6):
                return f"the derivative is {found}, not {right}, on {levels}, times {times}"
        return None


def _difference(found, right, asked, expected) -> str | None:
    for n, (ours, theirs) in enumerate(zip(map(np.asarray, found), right, strict=True)):
        if not _close(ours, theirs):
            return f"step {n} is {np.abs(ours - theirs).max():.1e} off"
    if len(asked) != len(expected):
        return f"asks {len(asked)} times, not {len(expected)}"
    for (t, x), (right_t, right_x) in zip(asked, expected, strict=True):
        if not (_close(t, right_t) and _close(x, right_x)):
            return f"asks at t = {t}, not at {right_t}, or at another x"
    return None


def _close(a: Any, b: Any) -> bool:
    return bool(np.allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE))


def _given(make: Callable[..., Any], noise: Any) -> dict[str, Any]:
    return {"noise": noise} if "noise" in inspect.signature(make).parameters else {}


def _made(name: str, **settings: Any) -> Callable[..., Any]:
    def make(solvers, schedule, noise):
        build = getattr(solvers, name)
        return build(schedule, **settings, **_given(build, noise))

    return make


def _around(name: str, inner: Callable[..., Any], **settings: Any) -> Callable[..., Any]:
    def make(solvers, schedule, noise):
        return getattr(solvers, name)(schedule, inner(solvers, schedule, noise), **settings, noise=noise)

    return make


def _alike(name: str, paper: Callable[..., Any], problems: Any = PROBLEMS, **settings: Any) -> Case:
    return Case(_made(name, **settings), functools.partial(paper, **settings), problems)


CHURN = {"gamma": 0.25, "noise_scale": 1.05, "sigma_range": (0.3, 2.0)}
CASES: dict[str, Case] = {
    "ddim": _alike("ddim", papers.ddim),
    "ddim_0.6": _alike("ddim", papers.ddim, eta=0.6),
    "ddim_1": _alike("ddim", papers.ddim, eta=1.0),
    "ddpm": Case(_made("ddpm"), papers.ddpm),
    "ddpm_large": Case(_made("ddpm", variance="fixed_large"), functools.partial(papers.ddpm, share=1.0)),
    "ddpm_range": Case(
        _made("ddpm", variance="learned_range"),
        functools.partial(papers.ddpm, share=learned),
        wrap=lambda x0: LearnedRange(x0, learned(x0)),
    ),
    "ddpm_learned": Case(
        _made("ddpm", variance="learned"),
        functools.partial(papers.ddpm, log_variance=learned),
        wrap=lambda x0: LearnedVariance(x0, learned(x0)),
    ),
    "euler_ancestral_rf": _alike("euler_ancestral_rf", papers.euler_ancestral_rf),
    "euler_ancestral_rf_0.4": _alike("euler_ancestral_rf", papers.euler_ancestral_rf, eta=0.4),
    "euler": _alike("euler", papers.euler),
    "euler_churn": _alike("euler", papers.euler, **CHURN),
    "euler_churn_everywhere": _alike("euler", papers.euler, FINE, gamma=0.4),
    "heun": _alike("heun", papers.heun),
    "heun_churn": _alike("heun", papers.heun, **CHURN),
    "heun_churn_from": _alike("heun", papers.heun, AT_HALF, gamma=0.4, sigma_range=(1.0, 9.0)),
    "heun_churn_to": _alike("heun", papers.heun, AT_HALF, gamma=0.4, sigma_range=(0.1, 1.0)),
    "heun_churn_everywhere": _alike("heun", papers.heun, (*PROBLEMS, *FINE), gamma=0.4),
    "midpoint": _alike("midpoint", papers.midpoint),
    "dpm2": _alike("dpm2", papers.dpm2),
    "dpmpp_2s": _alike("dpmpp_2s", papers.dpmpp_2s),
    "dpmpp_2m": _alike("dpmpp_2m", papers.dpmpp_2m),
    "dpmpp_3m": _alike("dpmpp_3m", papers.dpmpp_3m),
    "unipc": _alike("unipc", papers.unipc),
    "unipc_3": _alike("unipc", papers.unipc, order=3),
    "unipc_2_bh1": _alike("unipc", papers.unipc, variant="bh1"),
    "unipc_3_bh1": _alike("unipc", papers.unipc, order=3, variant="bh1"),
    "deis_2": _alike("deis", papers.deis, order=2),
    "deis_in_long_steps": _alike("deis", papers.deis, LONG),
    "deis": _alike("deis", papers.deis),
    "lms": _alike("lms", papers.lms),
    "lms_1": _alike("lms", papers.lms, order=1),
    "lms_2": _alike("lms", papers.lms, order=2),
    "lms_3": _alike("lms", papers.lms, order=3),
    "ipndm": _alike("ipndm", papers.pndm),
    "ipndm_1": _alike("ipndm", papers.pndm, order=1),
    "ipndm_2": _alike("ipndm", papers.pndm, order=2),
    "ipndm_3": _alike("ipndm", papers.pndm, order=3),
    "plms": Case(_made("plms"), functools.partial(papers.pndm, start="plms")),
    "pndm": Case(_made("pndm"), functools.partial(papers.pndm, start="pndm")),
    "dpmpp_2m_sde": _alike("dpmpp_2m_sde", papers.dpmpp_2m_sde),
    "dpmpp_2m_sde_0.6": _alike("dpmpp_2m_sde", papers.dpmpp_2m_sde, eta=0.6),
    "dpmpp_2m_sde_0": _alike("dpmpp_2m_sde", papers.dpmpp_2m_sde, eta=0.0),
    "dpmpp_3m_sde": _alike("dpmpp_3m_sde", papers.dpmpp_3m_sde),
    "dpmpp_3m_sde_0.6": _alike("dpmpp_3m_sde", papers.dpmpp_3m_sde, eta=0.6),
    "dpmpp_sde": _alike("dpmpp_sde", papers.dpmpp_sde),
    "dpmpp_sde_0.6": _alike("dpmpp_sde", papers.dpmpp_sde, eta=0.6),
    "sa_solver": _alike("sa_solver", papers.sa_solver),
    "sa_solver_0.7": _alike("sa_solver", papers.sa_solver, tau=0.7),
    "sa_solver_0": _alike("sa_solver", papers.sa_solver, tau=0.0),
    "consistency": _alike("consistency", papers.consistency),
    "tcd": _alike("tcd", papers.tcd),
    "tcd_0": _alike("tcd", papers.tcd, gamma=0.0),
    "tcd_1": _alike("tcd", papers.tcd, gamma=1.0),
    "ddim_inversion": Case(_made("ddim_inversion"), papers.ddim_inversion, UPWARD),
    "annealed_langevin": Case(
        _made("annealed_langevin", step_size=0.3, num_moves=3),
        functools.partial(papers.annealed_langevin, step_size=0.3, count=3),
    ),
    "annealed_langevin_default": Case(_made("annealed_langevin"), papers.annealed_langevin, PROBLEMS[:1]),
    "predictor_corrector": Case(
        _around("predictor_corrector", _made("ddim", eta=1.0), snr=0.3, num_moves=2),
        papers.predictor_corrector(functools.partial(papers.ddim.update, eta=1.0), snr=0.3, count=2),
    ),
    "predictor_corrector_default": Case(
        _around("predictor_corrector", _made("dpmpp_2m")),
        papers.predictor_corrector(papers.dpmpp_2m.update),
        PROBLEMS[:1],
    ),
    "restart": Case(
        _around("restart", _made("heun"), sigma_range=(0.3, 1.6), repeats=2, num_steps=3),
        papers.restart(papers.heun.update, 0.3, 1.6, repeats=2, num_steps=3),
        both=False,  # above its range there is no way up
    ),
    "restart_default": Case(
        _around("restart", _made("dpmpp_2m")), papers.restart(papers.dpmpp_2m.update, 0.1, 0.6, 3, 6), LOW
    ),
    "restart_at_its_edge": Case(
        _around("restart", _made("heun"), sigma_range=(1.0, 2.0), repeats=1, num_steps=2),
        papers.restart(papers.heun.update, 1.0, 2.0, repeats=1, num_steps=2),
        AT_HALF,
    ),
    "restart_stochastic": Case(
        _around("restart", _made("ddim", eta=1.0), sigma_range=(0.5, 3.0), repeats=2, num_steps=2),
        papers.restart(functools.partial(papers.ddim.update, eta=1.0), 0.5, 3.0, 2, 2),
        both=False,
    ),
}
DIFFERENTIATED = {name: case for name, case in CASES.items() if name in (*solver.__all__, "ddpm_range", "heun_churn")}
"""Every solver once."""
