"""One-step methods on the probability flow dx = x0 dalpha + eps dsigma, and EDM's churn."""

from collections.abc import Callable
from math import inf, isfinite

import jax
import jax.numpy as jnp

from jaxdiff import process
from jaxdiff.errors import ConfigError
from jaxdiff.solver.base import no_memory, predict
from jaxdiff.types import Array, Denoiser, Key, PyTree, Schedule, Solver


def euler(
    schedule: Schedule, *, gamma: float = 0.0, noise_scale: float = 1.0, sigma_range: tuple[float, float] = (0.0, inf)
) -> Solver:
    """Euler's method on the probability flow, with EDM's churn; order 1. Without churn it is DDIM at eta = 0.

    Arguments and errors as in `heun`.
    """
    churn = _make_churn(schedule, gamma, noise_scale, sigma_range)

    def step(key: Key, denoise: Denoiser, x: Array, t: Array, s: Array, memory: PyTree) -> tuple[Array, PyTree]:
        x, t = churn(key, x, t)
        x0, eps = predict(schedule, denoise, x, t)
        return schedule.alpha(s) * x0 + schedule.sigma(s) * eps, memory

    return Solver(no_memory, step)


def heun(
    schedule: Schedule, *, gamma: float = 0.0, noise_scale: float = 1.0, sigma_range: tuple[float, float] = (0.0, inf)
) -> Solver:
    """Heun's method with churn (Karras et al. 2022, Algorithm 2), on any schedule; order 2; calls: 2 a step, 1 to 0.

    The trapezoid rule for dx = x0 dalpha + eps dsigma: Algorithm 2 itself where alpha = 1, finite where alpha = 0.
    gamma: EDM's min(S_churn / num_steps, sqrt(2) - 1); noise_scale: S_noise; sigma_range: (S_tmin, S_tmax), in
    sigma / alpha. First the noise is raised by 1 + gamma (at most to that of t = 1), then the network asked.
    Raises ConfigError for a negative or non-finite gamma or noise_scale, or an empty range.
    """
    churn = _make_churn(schedule, gamma, noise_scale, sigma_range)

    def step(key: Key, denoise: Denoiser, x: Array, t: Array, s: Array, memory: PyTree) -> tuple[Array, PyTree]:
        x, t = churn(key, x, t)
        x0, eps = predict(schedule, denoise, x, t)
        alpha_s, sigma_s = schedule.alpha(s), schedule.sigma(s)
        x_s = alpha_s * x0 + sigma_s * eps

        def correct() -> Array:
            x0_s, eps_s = predict(schedule, denoise, x_s, s)
            return (
                x + (alpha_s - schedule.alpha(t)) * (x0 + x0_s) / 2 + (sigma_s - schedule.sigma(t)) * (eps + eps_s) / 2
            )

        return jax.lax.cond(sigma_s > 0, correct, lambda: x_s), memory

    return Solver(no_memory, step)


def midpoint(schedule: Schedule) -> Solver:
    """The midpoint rule (Runge 1895) for dx = x0 dalpha + eps dsigma, midway in t; order 2; calls: 2 a step, 1 to 0.

    Finite where alpha = 0; on straight lines (alpha = 1 - t, sigma = t) it is the midpoint rule for the velocity.
    """

    def step(key: Key, denoise: Denoiser, x: Array, t: Array, s: Array, memory: PyTree) -> tuple[Array, PyTree]:
        x0, eps = predict(schedule, denoise, x, t)
        alpha_s, sigma_s = schedule.alpha(s), schedule.sigma(s)

        def midway() -> Array:
            middle = (t + s) / 2
            x_middle = schedule.alpha(middle) * x0 + schedule.sigma(middle) * eps
            x0_middle, eps_middle = predict(schedule, denoise, x_middle, middle)
            return x + (alpha_s - schedule.alpha(t)) * x0_middle + (sigma_s - schedule.sigma(t)) * eps_middle

        return jax.lax.cond(sigma_s > 0, midway, lambda: alpha_s * x0), memory

    return Solver(no_memory, step)


def dpm2(schedule: Schedule) -> Solver:
    """DPM-Solver-2, r_1 = 1/2 (Lu et al. 2022, Algorithm 1): k-diffusion's sample_dpm_2, on any schedule; order 2.

    eps midway in log-SNR stands for the whole step. Two calls; one in a step to sigma = 0, and in one from alpha = 0
    (there sigma / alpha is infinite): DDIM. `dpmpp_2s` does the same with D, and is the more stable under guidance.
    """

    def step(key: Key, denoise: Denoiser, x: Array, t: Array, s: Array, memory: PyTree) -> tuple[Array, PyTree]:
        x0, eps = predict(schedule, denoise, x, t)
        alpha_t, alpha_s, sigma_s = schedule.alpha(t), schedule.alpha(s), schedule.sigma(s)
        x_s = alpha_s * x0 + sigma_s * eps

        def midway() -> Array:
            middle = schedule.inverse((schedule.logsnr(t) + schedule.logsnr(s)) / 2)
            x_middle = schedule.alpha(middle) * x0 + schedule.sigma(middle) * eps
            _, eps_middle = predict(schedule, denoise, x_middle, middle)
            ratio = alpha_s / jnp.where(alpha_t > 0, alpha_t, 1.0)
            return x_s + (sigma_s - ratio * schedule.sigma(t)) * (eps_middle - eps)

        return jax.lax.cond((sigma_s > 0) & (alpha_t > 0), midway, lambda: x_s), memory

    return Solver(no_memory, step)


def _make_churn(
    schedule: Schedule, gamma: float, noise_scale: float, sigma_range: tuple[float, float]
) -> Callable[[Key, Array, Array], tuple[Array, Array]]:
    """EDM Algorithm 2, lines 4 to 6: more noise, and the time that belongs to it."""
    low, high = sigma_range
    if not (isfinite(gamma) and isfinite(noise_scale) and gamma >= 0 and noise_scale >= 0 and 0 <= low < high):
        raise ConfigError(
            "gamma and noise_scale must be finite and >= 0, and sigma_range = (low, high) with 0 <= low < high; "
            f"got gamma={gamma}, noise_scale={noise_scale}, sigma_range={sigma_range}. Use gamma=0 for no churn."
        )
    if gamma == 0:
        return lambda key, x, t: (x, t)

    def churn(key: Key, x: Array, t: Array) -> tuple[Array, Array]:
        logsnr = schedule.logsnr(t)
        sigma = jnp.exp(-logsnr / 2)
        raised = schedule.inverse(logsnr - 2 * jnp.log1p(jnp.asarray(gamma, t.dtype)))
        t_hat = jnp.where((sigma >= low) & (sigma <= high), jnp.maximum(t, raised), t)
        alpha = schedule.alpha(t)
        ratio = jnp.where(alpha > 0, schedule.alpha(t_hat) / jnp.where(alpha > 0, alpha, 1.0), 1.0)
        added = schedule.sigma(t_hat) ** 2 - (ratio * schedule.sigma(t)) ** 2
        std = noise_scale * jnp.sqrt(jnp.maximum(added, 0.0))
        return ratio * x + std * process.normal(key, x.shape, x.dtype), t_hat

    return churn
