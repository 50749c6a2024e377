"""DPM-Solver++ (Lu et al. 2022): the flow's linear part is solved exactly, D(x_t, t) is a polynomial in log-SNR.

    lambda = log-SNR / 2,   h = lambda_s - lambda_t
    x_s    = (sigma_s / sigma_t) x_t + alpha_s int_0^1 h e^{h (v - 1)} D(v) dv,     v = 0 at t and 1 at s

With D constant it is DDIM, which is therefore what the paper calls DPM-Solver-1 and DPM-Solver++(1S).
"""

import jax
import jax.numpy as jnp

from jaxdiff.denoise import estimate
from jaxdiff.solver.base import half_logsnr_step, no_memory, no_step, over
from jaxdiff.solver.polynomial import beyond_first, exponential_moments, no_past, remember
from jaxdiff.types import Array, Denoiser, Key, PyTree, Schedule, Solver


def dpmpp_2s(schedule: Schedule) -> Solver:
    """DPM-Solver++(2S), r_1 = 1/2 (Lu et al. 2022, Algorithm 1): the value of D midway in log-SNR; order 2.

    Two calls a step. One in a step to sigma = 0, and in one from alpha = 0 (midway is pure noise as well): DDIM.
    """

    def step(key: Key, denoise: Denoiser, x: Array, t: Array, s: Array, memory: PyTree) -> tuple[Array, PyTree]:
        x0 = estimate(denoise(x, t))

        def midway() -> Array:
            middle = schedule.inverse((schedule.logsnr(t) + schedule.logsnr(s)) / 2)
            x_middle = with_constant(schedule, x, x0, t, middle)
            return with_constant(schedule, x, estimate(denoise(x_middle, middle)), t, s)

        both_ends = (schedule.sigma(s) > 0) & (schedule.alpha(t) > 0)
        return jax.lax.cond(both_ends, midway, lambda: with_constant(schedule, x, x0, t, s)), memory

    return Solver(no_memory, step)


def dpmpp_2m(schedule: Schedule) -> Solver:
    """DPM-Solver++(2M) (Lu et al. 2022, Algorithm 2); order 2 in steps of log-SNR; one call a step.

    The first step, and one to sigma = 0 (where the log-SNR is infinite), are of first order, that is DDIM.
    """

    def step(key: Key, denoise: Denoiser, x: Array, t: Array, s: Array, memory: PyTree) -> tuple[Array, PyTree]:
        x0_prev, h_prev = memory
        h = half_logsnr_step(schedule, t, s)
        weight = jnp.where(schedule.sigma(s) > 0, over(h, 2 * h_prev), 0.0)
        x0 = estimate(denoise(x, t))
        return with_constant(schedule, x, x0 + weight * (x0 - x0_prev), t, s), (x0, h)

    return Solver(no_step, step)


def dpmpp_3m(schedule: Schedule) -> Solver:
    """DPM-Solver++(3M) (Lu et al. 2022, and their code): D is quadratic in log-SNR; order 3; one call a step.

    Orders 1, 2, 3, ... and 1 to sigma = 0. Two things differ from the published code, whose order is 2: the quadratic
    term has its whole integral, 2 h phi_3 (there the half of it); and when the second call comes, the first step is
    corrected as UniC-1 does (Zhao et al. 2023), without which its error would be of order 2.
    """

    def step(key: Key, denoise: Denoiser, x: Array, t: Array, s: Array, memory: PyTree) -> tuple[Array, PyTree]:
        (before, further), (x0_before, _) = memory
        here, there = schedule.logsnr(t) / 2, schedule.logsnr(s) / 2
        h = there - here
        x0 = estimate(denoise(x, t))
        second = jnp.isfinite(before) & ~jnp.isfinite(further)
        x = x + jnp.where(second, schedule.alpha(t) * -jnp.expm1(before - here) / 2, 0.0) * (x0 - x0_before)
        nodes = [jnp.zeros_like(h), *((node - here) / h for node in memory[0])]
        added = beyond_first(exponential_moments(h, 3), nodes, [x0, *memory[1]])
        x = with_constant(schedule, x, x0, t, s) + jnp.where(schedule.sigma(s) > 0, schedule.alpha(s), 0.0) * added
        return x, remember(memory, here, x0)

    return Solver(lambda x: no_past(x, 2), step)


def with_constant(schedule: Schedule, x: Array, x0: Array, t: Array, s: Array) -> Array:
    """x_s from x_t where D is the constant x0 between the two: alpha_s x0 + sigma_s eps, without dividing by alpha."""
    decay = schedule.sigma(s) / schedule.sigma(t)
    return decay * x + (schedule.alpha(s) - schedule.alpha(t) * decay) * x0
