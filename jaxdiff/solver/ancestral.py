"""Ancestral sampling: q(x_s | x_t, x0) with the estimate in the place of x0, and its family with less noise.

    var_ts = sigma_t^2 - (alpha_t sigma_s / alpha_s)^2 = sigma_t^2 (1 - SNR_t / SNR_s)      (noise from s to t)
    x_s    = alpha_s x0 + sigma_s (k eps + sqrt(1 - k^2) new)                               (`base.mix`)

What is called Euler ancestral is such a step too: down to a lower noise level, then up again with new noise.

    k^2 = 1 - eta^2 (1 - SNR_t / SNR_s)                  ddim; the same as k-diffusion's sample_euler_ancestral
    k   = rho_down / rho_s,   rho = sigma / alpha        euler_ancestral_rf; the level down is set on straight lines
"""

from typing import Any

import jax.numpy as jnp

from jaxdiff import process
from jaxdiff.denoise import LearnedRange, LearnedVariance, estimate
from jaxdiff.errors import ConfigError
from jaxdiff.solver.base import fresh, lost_snr, mix, no_memory, predict
from jaxdiff.types import Array, Denoiser, Key, Noise, PyTree, Schedule, Solver

_ANSWERS = {"fixed_small": None, "fixed_large": None, "learned": LearnedVariance, "learned_range": LearnedRange}


def ddpm(schedule: Schedule, *, variance: str = "fixed_small", noise: Noise = fresh) -> Solver:
    """Ancestral sampling (Ho et al. 2020, Algorithm 2) over any pair of times.

    `variance`: "fixed_small" is that of q(x_s | x_t, x0), "fixed_large" is var_ts (beta_t on DDPM's own grid),
    "learned_range" lies between the two as a `denoise.LearnedRange` says (Nichol & Dhariwal 2021, eq. 15), "learned" is
    that of a `denoise.LearnedVariance`, for the steps of its own chain. The step to s = 0 adds no noise.
    Raises ConfigError for another variance, and where the denoiser returns what does not belong to it.
    """
    if variance not in _ANSWERS:
        raise ConfigError(f"variance must be one of {', '.join(_ANSWERS)}; got {variance!r}.")

    def step(key: Key, denoise: Denoiser, x: Array, t: Array, s: Array, memory: PyTree) -> tuple[Array, PyTree]:
        answer = _check_answer(denoise(x, t), variance)
        mean, _, _ = process.q_posterior(schedule, estimate(answer), x, t, s)
        if isinstance(answer, LearnedVariance):
            std = jnp.exp(answer.log_variance / 2)
        else:
            fraction = answer.fraction if isinstance(answer, LearnedRange) else float(variance == "fixed_large")
            std = _between(schedule, t, s, fraction)
        return mean + jnp.where(s > 0, std, 0.0) * noise(key, x, t, s), memory

    return Solver(no_memory, step)


def ddim(schedule: Schedule, *, eta: float = 0.0, noise: Noise = fresh) -> Solver:
    """DDIM (Song et al. 2021, eq. 12, 16). eta = 0: deterministic, order 1; eta = 1: DDPM with fixed small variance.

    At every eta it is k-diffusion's sample_euler_ancestral: that one's sigma_up is the new noise of eq. 16. At eta = 0
    it is Euler's method in sigma / alpha, DPM-Solver-1 and DPM-Solver++(1S) too (Lu et al. 2022).
    Raises ConfigError unless 0 <= eta <= 1.
    """
    _check_eta(eta)

    def step(key: Key, denoise: Denoiser, x: Array, t: Array, s: Array, memory: PyTree) -> tuple[Array, PyTree]:
        x0 = estimate(denoise(x, t))
        gap = jnp.log1p(-(eta**2) * lost_snr(schedule, t, s))
        return mix(schedule, x, x0, t, s, gap, noise(key, x, t, s) if eta > 0 else jnp.zeros_like(x)), memory

    return Solver(no_memory, step)


def euler_ancestral_rf(schedule: Schedule, *, eta: float = 1.0, noise: Noise = fresh) -> Solver:
    """Euler ancestral of rectified flows (ComfyUI's sample_euler_ancestral_RF); order 1 in law.

    On the noise level tau = sigma / (alpha + sigma) of straight lines it goes down to
    tau_s (1 - eta (1 - tau_s / tau_t)) and up again to tau_s. eta = 0 is DDIM; at eta = 1 the new noise is that of
    `ddim(eta=1)` in small steps, and less in long ones.
    Raises ConfigError unless 0 <= eta <= 1.
    """
    _check_eta(eta)

    def step(key: Key, denoise: Denoiser, x: Array, t: Array, s: Array, memory: PyTree) -> tuple[Array, PyTree]:
        x0 = estimate(denoise(x, t))
        alpha, sigma = schedule.alpha(s), schedule.sigma(s)
        tau_t, tau = schedule.sigma(t) / (schedule.alpha(t) + schedule.sigma(t)), sigma / (alpha + sigma)
        factor = 1 - eta * (1 - tau / tau_t)
        kept = factor * (1 - tau) / (1 - tau * factor)
        return mix(schedule, x, x0, t, s, 2 * jnp.log(kept), noise(key, x, t, s)), memory

    return Solver(no_memory, step)


def ddim_inversion(schedule: Schedule) -> Solver:
    """DDIM run from data to noise (Song et al. 2021, sec. 4.3), for `sample.invert`; one call a step.

    x_s is where `ddim` would step down from to x_t, so it depends on eps at (x_s, s): by one step of the fixed-point
    iteration of Pan et al. 2023, from the x_s that the eps before would give (at first, none). Order 1 along the flow,
    as `ddim`; order 2 there and back. At t = 0, where there is no eps, it need not ask.
    """

    def step(key: Key, denoise: Denoiser, x: Array, t: Array, s: Array, memory: PyTree) -> tuple[Array, PyTree]:
        scaled = schedule.alpha(s) / schedule.alpha(t)
        added = schedule.sigma(s) - scaled * schedule.sigma(t)
        _, eps = predict(schedule, denoise, scaled * x + added * memory, s)
        return scaled * x + added * eps, eps

    return Solver(jnp.zeros_like, step, upward=True)


def _check_eta(eta: float) -> None:
    if not 0 <= eta <= 1:
        raise ConfigError(
            f"eta must lie in [0, 1], got {eta}. Use 0 for the deterministic sampler, 1 for DDPM's noise."
        )


def _check_answer(answer: Any, variance: str) -> Any:
    got = type(answer) if isinstance(answer, LearnedRange | LearnedVariance) else None
    if got is not _ANSWERS[variance]:
        names = [kind.__name__ if kind else "an array" for kind in (_ANSWERS[variance], got)]
        raise ConfigError(
            f'variance "{variance}" needs a denoiser that returns {names[0]}, got {names[1]}. Use '
            '"learned_range" exactly for denoise.LearnedRange(x0, fraction), "learned" for denoise.LearnedVariance.'
        )
    return answer


def _between(schedule: Schedule, t: Array, s: Array, fraction: Any) -> Array:
    """The standard deviation between fixed small (0) and fixed large (1); their logarithms are interpolated."""
    sigma_t, sigma_s = schedule.sigma(t), schedule.sigma(s)
    # fixed small = fixed large * (sigma_s / sigma_t)^2, so a geometric mean of the two is a power of the ratio.
    ratio = jnp.where(sigma_s > 0, sigma_s / sigma_t, 1.0)
    return sigma_t * jnp.sqrt(lost_snr(schedule, t, s)) * ratio ** (1 - fraction)
