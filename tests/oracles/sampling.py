"""Judging a solver by the truth: its order of convergence, and the moments of what it draws, on Gaussian data."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff import process, sample
from tests.oracles.gaussian import Gaussian

MEAN, VARIANCE = 0.3, 0.25


def smooth_grid(schedule, num_steps, top=4.0):
    """Times uniform in t between log-SNR -top and +top: no singular end, so that a method's theory holds."""
    start, end = (float(schedule.inverse(jnp.asarray(v))) for v in (-top, top))
    return np.linspace(start, end, num_steps + 1)


def flow_error(solver, schedule, times):
    """The largest distance of the solver's end from the exact end of the probability flow; call under x64."""
    data = Gaussian(schedule, (0.3, -0.5, 0.1), (0.25, 1.0, 0.04))
    x = jax.random.normal(jax.random.key(0), (4, 3), jnp.float64) * schedule.sigma(jnp.asarray(times[0]))
    run = jax.jit(lambda x, times: sample.sample(jax.random.key(1), data.denoise, x, times, solver))
    return float(jnp.abs(run(x, jnp.asarray(times)) - data.flow(x, times[0], times[-1])).max())


def order(make_solver, schedule, grid=smooth_grid, num_steps=100):
    """The slope of log error against log step, between num_steps and twice that, in float64."""
    with jax.enable_x64(True):
        solver = make_solver(schedule)
        coarse, fine = (flow_error(solver, schedule, grid(schedule, n)) for n in (num_steps, 2 * num_steps))
    return float(np.log2(coarse / fine))


MOST = 1000


def draw(solver, schedule, times, seed=0, denoise=None):
    """4096 independent draws from N(MEAN, VARIANCE) by the solver with the exact denoiser, as 64 examples of 64."""
    key_prior, key_sample = jax.random.split(jax.random.key(seed))
    x = process.prior(key_prior, schedule, (64, 64))
    padded = np.zeros(MOST + 1, np.float32)
    padded[: len(times)] = times
    run = _runner(solver, denoise or Gaussian(schedule, MEAN, VARIANCE).denoise)
    return np.asarray(run(process.example_keys(key_sample, 64), x, padded, len(times) - 1), np.float64).ravel()


@functools.lru_cache(2)
def _runner(solver, denoise):
    """`sample.sample` with a traced number of steps: one compilation for all of up to MOST."""

    def run(keys, x, times, num_steps):
        def body(n, carry):
            own = jax.vmap(jax.random.fold_in, (0, None))(keys, n)
            return solver.step(own, denoise, carry[0], times[n], times[n + 1], carry[1])

        return jax.lax.fori_loop(0, num_steps, body, (x, solver.init(x)))[0]

    return jax.jit(run)


def deviations(values, mean=MEAN, variance=VARIANCE):
    """How many standard errors the mean and the variance of Gaussian draws are away from the truth."""
    n = len(values)
    return (
        abs(values.mean() - mean) / np.sqrt(variance / n),
        abs(values.var(ddof=1) - variance) / (variance * np.sqrt(2 / (n - 1))),
    )


def reference(schedule, denoise, x, t, s, num_steps=4000):
    """The probability flow from x at time t to time s by Runge-Kutta of order 4, for any denoiser and schedule.

    In the angle u with alpha, sigma = r (cos u, sin u) and y = x / r:  dy/du = eps cos u - D sin u, which is finite and
    smooth on every schedule;  eps = (y - D cos u) / sin u, whose limit at u = 0 is 0 where D is smooth there.
    """
    t, s = jnp.asarray(t, x.dtype), jnp.asarray(s, x.dtype)
    first, last = (jnp.arctan2(schedule.sigma(v), schedule.alpha(v)) for v in (t, s))
    h = (last - first) / num_steps

    def field(u, y):
        time = schedule.inverse(-2 * jnp.log(jnp.maximum(jnp.tan(u), 1e-15)))
        x0 = denoise(y * jnp.hypot(schedule.alpha(time), schedule.sigma(time)), time)
        near = u < 1e-8  # where the difference is all rounding
        eps = jnp.where(near, 0.0, (y - x0 * jnp.cos(u)) / jnp.where(near, 1.0, jnp.sin(u)))
        return eps * jnp.cos(u) - x0 * jnp.sin(u)

    def body(n, y):
        u = first + n * h
        k1 = field(u, y)
        k2 = field(u + h / 2, y + h / 2 * k1)
        k3 = field(u + h / 2, y + h / 2 * k2)
        k4 = field(u + h, y + h * k3)
        return y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)

    radius_t, radius_s = (jnp.hypot(schedule.alpha(v), schedule.sigma(v)) for v in (t, s))
    return jax.lax.fori_loop(0, num_steps, body, x / radius_t) * radius_s
