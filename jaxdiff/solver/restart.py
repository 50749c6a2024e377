"""Restart sampling: where a deterministic solver passes a low noise level, noise up and integrate down again, K times.

up      x_max = (alpha_max / alpha_min) x_min + sqrt(sigma_max^2 - (alpha_max sigma_min / alpha_min)^2) new
down    the solver over rho_i = (rho_max^(1/7) + i / N (rho_min^(1/7) - rho_max^(1/7)))^7,   rho = sigma / alpha
"""

from math import inf

import jax
import jax.numpy as jnp

from jaxdiff.errors import ConfigError, check_count
from jaxdiff.process import fold_keys, split_keys
from jaxdiff.solver.base import fresh, lost_snr
from jaxdiff.types import Array, Denoiser, Key, Noise, PyTree, Schedule, Solver


def restart(
    schedule: Schedule,
    solver: Solver,
    *,
    sigma_range: tuple[float, float] = (0.1, 0.6),
    repeats: int = 3,
    num_steps: int = 6,
    noise: Noise = fresh,
) -> Solver:
    """Restart sampling (Xu et al. 2023, Algorithm 1) around a deterministic solver such as `heun(schedule)`.

    The step that reaches sigma / alpha = low of sigma_range = (low, high), or passes it, is followed by `repeats`
    turns: noise up to high, `num_steps` steps of the solver (its memory new) down to where it was. Not at sigma = 0.
    `noise` is that of the way up, from s to a later t. Raises ConfigError unless 0 < low < high < inf, and
    repeats and num_steps are integers >= 1.
    """
    low, high = sigma_range
    if not 0 < low < high < inf:
        raise ConfigError(f"sigma_range must be (low, high) with 0 < low < high < inf, got {sigma_range}.")
    repeats = check_count("repeats", repeats, "Without restarts, use the solver itself.")
    num_steps = check_count("num_steps", num_steps, "These are the steps of one turn; 6 is usual.")

    def step(key: Key, denoise: Denoiser, x: Array, t: Array, s: Array, memory: PyTree) -> tuple[Array, PyTree]:
        key_step, key_turns = split_keys(key)
        x, memory = solver.step(key_step, denoise, x, t, s, memory)
        rho_t, rho_s = (jnp.exp(-schedule.logsnr(u) / 2) for u in (t, s))
        # In steps longer than the range, the level reached may lie far below it: then from there.
        times = schedule.inverse(-2 * jnp.log(_ramp(rho_s, jnp.asarray(high, x.dtype), num_steps))).at[-1].set(s)
        passes = (rho_t > low) & (rho_s <= low) & (schedule.sigma(s) > 0)

        # Not keys but their data enter the branch: under `vmap` JAX selects its operands, and calls that reuse of keys.
        data, impl = jax.random.key_data(key_turns), jax.random.key_impl(key_turns)

        def turn(i: Array, x: Array) -> Array:
            keys = jax.random.wrap_key_data(data, impl=impl)
            key_up, key_down = split_keys(fold_keys(keys, i))
            return _down(key_down, solver, denoise, _up(noise(key_up, x, s, times[0]), schedule, x, s, times[0]), times)

        return jax.lax.cond(passes, lambda: jax.lax.fori_loop(0, repeats, turn, x), lambda: x), memory

    return Solver(solver.init, step)


def _ramp(low: Array, high: Array, num_steps: int) -> Array:
    """Karras et al. 2022, eq. 5, from high to low in num_steps steps."""
    part = jnp.linspace(0.0, 1.0, num_steps + 1, dtype=low.dtype)
    return (high ** (1 / 7) + part * (low ** (1 / 7) - high ** (1 / 7))) ** 7


def _up(new: Array, schedule: Schedule, x: Array, s: Array, t: Array) -> Array:
    """x_t of x_s and new noise, s < t."""
    alpha_s = schedule.alpha(s)
    ratio = schedule.alpha(t) / jnp.where(alpha_s > 0, alpha_s, 1.0)
    std = schedule.sigma(t) * jnp.sqrt(lost_snr(schedule, t, s))
    return ratio * x + std * new


def _down(key: Key, solver: Solver, denoise: Denoiser, x: Array, times: Array) -> Array:
    """The solver over `times`, as `sample` runs it."""

    def body(carry: tuple[Array, PyTree], step: tuple[Array, Array, Array]) -> tuple[tuple[Array, PyTree], None]:
        (x, memory), (n, t, s) = carry, step
        return solver.step(fold_keys(key, n), denoise, x, t, s, memory), None

    steps = (jnp.arange(times.shape[0] - 1), times[:-1], times[1:])
    return jax.lax.scan(body, (x, solver.init(x)), steps)[0][0]
