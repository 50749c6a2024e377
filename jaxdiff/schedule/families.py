"""The continuous families; each formula keeps the relative precision of whichever of alpha and sigma is small.

VP, Cosine, Sigmoid   alpha^2 + sigma^2 = 1
SubVP                 alpha^2 + sigma   = 1
RectifiedFlow         alpha   + sigma   = 1
VE, EDM               alpha             = 1
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from jaxdiff.schedule.base import Base, as_float, pin, safe_sqrt
from jaxdiff.types import Array


@dataclasses.dataclass(frozen=True)
class VP(Base):
    """Variance-preserving SDE (Song et al. 2021, eq. 33): beta(t) linear, log alpha = -1/2 int_0^t beta."""

    beta_min: float
    beta_max: float

    def _decay(self, t: Array) -> Array:
        """-log alpha = t^2 (beta_max - beta_min) / 4 + t beta_min / 2."""
        t = as_float(t)
        return t * (t * ((self.beta_max - self.beta_min) / 4) + self.beta_min / 2)

    def _time(self, decay: Array) -> Array:
        """The positive root of `_decay(t) = decay`, in the form without cancellation."""
        half = self.beta_min / 2
        return 2 * decay / (half + jnp.sqrt(half**2 + (self.beta_max - self.beta_min) * decay))

    def alpha(self, t: Array) -> Array:
        return jnp.exp(-self._decay(t))

    def sigma(self, t: Array) -> Array:
        return safe_sqrt(-jnp.expm1(-2 * self._decay(t)))

    def _inverse(self, logsnr: Array) -> Array:
        return self._time(jax.nn.softplus(-logsnr) / 2)


@dataclasses.dataclass(frozen=True)
class SubVP(VP):
    """Sub-VP SDE (Song et al. 2021, appendix C): alpha of VP, sigma = 1 - alpha^2."""

    def sigma(self, t: Array) -> Array:
        return -jnp.expm1(-2 * self._decay(t))

    def project(self, a: Array, b: Array) -> tuple[Array, Array]:
        half = (b + jnp.sqrt(jnp.square(b) + 4 * jnp.square(a))) / 2
        return a / half, b / half

    def _inverse(self, logsnr: Array) -> Array:
        # sigma / alpha = 2 sinh(-log alpha)
        return self._time(jnp.arcsinh(jnp.exp(-logsnr / 2) / 2))


@dataclasses.dataclass(frozen=True)
class Cosine(Base):
    """Cosine (Nichol & Dhariwal 2021, eq. 17), in continuous time: alpha = cos(u) / cos(u0), u = pi/2 (t+s)/(1+s)."""

    s: float

    @property
    def _u0(self) -> float:
        return math.pi / 2 * self.s / (1 + self.s)

    def alpha(self, t: Array) -> Array:
        t = as_float(t)
        u = (1 - t) * (math.pi / 2 / (1 + self.s))  # from the far end, where alpha is small
        return pin(t, jnp.sin(u) / math.cos(self._u0), 1, 0)

    def sigma(self, t: Array) -> Array:
        t = as_float(t)
        u = t * (math.pi / 2 / (1 + self.s))
        # cos^2(u0) - cos^2(u0 + u) = sin(u) sin(u + 2 u0)
        return pin(t, safe_sqrt(jnp.sin(u) * jnp.sin(u + 2 * self._u0)) / math.cos(self._u0), 0, 1)

    def _inverse(self, logsnr: Array) -> Array:
        cos0, sin0 = math.cos(self._u0), math.sin(self._u0)
        sigma2 = jax.nn.sigmoid(-logsnr)
        cos = cos0 * jnp.sqrt(jax.nn.sigmoid(logsnr))
        sin = jnp.sqrt(sin0**2 + sigma2 * cos0**2)
        u = jnp.arctan2(sigma2 * cos0**2 / (sin * cos0 + cos * sin0), cos * cos0 + sin * sin0)
        return u * (2 / math.pi * (1 + self.s))


@dataclasses.dataclass(frozen=True)
class Sigmoid(Base):
    """Sigmoid (Chen 2023, alg. 1): alpha^2 falls from 1 to 0 as -sigmoid(u), u from start/tau to end/tau."""

    start: float
    end: float
    tau: float

    @property
    def _ends(self) -> tuple[float, float]:
        return self.start / self.tau, self.end / self.tau

    def _share(self, t: Array, part: Array, far: float) -> Array:
        """A difference of two sigmoids, sinh((a-b)/2) / (2 cosh(a/2) cosh(b/2)), relative to the whole range."""
        low, high = self._ends
        u = low + t * (high - low)
        scale = math.cosh(far / 2) / math.sinh((high - low) / 2)
        return jnp.sinh(part * ((high - low) / 2)) / jnp.cosh(u / 2) * scale

    def alpha(self, t: Array) -> Array:
        t = as_float(t)
        return pin(t, safe_sqrt(self._share(t, 1 - t, self._ends[0])), 1, 0)

    def sigma(self, t: Array) -> Array:
        t = as_float(t)
        return pin(t, safe_sqrt(self._share(t, t, self._ends[1])), 0, 1)

    def _inverse(self, logsnr: Array) -> Array:
        low, high = self._ends
        half = (high - low) / 2
        ratio = jnp.exp(logsnr) * (math.cosh(high / 2) / math.cosh(low / 2))
        return jnp.log1p(2 * math.sinh(half) / (ratio + math.exp(-half))) / (2 * half)


@dataclasses.dataclass(frozen=True)
class RectifiedFlow(Base):
    """Straight lines from data to noise (Liu et al. 2023; Lipman et al. 2023): alpha = 1 - t, sigma = t."""

    def project(self, a: Array, b: Array) -> tuple[Array, Array]:
        return a / (a + b), b / (a + b)

    def alpha(self, t: Array) -> Array:
        return 1 - as_float(t)

    def sigma(self, t: Array) -> Array:
        return as_float(t)

    def _inverse(self, logsnr: Array) -> Array:
        return jax.nn.sigmoid(-logsnr / 2)


class _Exploding(Base):
    """alpha = 1."""

    def project(self, a: Array, b: Array) -> tuple[Array, Array]:
        return jnp.ones_like(a), b / a

    def alpha(self, t: Array) -> Array:
        return jnp.ones_like(as_float(t))


@dataclasses.dataclass(frozen=True)
class VE(_Exploding):
    """Variance-exploding, geometric (Song et al. 2021, appendix C): sigma = sigma_min (sigma_max / sigma_min)^t."""

    sigma_min: float
    sigma_max: float

    def sigma(self, t: Array) -> Array:
        t = as_float(t)
        value = self.sigma_min * jnp.exp(t * math.log(self.sigma_max / self.sigma_min))
        return pin(t, value, self.sigma_min, self.sigma_max)

    def _inverse(self, logsnr: Array) -> Array:
        return (-logsnr / 2 - math.log(self.sigma_min)) / math.log(self.sigma_max / self.sigma_min)


@dataclasses.dataclass(frozen=True)
class EDM(_Exploding):
    """EDM (Karras et al. 2022): sigma + sigma_min follows eq. 5, so that t = 0 is sigma = 0 and uniform t is its grid.

    sigma(t) = sigma_min ((1 + k t)^rho - 1), with k such that sigma(1) = sigma_max. In EDM only sigma has a meaning,
    so t may be any increasing function of it; this one is smooth, and has sigma' > 0 at 0.
    """

    sigma_min: float
    sigma_max: float
    rho: float

    @property
    def _k(self) -> float:
        return math.expm1(math.log1p(self.sigma_max / self.sigma_min) / self.rho)

    def sigma(self, t: Array) -> Array:
        t = as_float(t)
        return pin(t, self.sigma_min * jnp.expm1(self.rho * jnp.log1p(self._k * t)), 0, self.sigma_max)

    def _inverse(self, logsnr: Array) -> Array:
        return jnp.expm1(jnp.log1p(jnp.exp(-logsnr / 2) / self.sigma_min) / self.rho) / self._k
