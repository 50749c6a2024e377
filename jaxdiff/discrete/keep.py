"""Schedules of the discrete processes: keep(t), the chance that a token is untouched at t, and lost(t) = 1 - keep(t).

    linear       keep = 1 - t
    cosine       keep = 1 - sin(pi t / 2)
    polynomial   keep = 1 - t^p
    geometric    lost = expm1(-n(t)) / expm1(-n(1)),   n(t) = sigma_min ((sigma_max / sigma_min)^t - 1)

keep falls from exactly 1 at t = 0 to exactly 0 at t = 1: nothing is left of the data, and no bound needs a prior term.
"""

import dataclasses
import math
from typing import Protocol

import jax
import jax.numpy as jnp

from jaxdiff.schedule import as_float
from jaxdiff.schedule.base import pin, require
from jaxdiff.types import Array

_EDGE = 1e-6  # derivatives and rates are taken no nearer to the ends: some are infinite there


class Keep(Protocol):
    """What a process needs of its schedule; elementwise, jit-safe, each precise where it is small."""

    def keep(self, t: Array) -> Array:
        """The chance that a token is untouched: 1 at t = 0, 0 at t = 1."""
        ...

    def lost(self, t: Array) -> Array:
        """1 - keep(t)."""
        ...

    def inverse(self, lost: Array) -> Array:
        """The t at which `lost(t)` has the given value."""
        ...


def inside(t: Array) -> Array:
    """`t` moved into [1e-6, 1 - 1e-6], where the rates of every schedule are finite."""
    return jnp.clip(as_float(t), _EDGE, 1 - _EDGE)


def loss_rate(schedule: Keep, t: Array) -> Array:
    """d lost / dt, at least 0 and finite: within 1e-6 of an end, the value at that distance."""
    t = inside(t)
    return jax.jvp(schedule.lost, (t,), (jnp.ones_like(t),))[1]


@dataclasses.dataclass(frozen=True)
class Linear:
    """keep = 1 - t."""

    def keep(self, t: Array) -> Array:
        return 1 - as_float(t)

    def lost(self, t: Array) -> Array:
        return as_float(t)

    def inverse(self, lost: Array) -> Array:
        return as_float(lost)


@dataclasses.dataclass(frozen=True)
class Cosine:
    """keep = 1 - sin(pi t / 2) = 2 sin^2(pi (1 - t) / 4)."""

    def keep(self, t: Array) -> Array:
        t = as_float(t)
        return pin(t, 2 * jnp.square(jnp.sin((math.pi / 4) * (1 - t))), 1, 0)

    def lost(self, t: Array) -> Array:
        t = as_float(t)
        return pin(t, jnp.sin((math.pi / 2) * t), 0, 1)

    def inverse(self, lost: Array) -> Array:
        lost = as_float(lost)
        return pin(lost, (2 / math.pi) * jnp.arcsin(lost), 0, 1)


@dataclasses.dataclass(frozen=True)
class Polynomial:
    """keep = 1 - t^power."""

    power: float

    def keep(self, t: Array) -> Array:
        t = as_float(t)
        return pin(t, -jnp.expm1(self.power * jnp.log(jnp.where(t > 0, t, 1))), 1, 0)

    def lost(self, t: Array) -> Array:
        t = as_float(t)
        return pin(t, jnp.power(jnp.where(t > 0, t, 1), self.power), 0, 1)

    def inverse(self, lost: Array) -> Array:
        return Polynomial(1 / self.power).lost(lost)


@dataclasses.dataclass(frozen=True)
class Geometric:
    """Noise rate geometric in t: n'(t) ~ (sigma_max / sigma_min)^t, the ends made exact."""

    sigma_min: float
    sigma_max: float

    @property
    def _log_ratio(self) -> float:
        return math.log(self.sigma_max / self.sigma_min)

    @property
    def _end(self) -> float:
        return self.sigma_max - self.sigma_min

    def _total(self, t: Array) -> Array:
        return self.sigma_min * jnp.expm1(t * self._log_ratio)

    def keep(self, t: Array) -> Array:
        t = as_float(t)
        left = jnp.exp(-self._total(t)) * jnp.expm1(self._total(t) - self._end)
        return pin(t, left / math.expm1(-self._end), 1, 0)

    def lost(self, t: Array) -> Array:
        t = as_float(t)
        return pin(t, jnp.expm1(-self._total(t)) / math.expm1(-self._end), 0, 1)

    def inverse(self, lost: Array) -> Array:
        lost = as_float(lost)
        total = -jnp.log1p(math.expm1(-self._end) * jnp.clip(lost, 0, 1))
        return pin(lost, jnp.clip(jnp.log1p(total / self.sigma_min) / self._log_ratio, 0, 1), 0, 1)


def linear() -> Linear:
    """keep = 1 - t: MDLM's log-linear, and beta_i = 1 / (T - i + 1) of Sohl-Dickstein et al. 2015 (binomial)."""
    return Linear()


def cosine() -> Cosine:
    """keep = 1 - cos(pi / 2 (1 - t)) (Chang et al. 2022, section 3.3; Shi et al. 2024, table 1)."""
    return Cosine()


def polynomial(power: float = 2.0) -> Polynomial:
    """keep = 1 - t^power (Shi et al. 2024, table 1). Raises ConfigError unless 0 < power < inf."""
    require(0 < power < math.inf, f"power must be positive and finite, got {power}. Use power=2.0.")
    return Polynomial(float(power))


def geometric(*, sigma_min: float = 1e-4, sigma_max: float = 20.0) -> Geometric:
    """Noise rates geometric from sigma_min to sigma_max (Lou et al. 2024, section 5.1), rescaled to lose exactly all.

    Raises ConfigError unless 0 < sigma_min < sigma_max < inf.
    """
    ok = 0 < sigma_min < sigma_max < math.inf
    require(ok, f"need 0 < sigma_min < sigma_max < inf, got {sigma_min} and {sigma_max}. SEDD uses 1e-4 and 20.")
    return Geometric(float(sigma_min), float(sigma_max))
