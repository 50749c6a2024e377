"""DPM-Solver++ (Lu et al. 2022): the flow's linear part is solved exactly, D(x_t, t) is a polynomial in log-SNR."""

from math import inf

import jax.numpy as jnp

from jaxdiff.denoise import estimate
from jaxdiff.types import Array, Denoiser, Key, PyTree, Schedule, Solver


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
