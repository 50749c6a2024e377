"""Schedules moved to another noise level.

LogSnrShift   logsnr'(t) = logsnr(t) + offset, on the curve of the base schedule
TimeShift     t' = factor t / (1 + (factor - 1) t)
"""

import dataclasses
import math

import jax.numpy as jnp

from jaxdiff.schedule.base import Base, as_float
from jaxdiff.types import Array


@dataclasses.dataclass(frozen=True)
class LogSnrShift(Base):
    """`base` with a constant added to its log-SNR, on the same curve of (alpha, sigma). See `shift`."""

    base: Base
    offset: float

    def _point(self, t: Array) -> tuple[Array, Array]:
        alpha, sigma = self.base.alpha(t), self.base.sigma(t)
        half = math.exp(self.offset / 4)
        moved = self.base.project(alpha * half, sigma / half)
        at_end = (alpha == 0) | (sigma == 0)  # infinite log-SNR does not move
        return jnp.where(at_end, alpha, moved[0]), jnp.where(at_end, sigma, moved[1])

    def alpha(self, t: Array) -> Array:
        return self._point(t)[0]

    def sigma(self, t: Array) -> Array:
        return self._point(t)[1]

    def project(self, a: Array, b: Array) -> tuple[Array, Array]:
        return self.base.project(a, b)

    def _inverse(self, logsnr: Array) -> Array:
        return self.base.inverse(logsnr - self.offset)


@dataclasses.dataclass(frozen=True)
class TimeShift(Base):
    """`base` at the time  factor t / (1 + (factor - 1) t). See `shift`."""

    base: Base
    factor: float

    def _warp(self, t: Array) -> Array:
        t = as_float(t)
        return self.factor * t / ((1 - t) + self.factor * t)  # so written, it is exactly 1 at t = 1

    def alpha(self, t: Array) -> Array:
        return self.base.alpha(self._warp(t))

    def sigma(self, t: Array) -> Array:
        return self.base.sigma(self._warp(t))

    def project(self, a: Array, b: Array) -> tuple[Array, Array]:
        return self.base.project(a, b)

    def _inverse(self, logsnr: Array) -> Array:
        u = self.base.inverse(logsnr)
        return u / (u + self.factor * (1 - u))
