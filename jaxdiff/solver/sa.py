"""SA-Solver: stochastic Adams methods for the reverse SDE with noise tau, as predictor and corrector.

    lambda = log-SNR / 2,   h = lambda_s - lambda_t,   a = (1 + tau^2) h
    x_s    = carried + alpha_s int_0^1 a e^(-a (1 - v)) D(v) dv,       v = 0 at t, 1 at s
    carried = (sigma_s / sigma_t) e^(-tau^2 h) x_t + sigma_s sqrt(1 - e^(-2 tau^2 h)) new

The predictor puts a line through D_t and the answer before it, the corrector one through D_t and D_s, with the same
`carried` (the same noise). D_s is asked at the prediction, once: it corrects x_s, and then serves the next step.
"""

from math import isfinite

import jax.numpy as jnp

from jaxdiff.denoise import estimate
from jaxdiff.errors import ConfigError
from jaxdiff.solver.base import fresh, half_logsnr_step, over
from jaxdiff.solver.polynomial import exponential_moments
from jaxdiff.types import Array, Denoiser, Key, Noise, PyTree, Schedule, Solver


def sa_solver(schedule: Schedule, *, tau: float = 1.0, noise: Noise = fresh) -> Solver:
    """SA-Solver (Xue et al. 2023, Algorithm 1), predictor and corrector of 2 steps, exact integrals; one call a step.

    tau: how much noise; 0 is the probability flow (order 2), 1 the reverse SDE (order 2 in law). x is the prediction,
    and is corrected at the start of the next step, when the network is asked there. The first step, and one to
    sigma = 0, predict by a constant. Raises ConfigError unless tau is finite and >= 0.
    """
    if not (isfinite(tau) and tau >= 0):
        raise ConfigError(f"tau must be finite and >= 0, got {tau}. Use 1 for the reverse SDE, 0 for no noise.")

    def init(x: Array) -> PyTree:
        return jnp.zeros_like(x), jnp.zeros_like(x), jnp.zeros((), x.dtype)

    def step(key: Key, denoise: Denoiser, x: Array, t: Array, s: Array, memory: PyTree) -> tuple[Array, PyTree]:
        carried, x0_prev, h_prev = memory
        x0 = estimate(denoise(x, t))
        x = jnp.where(h_prev > 0, carried + _integral(schedule, t, (1 + tau**2) * h_prev, x0_prev, x0 - x0_prev), x)
        h = half_logsnr_step(schedule, t, s)
        sigma_s = schedule.sigma(s)
        carried = sigma_s / schedule.sigma(t) * jnp.exp(-(tau**2) * h) * x
        carried = carried + sigma_s * jnp.sqrt(-jnp.expm1(-2 * tau**2 * h)) * noise(key, x, t, s)
        slope = jnp.where(sigma_s > 0, over(h, h_prev), 0.0) * (x0 - x0_prev)
        return carried + _integral(schedule, s, (1 + tau**2) * h, x0, slope), (carried, x0, h)

    return Solver(init, step)


def _integral(schedule: Schedule, s: Array, a: Array, x0: Array, slope: Array) -> Array:
    """alpha_s int_0^1 a e^(-a (1 - v)) (x0 + slope v) dv."""
    of_1, of_v = exponential_moments(a, 2)
    return schedule.alpha(s) * (of_1 * x0 + of_v * slope)
