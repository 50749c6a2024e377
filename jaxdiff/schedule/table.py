"""A discrete chain of betas as a schedule in continuous time.

t = (i + 1) / T:  alpha^2 = prod_{j <= i} (1 - beta_j);  t = 0: alpha = 1, sigma = 0
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from jaxdiff.schedule.base import Base, as_float, require
from jaxdiff.types import Array


@dataclasses.dataclass(frozen=True)
class Table(Base):
    """A discrete chain of T betas: alpha^2 at t = (i + 1) / T is prod_{j <= i} (1 - beta_j); t = 0 is clean data.

    Between knots the angle arctan(sigma / alpha) is interpolated linearly: exact at the knots, alpha^2 + sigma^2 = 1
    everywhere, and finite where a beta of 1 makes alpha exactly 0.
    """

    betas: tuple[float, ...]

    @property
    def T(self) -> int:
        """Number of steps of the chain."""
        return len(self.betas)

    @functools.cached_property
    def angles(self) -> tuple[np.ndarray, np.ndarray]:
        """arctan(sigma / alpha) at t = 0, 1/T, ..., 1 and its complement to pi/2, float64 on the host."""
        with np.errstate(divide="ignore"):
            log_alpha2 = np.concatenate([[0.0], np.cumsum(np.log1p(-np.asarray(self.betas)))])
        alpha, sigma = np.exp(log_alpha2 / 2), np.sqrt(-np.expm1(log_alpha2))
        return np.arctan2(sigma, alpha), np.arctan2(alpha, sigma)

    def time(self, index: int | Sequence[int] | np.ndarray) -> np.ndarray:
        """t = (index + 1) / T, float64 on the host. Raises ConfigError for an index outside 0..T-1."""
        index = np.asarray(index)
        require(
            index.dtype.kind in "iu" and bool(np.all((index >= 0) & (index < self.T))),
            f"a table index must be an integer in 0..{self.T - 1}, got {index}. Clean data is t = 0.0.",
        )
        return (index + 1) / self.T

    def _sin(self, t: Array, angles: np.ndarray) -> Array:
        t = as_float(t)
        position = jnp.clip(t, 0, 1) * self.T
        left = jnp.clip(jnp.floor(position), 0, self.T - 1)
        table, index, part = jnp.asarray(angles, t.dtype), left.astype(jnp.int32), position - left
        return jnp.sin(table[index] * (1 - part) + table[index + 1] * part)

    def alpha(self, t: Array) -> Array:
        return self._sin(t, self.angles[1])

    def sigma(self, t: Array) -> Array:
        return self._sin(t, self.angles[0])

    def _inverse(self, logsnr: Array) -> Array:
        rising, falling = (jnp.asarray(a, logsnr.dtype) for a in self.angles)
        knots = jnp.asarray(np.arange(self.T + 1) / self.T, logsnr.dtype)
        early = jnp.interp(jnp.arctan(jnp.exp(-logsnr / 2)), rising, knots)
        late = jnp.interp(jnp.arctan(jnp.exp(logsnr / 2)), falling[::-1], knots[::-1])
        return jnp.where(logsnr > 0, early, late)  # each where its angle is small, and so precise
