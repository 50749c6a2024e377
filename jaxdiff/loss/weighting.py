"""Weightings: w(schedule, target, t) is the factor on the squared error **of the target**.

All but `simple` are defined by their factor on the squared error of x0 and converted exactly, so that a weighting means
the same for every target. At fixed x_t an error d of x0 is an error -(alpha / sigma) d of eps, and so

    error of (a x0 + b eps) = (a - b exp(logsnr / 2)) d
    w_target                = w_x0 / (a - b exp(logsnr / 2))^2,       w_x0 = SNR w_eps

computed as logarithms and bounded by exp(40): an infinite factor stands only where the error of x0 is 0.
"""

import math
from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp

from jaxdiff.errors import ConfigError
from jaxdiff.schedule import as_float
from jaxdiff.types import Array, Schedule, Target

Weighting: TypeAlias = Callable[[Schedule, Target, Array], Array]

_LOG_MAX = 40.0
_EDGE = 1e-6  # as in schedule.derivative


def simple(schedule: Schedule, target: Target, t: Array) -> Array:
    """1: the plain squared error of whatever the target is (Ho et al. 2020, eq. 14, for eps)."""
    return jnp.ones_like(as_float(t))


def on_x0(log_weight: Callable[[Schedule, Array], Array]) -> Weighting:
    """The weighting whose factor on the squared error of x0 is exp(log_weight(schedule, t)), for every target."""

    def weighting(schedule: Schedule, target: Target, t: Array) -> Array:
        a, b = target.row(schedule, t)
        factor = jnp.abs(a - b * jnp.exp(schedule.logsnr(t) / 2))
        return jnp.exp(jnp.minimum(log_weight(schedule, t) - 2 * jnp.log(jnp.maximum(factor, 1e-30)), _LOG_MAX))

    return weighting


def snr(schedule: Schedule, target: Target, t: Array) -> Array:
    """SNR on x0, that is 1 on eps (Salimans & Ho 2022, section 4)."""
    return on_x0(lambda schedule, t: schedule.logsnr(t))(schedule, target, t)


def min_snr(gamma: float = 5.0) -> Weighting:
    """min(SNR, gamma) on x0 (Hang et al. 2023)."""
    _positive("gamma", gamma, "5.0")
    return on_x0(lambda schedule, t: jnp.minimum(schedule.logsnr(t), math.log(gamma)))


def p2(gamma: float = 1.0, k: float = 1.0) -> Weighting:
    """(k + SNR)^-gamma on eps (Choi et al. 2022)."""
    _positive("gamma", gamma, "1.0")
    _positive("k", k, "1.0")

    def log_weight(schedule: Schedule, t: Array) -> Array:
        logsnr = schedule.logsnr(t)
        return logsnr - gamma * jnp.logaddexp(logsnr, jnp.full_like(logsnr, math.log(k)))

    return on_x0(log_weight)


def edm(sigma_data: float = 0.5) -> Weighting:
    """SNR + 1 / sigma_data^2 on x0 (Karras et al. 2022, Table 1): 1 on the target `edm(sigma_data)`."""
    _positive("sigma_data", sigma_data, "0.5")

    def log_weight(schedule: Schedule, t: Array) -> Array:
        logsnr = schedule.logsnr(t)
        return jnp.logaddexp(logsnr, jnp.full_like(logsnr, -2 * math.log(sigma_data)))

    return on_x0(log_weight)


def sigmoid(bias: float = 2.0) -> Weighting:
    """1/2 sigmoid(bias - logsnr) |d logsnr / dt| on eps, for t uniform: the same loss for every schedule.

    Source: Kingma & Gao 2023 (bias 2); SiD2 (Hoogeboom et al. 2024) lowers the bias with the
    resolution. For bias -> infinity it is `likelihood`.
    """

    def log_weight(schedule: Schedule, t: Array) -> Array:
        return _log_likelihood(schedule, t) + jax.nn.log_sigmoid(bias - schedule.logsnr(t))

    return on_x0(log_weight)


def likelihood(schedule: Schedule, target: Target, t: Array) -> Array:
    """1/2 |d logsnr / dt| on eps: for t uniform, the diffusion part of the variational bound, in nats per dimension.

    Source: Kingma et al. 2021, eq. 17.
    """
    return on_x0(_log_likelihood)(schedule, target, t)


def _log_likelihood(schedule: Schedule, t: Array) -> Array:
    u = jnp.clip(as_float(t), _EDGE, 1 - _EDGE)
    _, rate = jax.jvp(schedule.logsnr, (u,), (jnp.ones_like(u),))
    return schedule.logsnr(t) + jnp.log(jnp.maximum(-rate, 1e-30) / 2)


def _positive(name: str, value: float, usual: str) -> None:
    if not value > 0:
        raise ConfigError(f"{name} must be positive, got {value}. The paper uses {name}={usual}.")
