"""Every schedule and every target as data: one compilation of a solver serves all pairs of them.

    Chosen      the schedule number i of a list, with i an argument of the jit
    any_target  the target number k of TARGETS, likewise
    network     the denoiser of a net that outputs that target for Gaussian data, computing in float32 or bfloat16
    sweep       a solver over all of it, at any number of steps

What a schedule is at the times of the grid comes from outside (`tables`, once for all solvers), as 12 schedules in each
call of the network would be most of the program; at other times it is computed where it is asked.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff import target as targets
from jaxdiff.denoise import from_net
from jaxdiff.schedule import derivative
from jaxdiff.types import Target
from tests.oracles.sampling import MEAN, VARIANCE

TARGETS = (targets.eps, targets.x0, targets.v, targets.score, targets.edm(), targets.velocity)
NAMES = ("alpha", "sigma", "logsnr", "velocity")


def _of(name, schedule, value):
    return jnp.stack(derivative(schedule, value)) if name == "velocity" else getattr(schedule, name)(value)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _all(name, schedules, value):
    """(number of schedules, ...) of values; the two of a velocity stand before the shape of `value`."""
    return jnp.stack([_of(name, schedule, value) for schedule in schedules])


def tables(schedules, times):
    """name -> (number of schedules, ..., len(times)) at all of `times`."""
    return {name: _all(name, schedules, times) for name in NAMES}


class Chosen:
    """schedules[i] with i traced; `known` holds pairs (a time, the values there)."""

    def __init__(self, schedules, i, known=()):
        self.schedules, self.i, self.known = tuple(schedules), i, known

    def value(self, name, t):
        for time, values in self.known:
            if time is t:
                return values[name]
        return _all(name, self.schedules, t)[self.i]

    def alpha(self, t):
        return self.value("alpha", t)

    def sigma(self, t):
        return self.value("sigma", t)

    def logsnr(self, t):
        return self.value("logsnr", t)

    def inverse(self, logsnr):
        return self.value("inverse", logsnr)


def any_target(k):
    """TARGETS[k] with k traced, on a `Chosen` schedule."""

    def row(schedule, t):
        rows = [target.row(schedule, t) for target in TARGETS[:-1]] + [schedule.value("velocity", t)]
        return tuple(jnp.stack(parts)[k] for parts in zip(*rows, strict=True))

    return Target("any", row)


def network(schedule, target, dtype):
    """The denoiser of a network that computes and returns `dtype`, exact but for its rounding."""

    def denoise(x, t):
        def net(x, time):
            alpha, sigma, (a, b) = schedule.alpha(t), schedule.sigma(t), target.row(schedule, t)
            total = alpha**2 * VARIANCE + sigma**2
            parts = (MEAN, alpha * VARIANCE / total, alpha, sigma / total, a, b)
            mean, gain, alpha, slope, a, b = (jnp.asarray(part).astype(dtype) for part in parts)
            centred = x.astype(dtype) - alpha * mean
            return a * (mean + gain * centred) + b * (slope * centred)

        return from_net(net, schedule=schedule, target=target)(x, t)

    return denoise


def walk(make, schedules, denoiser):
    """run(i, k, seeds, x, times, tables, num_steps): `make(schedules[i])` from x sigma(1), with denoiser(used, k)."""

    def run(i, k, seeds, x, times, table, num_steps):
        keys = jax.vmap(jax.random.key)(seeds)

        def body(n, carry):
            at = [(times[m], jax.tree.map(lambda v, m=m: v[i][..., m], table)) for m in (n, n + 1)]
            here = Chosen(schedules, i, at)
            own = jax.vmap(jax.random.fold_in, (0, None))(keys, n)
            return make(here).step(own, denoiser(here, k), carry[0], at[0][0], at[1][0], carry[1])

        x = x * table["sigma"][i][0]
        return jax.lax.fori_loop(0, num_steps, body, (x, make(Chosen(schedules, i)).init(x)))[0]

    return run


def sweep(make, schedules, num_steps):
    """Ends of shape (2, cases, 3, 2) for each of `num_steps`, and the cases (i, k, half).

    The cases are all schedules, targets, and networks of float32 or bfloat16. The two runs share the first row of
    three; the others have another start and another key.
    """

    def denoiser(used, case):
        full, low = (network(used, any_target(case[0]), dtype) for dtype in (jnp.float32, jnp.bfloat16))
        return lambda x, t: jnp.where(case[1], low(x, t), full(x, t))

    cases = [np.ravel(part) for part in np.meshgrid(range(len(schedules)), range(len(TARGETS)), [False, True])]
    over_cases, over_runs = (0, (0, 0), None, None, None, None, None), (None, None, 0, 0, None, None, None)
    run = jax.jit(jax.vmap(jax.vmap(walk(make, schedules, denoiser), over_cases), over_runs))
    x = np.random.default_rng(0).standard_normal((3, 2), np.float32)
    xs, seeds = np.stack([x, x * np.float32([[1], [5], [-3]])]), np.asarray([[0, 1, 2], [0, 6, 7]])
    ends = []
    for n in num_steps:
        times = np.zeros(max(num_steps) + 1, np.float32)
        times[: n + 1] = np.linspace(1, 0, n + 1)
        with jax.debug_key_reuse(False):  # under vmap a cond runs both branches, and the checker sees a key used twice
            ends.append(np.asarray(run(cases[0], tuple(cases[1:]), seeds, xs, times, tables(schedules, times), n)))
    return ends, list(zip(*cases, strict=True))
