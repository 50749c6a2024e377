"""DPM-Solver++ for the reverse SDE: D(x_t, t) is a polynomial in log-SNR, the linear part and the noise are exact.

    lambda = log-SNR / 2,   h = lambda_s - lambda_t,   a = (1 + eta) h
    x_s    = (sigma_s / sigma_t) e^(-eta h) x_t + alpha_s int_0^1 a e^(-a (1 - v)) D(v) dv
             + sigma_s sqrt(1 - e^(-2 eta h)) new

v = 0 at t and 1 at s. A constant D gives `base.mix`; the integrals of v^k are `polynomial.exponential_moments` of a.
eta = 0 is the probability flow, eta = 1 the reverse SDE itself (Xue et al. 2023 write tau^2 for eta).
"""

from math import isfinite

import jax
import jax.numpy as jnp

from jaxdiff.denoise import estimate
from jaxdiff.errors import ConfigError
from jaxdiff.process import split_keys
from jaxdiff.solver.base import fresh, half_logsnr_step, mix, no_memory, no_step, over
from jaxdiff.solver.polynomial import beyond_first, exponential_moments, no_past, remember
from jaxdiff.types import Array, Denoiser, Key, Noise, PyTree, Schedule, Solver


def dpmpp_2m_sde(schedule: Schedule, *, eta: float = 1.0, noise: Noise = fresh) -> Solver:
    """SDE-DPM-Solver++(2M) (Lu et al. 2022, sec. 5, midpoint form); one call a step. eta = 0: `dpmpp_2m`, order 2.

    The first step, and one to sigma = 0, are of first order. Raises ConfigError unless eta is finite and >= 0.
    """
    _check_eta(eta)

    def step(key: Key, denoise: Denoiser, x: Array, t: Array, s: Array, memory: PyTree) -> tuple[Array, PyTree]:
        x0_prev, h_prev = memory
        h = half_logsnr_step(schedule, t, s)
        weight = jnp.where(schedule.sigma(s) > 0, over(h, 2 * h_prev), 0.0)
        x0 = estimate(denoise(x, t))
        x = mix(schedule, x, x0 + weight * (x0 - x0_prev), t, s, -2 * eta * h, noise(key, x, t, s))
        return x, (x0, h)

    return Solver(no_step, step)


def dpmpp_3m_sde(schedule: Schedule, *, eta: float = 1.0, noise: Noise = fresh) -> Solver:
    """DPM-Solver++(3M) SDE (k-diffusion's sample_dpmpp_3m_sde): D quadratic in log-SNR; one call. eta = 0: order 3.

    The v^2 term has its exact integral, which is twice that of k-diffusion (whose order at eta = 0 is therefore 2).
    Lower orders in the first two steps and to sigma = 0. Raises ConfigError unless eta is finite and >= 0.
    """
    _check_eta(eta)

    def step(key: Key, denoise: Denoiser, x: Array, t: Array, s: Array, memory: PyTree) -> tuple[Array, PyTree]:
        here, h = schedule.logsnr(t) / 2, half_logsnr_step(schedule, t, s)
        x0 = estimate(denoise(x, t))
        nodes = [jnp.zeros_like(h), *((node - here) / h for node in memory[0])]
        added = beyond_first(exponential_moments((1 + eta) * h, 3), nodes, [x0, *memory[1]])
        x = mix(schedule, x, x0, t, s, -2 * eta * h, noise(key, x, t, s))
        x = x + jnp.where(schedule.sigma(s) > 0, schedule.alpha(s), 0.0) * added
        return x, remember(memory, here, x0)

    return Solver(lambda x: no_past(x, 2), step)


def dpmpp_sde(schedule: Schedule, *, eta: float = 1.0, noise: Noise = fresh) -> Solver:
    """DPM-Solver++ SDE, single step with r = 1/2 (k-diffusion's sample_dpmpp_sde); calls: 2 a step, 1 to 0.

    Asks again at m, half way in log-SNR, and repeats the step with that answer and the same noise. eta = 0: order 2.
    Raises ConfigError unless eta is finite and >= 0.
    """
    _check_eta(eta)

    def step(key: Key, denoise: Denoiser, x: Array, t: Array, s: Array, memory: PyTree) -> tuple[Array, PyTree]:
        key_1, key_2 = split_keys(key)
        m = schedule.inverse((schedule.logsnr(t) + schedule.logsnr(s)) / 2)
        gap_1, gap_2 = (-2 * eta * half_logsnr_step(schedule, *part) for part in ((t, m), (m, s)))
        new_1, new_2 = noise(key_1, x, t, m), noise(key_2, x, m, s)
        x0 = estimate(denoise(x, t))

        def twice() -> Array:
            x0_m = estimate(denoise(mix(schedule, x, x0, t, m, gap_1, new_1), m))
            x_m = mix(schedule, x, x0_m, t, m, gap_1, new_1)
            return mix(schedule, x_m, x0_m, m, s, gap_2, new_2)

        return jax.lax.cond(schedule.sigma(s) > 0, twice, lambda: schedule.alpha(s) * x0), memory

    return Solver(no_memory, step)


def _check_eta(eta: float) -> None:
    if not (isfinite(eta) and eta >= 0):
        raise ConfigError(f"eta must be finite and >= 0, got {eta}. Use 1 for the reverse SDE, 0 for no noise.")
