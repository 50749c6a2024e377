"""Judging a solver by the truth: its order of convergence, and the moments of what it draws, on Gaussian data."""

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


def draw(solver, schedule, times, seed=0, denoise=None):
    """4096 independent draws from N(MEAN, VARIANCE) by the solver with the exact denoiser, as 64 examples of 64."""
    denoise = denoise or Gaussian(schedule, MEAN, VARIANCE).denoise
    key_prior, key_sample = jax.random.split(jax.random.key(seed))
    x = process.prior(key_prior, schedule, (64, 64))
    run = jax.jit(lambda key, x, times: sample.sample(key, denoise, x, times, solver))
    return np.asarray(run(key_sample, x, jnp.asarray(times, jnp.float32)), np.float64).ravel()


def deviations(values, mean=MEAN, variance=VARIANCE):
    """How many standard errors the mean and the variance of Gaussian draws are away from the truth."""
    n = len(values)
    return (
        abs(values.mean() - mean) / np.sqrt(variance / n),
        abs(values.var(ddof=1) - variance) / (variance * np.sqrt(2 / (n - 1))),
    )
