"""What the solvers share: the two things a network knows, noise from s to t, and where fresh noise comes from."""

import jax.numpy as jnp

from jaxdiff import process
from jaxdiff.denoise import estimate
from jaxdiff.types import Array, Denoiser, Key, PyTree, Schedule


def no_memory(x: Array) -> PyTree:
    """`init` of a one-step solver."""
    return ()


def predict(schedule: Schedule, denoise: Denoiser, x: Array, t: Array) -> tuple[Array, Array]:
    """(x0, eps) at time t > 0."""
    x0 = estimate(denoise(x, t))
    sigma = schedule.sigma(t)
    return x0, (x - schedule.alpha(t) * x0) / jnp.where(sigma > 0, sigma, 1.0)


def lost_snr(schedule: Schedule, t: Array, s: Array) -> Array:
    """var_ts / sigma_t^2 = 1 - SNR_t / SNR_s, without cancellation."""
    return -jnp.expm1(schedule.logsnr(t) - schedule.logsnr(s))


def fresh(key: Key, x: Array, t: Array, s: Array) -> Array:
    """Standard normal noise for the step from t to s, new at every step: the default `noise` of stochastic solvers."""
    return process.normal(key, x.shape, x.dtype)
