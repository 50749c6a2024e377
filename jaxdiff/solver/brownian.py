"""A Brownian path under the solvers' noise: an image that stays as the number of steps grows.

Where D is constant the reverse SDE is solved by one Brownian motion W in the clock of the SNR:

    x_s = alpha_s D + sigma_s (e^(-h) eps + sqrt(1 - e^(-2h)) new),     new = (W_SNR_s - W_SNR_t) / sqrt(SNR_s - SNR_t)

Z = W / sqrt(SNR) is a stationary Ornstein-Uhlenbeck process in l = log-SNR, of unit variance from -80 to 80. So

    new            = (Z_s - e^(-d/2) Z_t) / sqrt(1 - e^-d),    d = l_s - l_t
    Z at a middle  = (Z_left + Z_right) / (2 cosh(d/4)) + sqrt(tanh(d/4)) normal,    d = l_right - l_left

The second line, repeated (a virtual Brownian tree: Li et al. 2020, sec. 4), gives Z at any l from the key alone.
"""

import jax
import jax.numpy as jnp

from jaxdiff import process
from jaxdiff.schedule import LOGSNR_MAX
from jaxdiff.solver.base import fresh
from jaxdiff.types import Array, Key, Noise, Schedule

_DEPTH = 24
"""Halvings of [-80, 80]: to 1e-5 in log-SNR, finer than float32 tells log-SNRs apart. Between, Z is a straight line."""


def brownian_path(key: Key, schedule: Schedule) -> Noise:
    """The `noise` of one path per example, for the stochastic solvers: `dpmpp_2m_sde(schedule, noise=...)`.

    A step's noise is the path's increment over it: with more steps over the same path the image converges, exactly
    where the solver's eta is 1. Draws over disjoint steps are independent; a step's draw is the sum of its parts.
    key: one key or (b,) keys, as in `sample`; the keys of the steps are not used. Noise for other than a step down
    (Langevin moves, restarts) is no part of the path: it is `fresh`.
    """

    def noise(step_key: Key, x: Array, t: Array, s: Array) -> Array:
        keys = process.example_keys(key, x.shape[0])
        low, high = schedule.logsnr(t), schedule.logsnr(s)

        def increment() -> Array:
            kept = jnp.exp((low - high) / 2).astype(x.dtype)
            new = _stationary(keys, x, high) - kept * _stationary(keys, x, low)
            return new / jnp.sqrt(-jnp.expm1(low - high)).astype(x.dtype)

        return jax.lax.cond(high > low, increment, lambda: fresh(step_key, x, t, s))

    return noise


def _stationary(keys: Key, x: Array, logsnr: Array) -> Array:
    """Z at one log-SNR for each example: its path, halved towards `logsnr`. A node is known by its number."""

    def normal(node: Array) -> Array:
        return process.normal(process.fold_keys(keys, node), x.shape, x.dtype)

    def halve(level: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
        node, left, width, z_left, z_right = state
        z = (z_left + z_right) / (2 * jnp.cosh(width / 4)) + jnp.sqrt(jnp.tanh(width / 4)) * normal(node)
        up = logsnr >= left + width / 2
        left = jnp.where(up, left + width / 2, left)
        return 2 * node + up.astype(node.dtype), left, width / 2, jnp.where(up, z, z_left), jnp.where(up, z_right, z)

    start, width = jnp.asarray(-LOGSNR_MAX, x.dtype), jnp.asarray(2 * LOGSNR_MAX, x.dtype)
    ends = normal(jnp.uint32(0)), normal(jnp.uint32(2**32 - 1))  # the tree's own nodes are 1 to 2^24
    state = (jnp.uint32(1), start, width, *ends)
    _, left, width, z_left, z_right = jax.lax.fori_loop(0, _DEPTH, halve, state)
    part = jnp.clip((logsnr - left) / width, 0, 1)
    return z_left + part * (z_right - z_left)
