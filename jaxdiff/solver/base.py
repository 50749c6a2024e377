"""What the solvers share: the two things a network knows, noise from s to t, and where fresh noise comes from."""

import jax.numpy as jnp

from jaxdiff import process
from jaxdiff.denoise import estimate
from jaxdiff.types import Array, Denoiser, Key, PyTree, Schedule


def no_memory(x: Array) -> PyTree:
    """`init` of a one-step solver."""
    return ()


def no_step(x: Array) -> PyTree:
    """`init` of a method that remembers one answer and the length of its step: a length of 0 is none."""
    return jnp.zeros_like(x), jnp.zeros((), x.dtype)


def predict(schedule: Schedule, denoise: Denoiser, x: Array, t: Array) -> tuple[Array, Array]:
    """(x0, eps) at time t > 0."""
    x0 = estimate(denoise(x, t))
    sigma = schedule.sigma(t)
    return x0, (x - schedule.alpha(t) * x0) / jnp.where(sigma > 0, sigma, 1.0)


def lost_snr(schedule: Schedule, t: Array, s: Array) -> Array:
    """var_ts / sigma_t^2 = 1 - SNR_t / SNR_s, without cancellation."""
    return -jnp.expm1(schedule.logsnr(t) - schedule.logsnr(s))


def half_logsnr_step(schedule: Schedule, t: Array, s: Array) -> Array:
    """h = lambda_s - lambda_t >= 0."""
    return jnp.maximum(schedule.logsnr(s) - schedule.logsnr(t), 0.0) / 2


def over(a: Array, b: Array) -> Array:
    """a / b, and 0 where b is 0."""
    return jnp.where(b > 0, a / jnp.where(b > 0, b, 1.0), 0.0)


def mix(schedule: Schedule, x: Array, x0: Array, t: Array, s: Array, gap: Array, new: Array) -> Array:
    """x_s = alpha_s x0 + sigma_s (k eps + sqrt(1 - k^2) new), k^2 = exp(gap): a share of the noise in x_t stays.

    Every k gives the right x_s where x0 is the data: k = 1 is DDIM, k^2 = SNR_t / SNR_s is DDPM, k = 0 all new.
    """
    sigma_t, sigma_s = schedule.sigma(t), schedule.sigma(s)
    kept = sigma_s / jnp.where(sigma_t > 0, sigma_t, 1.0) * jnp.exp(gap / 2)
    return kept * x + (schedule.alpha(s) - schedule.alpha(t) * kept) * x0 + sigma_s * jnp.sqrt(-jnp.expm1(gap)) * new


def fresh(key: Key, x: Array, t: Array, s: Array) -> Array:
    """Standard normal noise for the step from t to s, new at every step: the default `noise` of stochastic solvers."""
    return process.normal(key, x.shape, x.dtype)
