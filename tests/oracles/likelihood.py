"""8-bit data of known entropy whose denoisers are known: independent pixels, each of the same law over the 256 values.

Levels   the values themselves:                x0 = v_k with probability p_k;         E[x0 | x_t] by Bayes' rule
Steps    the same, uniform over the 8-bit bins: x0 ~ p_k / width in the bin of v_k;   truncated normals, by Bayes' rule

entropy of a pixel = -sum p_k log2 p_k bits, and -log2 P(x0) of an example is the sum over its pixels.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.oracles.gaussian import column

VALUES = np.arange(256) / 127.5 - 1


def quantised_normal(std: float = 0.4) -> tuple[float, ...]:
    """256 probabilities proportional to a normal density at the values."""
    p = np.exp(-((VALUES / std) ** 2) / 2)
    return tuple(p / p.sum())


def few_levels() -> tuple[float, ...]:
    """Four of the 256 values, far apart."""
    p = np.zeros(256)
    p[[0, 85, 170, 255]] = 0.5, 0.25, 0.15, 0.1
    return tuple(p)


def entropy(p: tuple[float, ...]) -> float:
    """In bits."""
    kept = np.array([u for u in p if u > 0])
    return float(-(kept * np.log2(kept)).sum())


def draw(p: tuple[float, ...], b: int, d: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(x0 (b, d), -log2 P(x0) / d (b,))."""
    index = np.random.default_rng(seed).choice(256, size=(b, d), p=p)
    return VALUES[index], -np.log2(np.array(p)[index]).mean(1)


def _last(a, x):
    """A constant per value, along a new last axis of x."""
    return jnp.asarray(a, x.dtype).reshape((1,) * x.ndim + (-1,))


@dataclass(frozen=True)
class Levels:
    """x0 is one of the 256 values."""

    schedule: Any
    p: tuple[float, ...]

    def denoise(self, x, t):
        """E[x0 | x_t]; t > 0."""
        kept = np.array(self.p) > 0
        values, p = _last(VALUES[kept], x), _last(np.array(self.p)[kept], x)
        alpha, sigma = (column(u, x[..., None]) for u in (self.schedule.alpha(t), self.schedule.sigma(t)))
        gap = (x[..., None] - alpha * values) / sigma
        return (jax.nn.softmax(jnp.log(p) - gap**2 / 2, axis=-1) * values).sum(-1)


@dataclass(frozen=True)
class Steps:
    """x0 is uniform over the bin of one of the 256 values; alpha > 0, for float64."""

    schedule: Any
    p: tuple[float, ...]

    def denoise(self, x, t):
        """E[x0 | x_t]: in bin k the mean of a normal of mean x / alpha, std sigma / alpha, cut off at its edges."""
        edges, p = _last((np.arange(257) - 0.5) / 127.5 - 1, x), _last(self.p, x)
        alpha, sigma = column(self.schedule.alpha(t), x), column(self.schedule.sigma(t), x)
        std = jnp.where(sigma > 0, sigma, 1) / alpha
        z = (edges - (x / alpha)[..., None]) / column(std, x[..., None])
        mass, slope = (jnp.diff(u, axis=-1) for u in (jax.scipy.stats.norm.cdf(z), jax.scipy.stats.norm.pdf(z)))
        return jnp.where(sigma > 0, x / alpha - std * (p * slope).sum(-1) / (p * mass).sum(-1), x)
