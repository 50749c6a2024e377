"""The judge of solvers: given a constructor and what is stated of it, the list of things that are wrong with it.

A deterministic solver is held to the exact probability flow, a stochastic one to the exact laws of what it draws, every
one to its ends, its rows and its types. All of it is float64, and one compilation serves every schedule, grid, step
count and data, so that judging takes about half a second:

    Family    sigma / alpha = a t / (1 - b t),  alpha^p + w sigma^p = 1,  with a, b, w, p as arguments of the jit
    walk      a loop with a traced number of steps over padded times; the same contract as `sample.sample`
"""

import dataclasses
import functools
import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff import process, solver
from jaxdiff.schedule import Base, as_float
from tests.oracles import moments
from tests.oracles.gaussian import Gaussian, Mixture
from tests.oracles.sampling import MEAN, VARIANCE, deviations, reference

MOST = 512  # steps of a walk
VARIANCES = (VARIANCE, 0.06, 0.6)
DRAWS = 3  # in a step, at the most
TOLERANCE = 0.15


@functools.partial(jax.tree_util.register_dataclass, data_fields=["a", "b", "w", "p"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Family(Base):
    """A schedule whose shape is data: p = 2 keeps the variance, p = 1 is a straight flow, w = 0 explodes."""

    a: Any
    b: Any
    w: Any
    p: Any

    def _norm(self, t):
        return ((1 - self.b * t) ** self.p + self.w * (self.a * t) ** self.p) ** (1 / self.p)

    def alpha(self, t):
        t = as_float(t)
        return ((1 - self.b * t) / self._norm(t)).astype(t.dtype)

    def sigma(self, t):
        t = as_float(t)
        return (self.a * t / self._norm(t)).astype(t.dtype)

    def time(self, rho):
        """The t at which sigma / alpha is rho."""
        return rho / (self.a + self.b * rho)

    def _inverse(self, logsnr):
        return self.time(jnp.exp(-logsnr / 2)).astype(logsnr.dtype)


FAMILIES = {
    "vp": Family(1.0, 1.0, 1.0, 2.0),
    "flow": Family(1.0, 1.0, 1.0, 1.0),
    "ve": Family(5.0, 0.0, 0.0, 1.0),
    "skew": Family(3.0, 0.5, 0.3, 1.5),
}
"""The first two have alpha(1) = 0, exactly; all have sigma(0) = 0."""

DATA = {
    "gaussian": ((0.5, 0.25, 0.25), ((MEAN, -0.5),) * 3, ((VARIANCE, 0.06),) * 3),
    "mixture": ((0.5, 0.3, 0.2), ((0.6, -0.5), (-0.7, 0.2), (0.1, 0.9)), ((0.1, 0.15), (0.2, 0.2), (0.3, 0.1))),
}
"""(weights, means, variances); the first has three equal components, that is one Gaussian."""

GRIDS = ("t", "logsnr", "uneven", "full")


@dataclasses.dataclass(frozen=True)
class Facts:
    """What is stated of a solver. `order` None: it is stochastic, the variance it draws wrong by h^weak at most.

    most: the order of its middle steps, where the first steps are of lower order but leave a smaller error.
    kinds: the grids (see `grid`) for which that is stated; more: others, with their `order` and `most`.
    up: it goes from data to noise. long: steps through all noise levels do it no harm.
    gain: the share of the noise of the reverse diffusion that it draws (eta or eta^2), if that is stated.
    calls: of the network in each of the first four steps.
    moves: it changes x and t before it asks; churn: so that sigma / alpha is so many times larger, a function of it.
    noise: it is the posterior q(x_s | x_t, x0) with the estimate for x0, and so much noise (of sigma_t, sigma_s, c).
    loops: it draws in loops inside of a step, up to so many times.
    at: for a setting that belongs to the number of steps, the constructor for so many, from that judged.
    """

    order: int | None = None
    most: int | None = None
    weak: int = 1
    kinds: tuple[str, ...] = GRIDS
    more: tuple[tuple[str, int, int], ...] = ()
    up: bool = False
    long: bool = True
    gain: float | None = 1.0
    loops: int = 0
    calls: tuple[int, ...] | None = None
    moves: bool = False
    churn: Callable[[Any], Any] | None = None
    noise: Callable[..., Any] | None = None
    at: Callable[[Any, int], Callable[[Any], Any]] | None = None


def grid(kind: str, family: Family, num_steps: int) -> np.ndarray:
    """Times of one of these kinds, where noise and data mix (full: all times).

    Uniform in "t", "sigma" / alpha or "logsnr"; "uneven": by turns long and short; "start": short at first, so that a
    start of order 1 leaves an error h^4; "full": uniform in t from 1 to 0.
    """
    if kind == "full":
        return np.linspace(1.0, 0.0, num_steps + 1)
    u, high, low = np.linspace(0.0, 1.0, num_steps + 1), 3.0, 0.25
    if kind == "logsnr":
        return family.time(high * (low / high) ** u)
    if kind == "sigma":
        return family.time(high + (low - high) * u)
    if kind == "start":
        return family.time(high * (low / high) ** (u * u))
    if kind == "uneven":
        u[1:-1:2] += 0.3 / num_steps
    return family.time(high) + (family.time(low) - family.time(high)) * u


def walk(
    make: Callable[[Any], Any], schedule: Callable[[Any], Any] = lambda family: family
) -> Callable[..., jax.Array]:
    """The jitted run(key, family, data, x, times, num_steps) -> x of `make(schedule(family))`."""

    def run(key, family, data, x, times, num_steps):
        used = schedule(family)
        solve, denoise = make(used), Mixture(used, *data).denoise
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(x.shape[0]))

        def body(n, carry):
            own = jax.vmap(jax.random.fold_in, (0, None))(keys, n)
            return solve.step(own, denoise, carry[0], times[n], times[n + 1], carry[1])

        return jax.lax.fori_loop(0, num_steps, body, (x, solve.init(x)))[0]

    return jax.jit(run)


def padded(times: np.ndarray) -> jax.Array:
    return jnp.asarray(np.append(times, np.full(MOST + 1 - len(times), times[-1])), jnp.float64)


@functools.cache
def problems() -> list[tuple[Any, ...]]:
    """(family's name, data's name, kind of range, data, x at its start, the exact x at its end)."""
    found = []
    solve = jax.jit(lambda f, data, x, t, s: reference(f, Mixture(f, *data).denoise, x, t, s, 1000))
    noise = np.random.default_rng(0).standard_normal((4, 2))
    for name, family in FAMILIES.items():
        for data_name, data in DATA.items():
            for kind in ("smooth", "full"):
                times = grid("t" if kind == "smooth" else kind, family, 1)
                x = jnp.asarray(noise) * family.sigma(times[0])
                arrays = tuple(jnp.asarray(part, jnp.float64) for part in data)
                found.append((name, data_name, kind, arrays, x, solve(family, arrays, x, *times)))
    return found


def _churned(make, num_steps):
    """EDM's S_churn = 10 in so many steps."""
    return functools.partial(make.func, **{**make.keywords, "gamma": 10 / num_steps})


_EQUAL = ("t", "logsnr", "full")
STATED = {
    "ddim_inversion": Facts(order=1, up=True, kinds=("t", "logsnr", "uneven")),
    "ddpm": Facts(noise=lambda sigma_t, sigma_s, c: sigma_s * np.sqrt(c)),
    "ddim_eta1": Facts(noise=lambda sigma_t, sigma_s, c: sigma_s * np.sqrt(c)),
    "ddpm_large": Facts(noise=lambda sigma_t, sigma_s, c: sigma_t * np.sqrt(c)),
    "midpoint": Facts(order=2, most=3),  # 3 for a Gaussian on straight lines, whose variance is quadratic in t
    "dpmpp_3m": Facts(order=3, more=(("start", 3, 3),)),
    "unipc_2": Facts(order=3, more=(("start", 3, 3),)),
    "unipc_3": Facts(order=3, most=4, more=(("start", 4, 4),)),
    "deis_3": Facts(order=3, more=(("start", 3, 3),)),
    "lms": Facts(order=2, most=4, more=(("start", 4, 4),)),
    "plms": Facts(calls=(2, 1, 1, 1), order=2, most=4, kinds=_EQUAL, more=(("sigma", 3, 4),)),
    "pndm": Facts(calls=(4, 4, 4, 1), order=2, most=4, long=False, kinds=_EQUAL, more=(("sigma", 4, 4),)),
    "ipndm": Facts(order=2, most=4, kinds=_EQUAL, more=(("sigma", 2, 4),)),
    "dpmpp_2m_sde": Facts(weak=2),
    "dpmpp_3m_sde": Facts(weak=2),
    "dpmpp_sde": Facts(weak=2),
    "sa_solver": Facts(weak=2),
    "heun_churn": Facts(weak=2, gain=None, churn=lambda rho: 1.2, at=_churned),
    "heun_churn_range": Facts(weak=2, gain=None, churn=lambda rho: 1.2 if 0.4 < rho < 0.9 else 1.0, at=_churned),
    "dpm2": Facts(order=2, long=False),  # its points are uniform in log-SNR, its weights in sigma / alpha
    "dpmpp_2m_sde_half": Facts(weak=2, gain=0.5),
    "sa_solver_flow": Facts(order=2, most=3, kinds=("logsnr", "full")),
    "predictor_corrector": Facts(gain=None),
    "annealed_langevin": Facts(gain=None, loops=10, moves=True),
    "restart": Facts(gain=None, loops=3 * 7),
}
"""Of solvers of which more is to be said than `solver.ORDER` does."""

SETTINGS: dict[str, Callable[[Any], Any]] = {
    "ddim_inversion": solver.ddim_inversion,
    "heun_churn_range": functools.partial(solver.heun, gamma=0.2, sigma_range=(0.4, 0.9)),
    "dpmpp_2m_sde_half": functools.partial(solver.dpmpp_2m_sde, eta=0.5),
    "sa_solver_flow": functools.partial(solver.sa_solver, tau=0.0),
}
"""Settings that `solver.ALL` does not list, and the solver that goes up."""


def stated(name: str) -> Facts:
    """The facts of a solver of `solver.ALL` or of `SETTINGS`."""
    return STATED.get(name, Facts(order=solver.ORDER.get(name)))


def judge(make: Callable[[Any], Any], facts: Facts) -> list[str]:
    """All that is wrong with the solver `make(schedule)`, in words. An empty list is a good solver."""
    return list(complaints(make, facts))


def complaints(make: Callable[[Any], Any], facts: Facts) -> Iterator[str]:
    """One complaint after the other, the cheapest first."""
    with jax.enable_x64(True):
        yield from _types(make)
        run = walk(make)
        if facts.up:
            yield from _order(run, facts)
            yield from _asks_above(make)
            yield from _comes_back(run)
            return
        yield from _ends(run)
        yield from _rows(run, facts.order is not None)
        if facts.order is None:
            yield from _noise_times(make, facts)
            yield from _looped(make, facts) if facts.loops else _laws_and_draws(make, run, facts)
        else:
            yield from _order(run, facts)
            yield from _distance(run)
            if facts.long:
                yield from _long_steps(run)
        yield from _clean_end(make, facts)


def _types(make) -> Iterator[str]:
    """x and memory keep their shapes and types, in float32 and in float64."""
    solve = make(FAMILIES["vp"])
    for dtype in (jnp.float32, jnp.float64):
        x, time = jnp.zeros((2, 3), dtype), jnp.asarray(0.5, dtype)
        keys = jax.random.split(jax.random.key(0), 2)
        before = x, solve.init(x)
        step = lambda x, t, s, m, k=keys: solve.step(k, lambda x, t: 0.5 * x, x, t, s, m)  # noqa: E731
        after = jax.eval_shape(step, x, time, time, before[1])
        told, found = (jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree) for tree in (before, after))
        if told != found:
            yield f"a step in {x.dtype} makes {found} of {told}"


def _clean_end(make, facts) -> Iterator[str]:
    """The step to sigma = 0 asks once and returns what it was told, whatever came before."""
    family = FAMILIES["vp"]  # sigma / alpha = t / (1 - t)
    solve, asked, counts = make(family), [], []

    def denoise(x, t):
        asked.append((x, t))
        return jnp.sin(7 * x)  # no formula could undo this by accident

    x = jnp.asarray([[0.3, -1.2], [0.7, 0.1]])
    memory = solve.init(x)
    with jax.disable_jit():
        for n, (t, s) in enumerate(itertools.pairwise([0.6, 0.5, 0.4, 0.3, 0.25, 0.0])):
            counts.append(len(asked))
            asked.clear()
            before, keys = x, jax.random.split(jax.random.key(n), 2)
            x, memory = solve.step(keys, denoise, x, jnp.asarray(t), jnp.asarray(s), memory)
            start = t if facts.churn is None else family.time(facts.churn(t / (1 - t)) * t / (1 - t))
            if not facts.moves and not np.isclose(asked[0][1], start, rtol=1e-12):
                yield f"a step from t = {t} asks first at t = {asked[0][1]}, not {start}"
            if not facts.moves and facts.churn is None and not np.array_equal(asked[0][0], before):
                yield f"a step from t = {t} does not ask at its start"
    if facts.calls is not None and tuple(counts[1:]) != facts.calls:
        yield f"calls the network {counts[1:]} times, not {facts.calls}"
    if len(asked) != 1 or not np.allclose(x, jnp.sin(7 * asked[-1][0]), atol=1e-9):
        yield f"the step to sigma = 0 asks {len(asked)} times, or does not return what it is told"


def _asks_above(make) -> Iterator[str]:
    """On the way up the network is asked at the end of a step: at its start there may be no noise."""
    asked = []
    with jax.disable_jit():
        solve, x = make(FAMILIES["vp"]), jnp.ones((2, 1))
        denoise = lambda x, t: (asked.append(t), 0.5 * x)[1]  # noqa: E731
        solve.step(jax.random.split(jax.random.key(0), 2), denoise, x, jnp.zeros(()), jnp.asarray(0.3), solve.init(x))
    if asked != [0.3]:
        yield f"a step from t = 0 up to 0.3 asks at {asked}"


def _comes_back(run) -> Iterator[str]:
    """Up, and down again by DDIM: where it started, to order 2."""
    down = walk(solver.ddim)
    for name, data_name, reach, data, _, x in problems():
        if reach == "smooth":
            errors = []
            for num_steps in (256, 512):
                times = grid("logsnr", FAMILIES[name], num_steps)
                up = run(jax.random.key(0), FAMILIES[name], data, x, padded(times[::-1]), num_steps)
                back = down(jax.random.key(0), FAMILIES[name], data, up, padded(times), num_steps)
                errors.append(float(jnp.abs(back - x).max()))
            found = float(np.log2(errors[0] / errors[1]))
            if not found > 2 - TOLERANCE:
                yield f"comes back with order {found:.2f}, not 2, on {name}, {data_name} (error {errors[1]:.1e})"


def _ends(run) -> Iterator[str]:
    """Finite from alpha = 0 to sigma = 0 in 1, 2, 3 and 10 steps."""
    for name, data_name, kind, data, x, _ in problems():
        if kind != "full":
            continue
        for num_steps in (1, 2, 3, 10):
            times = grid(kind, FAMILIES[name], num_steps)
            if not np.isfinite(run(jax.random.key(0), FAMILIES[name], data, x, padded(times), num_steps)).all():
                yield f"not finite from t = 1 to 0 in {num_steps} steps on {name}, {data_name}"


def _rows(run, deterministic: bool) -> Iterator[str]:
    """A row does not feel the others; the key matters exactly where noise is drawn."""
    name, _, _, data, x, _ = problems()[0]
    times = padded(grid("t", FAMILIES[name], 10))
    one, other = (run(jax.random.key(0), FAMILIES[name], data, x * f, times, 10) for f in _factors(x))
    if not np.array_equal(one[0], other[0]):
        yield "rows are not independent of each other"
    if np.array_equal(one, run(jax.random.key(1), FAMILIES[name], data, x, times, 10)) != deterministic:
        yield "draws noise" if deterministic else "draws no noise"


def _factors(x):
    other = np.ones_like(x)
    other[1:] = [[5.0], [-3.0], [0.1]]
    return np.ones_like(x), other


def _order(run, facts) -> Iterator[str]:
    """The slope of log error, the largest of all rows and data, where a smaller error may pass through 0 by chance."""
    stated = dict.fromkeys(facts.kinds, (facts.order, facts.most or facts.order))
    for kind, (least, most) in (stated | {kind: orders for kind, *orders in facts.more}).items():
        for name, family in FAMILIES.items():
            if kind == "full" and name not in ("vp", "flow"):
                continue  # equal steps in t are too long near sigma = 0 to show an order
            errors = []
            for num_steps in (256, 512):
                times = padded(grid(kind, family, num_steps))
                cases = [case[3:] for case in problems() if case[0] == name and (case[2] == "full") == (kind == "full")]
                if facts.up:
                    times, cases = times[num_steps::-1], [(data, end, x) for data, x, end in cases]
                    times = padded(np.asarray(times))
                ends = [(run(jax.random.key(0), family, data, x, times, num_steps), end) for data, x, end in cases]
                errors.append(max(float(jnp.abs(found - end).max()) for found, end in ends))
            found = float(np.log2(errors[0] / errors[1]))
            if not _right(found, kind, least, most):
                yield f"order {found:.2f}, not {least}, on {name}, grid {kind} (error {errors[1]:.1e})"


def _right(found, kind, least, most):
    if kind == "full" and least > 1:
        # Down to sigma = 0, where the last step is Euler's, with a factor log h for methods in steps of log-SNR.
        return found > 1.5
    return least - TOLERANCE <= found <= most + TOLERANCE


def _distance(run) -> Iterator[str]:
    """In 64 steps not farther from the exact end than Euler's method is."""
    for name, data_name, reach, data, x, truth in problems():
        kind = "logsnr" if reach == "smooth" else "full"
        times = grid(kind, FAMILIES[name], 64)
        end = run(jax.random.key(0), FAMILIES[name], data, x, padded(times), 64)
        found, bound = (float(jnp.abs(value - truth).max()) for value in (end, _euler(name, data_name, kind)))
        if not found <= bound * (1 + 1e-9):
            yield f"error {found:.1e} in 64 steps, Euler's is {bound:.1e}, on {name}, {data_name}, grid {kind}"


def _long_steps(run) -> Iterator[str]:
    """Through all noise levels in steps of 1.8, 3, 15 in log-SNR: not much farther from the end than Euler's method."""
    for name, (num_steps, reach, factor) in itertools.product(
        ("vp", "flow"), ((12, 5.4, 1.001), (8, 6.0, 1.001), (4, 15.0, 2.0))
    ):
        times = FAMILIES[name].time(np.exp(np.linspace(reach, -reach, num_steps + 1)))
        data, x, truth = next(case[3:] for case in problems() if case[:3] == (name, "gaussian", "full"))
        end = run(jax.random.key(0), FAMILIES[name], data, x, padded(times), num_steps)
        bound = factor * float(jnp.abs(_euler_over(name, data, x, times) - truth).max())
        if not float(jnp.abs(end - truth).max()) <= bound:
            yield f"in {num_steps} long steps on {name} farther from the end than {bound:.1e}"


@functools.cache
def _euler(name, data_name, kind, num_steps=64):
    """The end of Euler's method for dx = x0 dalpha + eps dsigma, written out."""
    reach = "full" if kind == "full" else "smooth"
    data, x = next(p[3:5] for p in problems() if p[:3] == (name, data_name, reach))
    return _euler_over(name, data, x, grid(kind, FAMILIES[name], num_steps))


def _euler_over(name, data, x, times):
    family = FAMILIES[name]
    alphas, sigmas = (np.asarray(f(jnp.asarray(times))) for f in (family.alpha, family.sigma))
    denoise = jax.jit(Mixture(family, *data).denoise)
    for n in range(len(times) - 1):
        x0 = denoise(x, times[n])
        x = x + (alphas[n + 1] - alphas[n]) * x0 + (sigmas[n + 1] - sigmas[n]) / sigmas[n] * (x - alphas[n] * x0)
    return x


def _laws_and_draws(make, run, facts) -> Iterator[str]:
    law_run = law_walk(make)
    if facts.noise is not None:
        yield from _kernel(law_run, facts)
    yield from _laws(make, law_run, facts)
    yield from _draws(run, law_run)


def _noise_times(make, facts) -> Iterator[str]:
    """Where noise can be given, it is asked for from the start of the step to its end; for moves, at its end."""
    plain = make.func if isinstance(make, functools.partial) else make
    if "noise" not in inspect.signature(plain).parameters:
        return
    spans = []

    def noise(key, x, t, s):
        spans.append((float(t), float(s)))
        return process.normal(key, x.shape, x.dtype)

    with jax.disable_jit():
        solve, x, keys = functools.partial(make, noise=noise)(FAMILIES["vp"]), jnp.zeros((2, 1)), jnp.arange(2)
        keys = jax.vmap(jax.random.key)(keys)
        solve.step(keys, lambda x, t: 0.5 * x, x, jnp.asarray(0.7), jnp.asarray(0.4), solve.init(x))
    if not (spans and spans[0][0] == (0.4 if facts.moves else 0.7) and spans[-1][1] == 0.4):
        yield f"asks for noise over {spans} in a step from 0.7 to 0.4"


def _kernel(law_run, facts) -> Iterator[str]:
    """The law of one step:  x_s = alpha_s c D + (sigma_s / sigma_t) sqrt(1 - c) x_t + noise,  c = 1 - SNR_t / SNR_s."""
    for name, family in FAMILIES.items():
        t, s = np.asarray(0.7), np.asarray(0.4)
        (alpha, sigma), (alpha_s, sigma_s) = ((float(family.alpha(u)), float(family.sigma(u))) for u in (t, s))
        c = 1 - (alpha * sigma_s / (sigma * alpha_s)) ** 2
        total = alpha**2 * np.asarray(VARIANCES) + sigma**2
        gain = alpha_s * c * alpha * np.asarray(VARIANCES) / total + sigma_s / sigma * np.sqrt(1 - c)
        law = exact_law(law_run, family, np.asarray([t, s]))
        exact = gain**2 * total + facts.noise(sigma, sigma_s, c) ** 2
        if not (np.allclose(law.gain, gain, rtol=1e-9) and np.allclose(law.variance, exact, rtol=1e-9)):
            yield f"one step has not the law that is printed for it, on {name}"


def _looped(make, facts) -> Iterator[str]:
    """The exact variance is within 5 % of the data's. Its moves have a size of their own: more steps do not help."""
    for name in ("vp", "ve"):
        times = grid("logsnr", FAMILIES[name], 48)
        error = moments.law_errors(make(FAMILIES[name]), FAMILIES[name], [times], draws=48 * facts.loops)[0]
        bound = 0.05 * moments.true_law(FAMILIES[name], times[0], times[-1]).variance
        if not (error.mean < 1e-3 and error.variance < bound):
            yield f"mean and variance wrong by {error.mean:.1e} and {error.variance:.1e} on {name}"


def _laws(make, law_run, facts) -> Iterator[str]:
    """The exact mean and gain go to those of the reverse diffusion, the variance to that of the data as h^weak."""
    coarse = 96
    runs = [law_run if facts.at is None else law_walk(facts.at(make, n)) for n in (coarse, 2 * coarse)]
    for name, family in FAMILIES.items():
        for kind in ("t", "uneven"):
            errors = []
            for run, num_steps in zip(runs, (coarse, 2 * coarse), strict=True):
                times = grid(kind, family, num_steps)
                law, truth = exact_law(run, family, times), true_law(family, times[0], times[-1], facts.gain or 1.0)
                errors.append([float(np.abs(a - b).max()) for a, b in zip(law, truth, strict=True)])
            yield from _shrinks(f"{name}, grid {kind}", *errors, facts)


def _shrinks(where, coarse, fine, facts) -> Iterator[str]:
    for what, first, second in zip(moments.Law._fields, coarse, fine, strict=True):
        if second < 1e-9 or (what == "gain" and facts.gain is None):
            continue
        found, stated = float(np.log2(first / second)), facts.weak if what == "variance" else 1
        if not found > stated - TOLERANCE:
            yield f"order {found:.2f} of the {what}, not {stated}, on {where} (error {second:.1e})"


@functools.cache
def true_law(family, t, s, share=1.0) -> moments.Law:
    """`moments.true_law` for each of `VARIANCES`, with a share of the noise of the reverse diffusion.

    The logarithm of the gain is linear in the share; with none, the gain is that of the flow.
    """
    data, zero = Gaussian(family, MEAN, VARIANCES), jnp.zeros((1, len(VARIANCES)), jnp.float64)
    mean, variance = data.moments(zero, s)
    all_of_it, none = (f(zero + 1, t, s) - f(zero, t, s) for f in (lambda *a: data.reverse(*a)[0], data.flow))
    gain = all_of_it**share * none ** (1 - share)
    return moments.Law(*(np.asarray(part)[0] for part in (mean, variance, gain)))  # pyright: ignore


def law_walk(make: Callable[[Any], Any]) -> Callable[..., jax.Array]:
    """The jitted run(family, x, basis, times, num_steps) -> x, in which draw k of step n is a column of `basis`.

    As `moments.exact_laws`, but without a call of the host in each draw, for solvers that do not draw in loops.
    """

    def run(family, x, basis, times, num_steps):
        solve, denoise = make(family), Gaussian(family, MEAN, VARIANCES).denoise
        keys = jax.random.split(jax.random.key(0), x.shape[0])

        def body(n, carry):
            drawn = []

            def column(key, shape, dtype=jnp.float32):
                drawn.append(basis[:, n * DRAWS + len(drawn)])
                assert len(drawn) <= DRAWS, f"more than {DRAWS} draws in a step"
                return jnp.broadcast_to(drawn[-1][:, None].astype(dtype), shape)

            with mock.patch.object(process, "normal", column):
                own = jax.vmap(jax.random.fold_in, (0, None))(keys, n)
                return solve.step(own, denoise, carry[0], times[n], times[n + 1], carry[1])

        return jax.lax.fori_loop(0, num_steps, body, (x, solve.init(x)))[0]

    return jax.jit(run)


def exact_law(run: Callable[..., jax.Array], family: Family, times: np.ndarray) -> moments.Law:
    """The law of x at times[-1] after a `law_walk` from that of the data at times[0], for each of `VARIANCES`."""
    basis, start = _basis()
    values = np.asarray(run(family, start, basis, padded(times), len(times) - 1))
    constant, slopes = values[0], values[1:-1] - values[0]
    mixed = constant + slopes[0] * start[-1] + basis[-1] @ slopes[1:]
    np.testing.assert_allclose(mixed, values[-1], rtol=1e-7, atol=1e-9, err_msg="the run is not affine")
    first = true_law(family, times[0], times[0])
    variance = slopes[0] ** 2 * first.variance + np.sum(slopes[1:] ** 2, 0)
    return moments.Law(constant + slopes[0] * first.mean, variance, slopes[0])  # pyright: ignore


@functools.cache
def _basis():
    basis, start = moments._basis(192 * DRAWS)
    return basis, np.repeat(start, len(VARIANCES), 1)


def _draws(run, law_run) -> Iterator[str]:
    """What is drawn in 4 and in 12 steps has the exact mean and variance of so many steps.

    A right solver is beyond 3 standard errors once in 370 draws: then a second, independent draw decides.
    """
    for num_steps in (4, 12):
        times = np.linspace(0.9, 0.1, num_steps + 1)
        law = exact_law(law_run, FAMILIES["vp"], times)
        if not any((off := _off(run, law, times, seed)) < 3 for seed in (0, 1)):
            yield f"draws in {num_steps} steps are {off:.1f} standard errors away from their law"


def _off(run, law, times, seed):
    """How far 2048 values at times[-1] are from `law`, in standard errors."""
    data, shape = problems()[0][3], problems()[0][4].shape
    first = true_law(FAMILIES["vp"], times[0], times[0])
    xs = first.mean[0] + np.sqrt(first.variance[0]) * np.random.default_rng(seed).standard_normal((512, *shape))
    keys, steps = jax.random.split(jax.random.key(seed), 512), (padded(times), len(times) - 1)
    ends = np.stack([run(key, FAMILIES["vp"], data, x, *steps) for key, x in zip(keys, xs, strict=True)])
    return max(deviations(ends[..., 0].ravel(), law.mean[0], law.variance[0]))
