"""Solvers: pairs (init, step) of pure functions. To add one: a function here, and a row in `ALL`.

    forward process        x_t = alpha_t x0 + sigma_t eps
    what a network knows   x0 = D(x_t, t),  eps = (x_t - alpha_t x0) / sigma_t
    probability flow       dx = x0 dalpha + eps dsigma        (any schedule; no 1 / alpha, so pure noise can start)
    noise from s to t      var_ts = sigma_t^2 - (alpha_t sigma_s / alpha_s)^2 = sigma_t^2 (1 - SNR_t / SNR_s)

A step goes from time t to s < t (only `ddim_inversion` goes up). Where sigma_s = 0 every solver returns D(x_t, t).
Orders of convergence (deterministic ones, smooth grids): see `ORDER`. Notation of times: t = 0 data, t = 1 noise.
"""

from collections.abc import Callable
from functools import partial
from math import inf, isfinite
from typing import Any, cast

import jax
import jax.numpy as jnp

from jaxdiff import process
from jaxdiff.denoise import LearnedRange, estimate
from jaxdiff.errors import ConfigError
from jaxdiff.types import Array, Denoiser, Key, PyTree, Schedule, Solver

_VARIANCES = {"fixed_small": 0.0, "fixed_large": 1.0, "learned_range": None}


def ddpm(schedule: Schedule, *, variance: str = "fixed_small") -> Solver:
    """Ancestral sampling (Ho et al. 2020, Algorithm 2) over any pair of times.

    `variance`: "fixed_small" is that of q(x_s | x_t, x0), "fixed_large" is var_ts (beta_t on DDPM's own grid),
    "learned_range" needs a denoiser that returns `denoise.LearnedRange`. The step to s = 0 adds no noise.
    Raises ConfigError for another variance.
    """
    if variance not in _VARIANCES:
        raise ConfigError(f"variance must be one of {', '.join(_VARIANCES)}; got {variance!r}.")

    def step(key: Key, denoise: Denoiser, x: Array, t: Array, s: Array, memory: PyTree) -> tuple[Array, PyTree]:
        x0, fraction = _with_fraction(denoise(x, t), _VARIANCES[variance])
        mean, _, _ = process.q_posterior(schedule, x0, x, t, s)
        sigma_t, sigma_s = schedule.sigma(t), schedule.sigma(s)
        # fixed small = fixed large * (sigma_s / sigma_t)^2, so a geometric mean of the two is a power of the ratio.
        ratio = jnp.where(sigma_s > 0, sigma_s / sigma_t, 1.0)
        std = sigma_t * jnp.sqrt(_lost_snr(schedule, t, s)) * ratio ** (1 - fraction)
        return mean + jnp.where(s > 0, std, 0.0) * process.normal(key, x.shape, x.dtype), memory

    return Solver(_no_memory, step)


def ddim(schedule: Schedule, *, eta: float = 0.0) -> Solver:
    """DDIM (Song et al. 2021, eq. 12, 16). eta = 0: deterministic, order 1; eta = 1: DDPM with fixed small variance.

    Raises ConfigError unless 0 <= eta <= 1.
    """
    if not 0 <= eta <= 1:
        raise ConfigError(
            f"eta must lie in [0, 1], got {eta}. Use 0 for the deterministic sampler, 1 for DDPM's noise."
        )

    def step(key: Key, denoise: Denoiser, x: Array, t: Array, s: Array, memory: PyTree) -> tuple[Array, PyTree]:
        x0, eps = _predict(schedule, denoise, x, t)
        alpha_s, sigma_s = schedule.alpha(s), schedule.sigma(s)
        if eta == 0:
            return alpha_s * x0 + sigma_s * eps, memory
        fresh = eta**2 * _lost_snr(schedule, t, s)  # the share of sigma_s^2 that is drawn anew
        noise = process.normal(key, x.shape, x.dtype)
        return alpha_s * x0 + sigma_s * (jnp.sqrt(1 - fresh) * eps + jnp.sqrt(fresh) * noise), memory

    return Solver(_no_memory, step)


def ddim_inversion(schedule: Schedule) -> Solver:
    """DDIM run from data to noise (Song et al. 2021, sec. 4.3); order 1. Use it with `sample.invert`.

    The step from t up to s asks the network at (x_t, s): at s the noise is not zero, so clean data (t = 0) can start.
    """

    def step(key: Key, denoise: Denoiser, x: Array, t: Array, s: Array, memory: PyTree) -> tuple[Array, PyTree]:
        _, eps = _predict(schedule, denoise, x, s)
        alpha_t = schedule.alpha(t)
        x0 = (x - schedule.sigma(t) * eps) / jnp.where(alpha_t > 0, alpha_t, 1.0)
        return schedule.alpha(s) * x0 + schedule.sigma(s) * eps, memory

    return Solver(_no_memory, step)


def euler(
    schedule: Schedule, *, gamma: float = 0.0, noise_scale: float = 1.0, sigma_range: tuple[float, float] = (0.0, inf)
) -> Solver:
    """Euler's method on the probability flow, with EDM's churn; order 1. Without churn it is DDIM at eta = 0.

    Arguments and errors as in `heun`.
    """
    churn = _make_churn(schedule, gamma, noise_scale, sigma_range)

    def step(key: Key, denoise: Denoiser, x: Array, t: Array, s: Array, memory: PyTree) -> tuple[Array, PyTree]:
        x, t = churn(key, x, t)
        x0, eps = _predict(schedule, denoise, x, t)
        return schedule.alpha(s) * x0 + schedule.sigma(s) * eps, memory

    return Solver(_no_memory, step)


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
        x0, eps = _predict(schedule, denoise, x, t)
        alpha_s, sigma_s = schedule.alpha(s), schedule.sigma(s)
        x_s = alpha_s * x0 + sigma_s * eps

        def correct() -> Array:
            x0_s, eps_s = _predict(schedule, denoise, x_s, s)
            return (
                x + (alpha_s - schedule.alpha(t)) * (x0 + x0_s) / 2 + (sigma_s - schedule.sigma(t)) * (eps + eps_s) / 2
            )

        return jax.lax.cond(sigma_s > 0, correct, lambda: x_s), memory

    return Solver(_no_memory, step)


def dpmpp_2m(schedule: Schedule) -> Solver:
    """DPM-Solver++(2M) (Lu et al. 2022, Algorithm 2); order 2 in steps of log-SNR; one call a step.

    The first step, and one to sigma = 0 (where the log-SNR is infinite), are of first order, that is DDIM.
    """

    def init(x: Array) -> PyTree:
        # No previous step: its length is infinite, so the weight h / (2 h_prev) of the extrapolation is 0.
        return jnp.zeros_like(x), jnp.asarray(inf, x.dtype)

    def step(key: Key, denoise: Denoiser, x: Array, t: Array, s: Array, memory: PyTree) -> tuple[Array, PyTree]:
        x0_prev, h_prev = memory
        alpha_s, sigma_s = schedule.alpha(s), schedule.sigma(s)
        decay = sigma_s / schedule.sigma(t)
        h = (schedule.logsnr(s) - schedule.logsnr(t)) / 2
        weight = jnp.where((sigma_s > 0) & (h_prev > 0), h / (2 * jnp.where(h_prev > 0, h_prev, 1.0)), 0.0)
        x0 = estimate(denoise(x, t))
        x = decay * x + (alpha_s - schedule.alpha(t) * decay) * (x0 + weight * (x0 - x0_prev))
        return x, (x0, h)

    return Solver(init, step)


ALL: dict[str, Callable[[Schedule], Solver]] = {
    "ddpm": ddpm,
    "ddpm_large": partial(ddpm, variance="fixed_large"),
    "ddim": ddim,
    "ddim_eta1": partial(ddim, eta=1.0),
    "euler": euler,
    "heun": heun,
    "heun_churn": partial(heun, gamma=0.2),
    "dpmpp_2m": dpmpp_2m,
}
"""Every solver that `sample` takes, by name. The oracle tests judge whatever is listed: by its order, or by moments."""

ORDER: dict[str, int] = {"ddim": 1, "euler": 1, "heun": 2, "dpmpp_2m": 2}
"""The order of convergence of the deterministic ones; a solver of `ALL` that is not here is stochastic.

It holds where sigma and alpha are smooth in the grid. Where sigma starts like sqrt(t) (VP, cosine, DDPM's tables), a
grid uniform in t down to t = 0 lowers order 2 towards 1 in its last steps: use `log_snr_grid` or `karras_grid` there.
"""


def _no_memory(x: Array) -> PyTree:
    return ()


def _predict(schedule: Schedule, denoise: Denoiser, x: Array, t: Array) -> tuple[Array, Array]:
    """(x0, eps) at time t > 0."""
    x0 = estimate(denoise(x, t))
    sigma = schedule.sigma(t)
    return x0, (x - schedule.alpha(t) * x0) / jnp.where(sigma > 0, sigma, 1.0)


def _lost_snr(schedule: Schedule, t: Array, s: Array) -> Array:
    """var_ts / sigma_t^2 = 1 - SNR_t / SNR_s, without cancellation."""
    return -jnp.expm1(schedule.logsnr(t) - schedule.logsnr(s))


def _with_fraction(denoised: Any, fixed: float | None) -> tuple[Array, Any]:
    if isinstance(denoised, LearnedRange) != (fixed is None):
        wanted, got = ("LearnedRange", "an array") if fixed is None else ("an array", "LearnedRange")
        raise ConfigError(
            f'this variance needs a denoiser that returns {wanted}, got {got}. Use variance="learned_range" '
            "exactly when the denoiser returns denoise.LearnedRange(x0, fraction)."
        )
    return cast(LearnedRange, denoised) if fixed is None else (denoised, fixed)


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
