"""Closed forms for data whose diffusion is known exactly: a Gaussian of diagonal variance, a mixture of Gaussians.

    x_t = alpha x0 + sigma eps,  x0 ~ N(mean, diag variance)
    x_t ~ N(alpha mean, V_t),    V_t = alpha^2 variance + sigma^2
    E[x0 | x_t]   = mean + alpha variance / V_t (x_t - alpha mean),      Var[x0 | x_t] = variance sigma^2 / V_t
    score         = -(x_t - alpha mean) / V_t
    flow t -> s   : x_s = alpha_s mean + sqrt(V_s / V_t) (x_t - alpha_t mean)         (the probability-flow ODE, solved)
    reverse s < t : q(x_s | x_t) is Gaussian, from the joint of (x_s, x_t):  Cov(x_s, x_t) = alpha_s alpha_t variance
                    + (alpha_t / alpha_s) sigma_s^2
Everything works for any schedule with `alpha(t)` and `sigma(t)`, for t scalar or (b,), in the dtype of its inputs.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp


def column(a: Any, x: jax.Array) -> jax.Array:
    """`a` () or (b,), shaped to broadcast against x (b, ...). Written here again: an oracle shares no code."""
    a = jnp.asarray(a)
    return a if a.ndim == 0 else a.reshape(a.shape + (1,) * (x.ndim - 1))


def _row(a: Any, x: jax.Array) -> jax.Array:
    """A per-feature constant, shaped and typed for x."""
    a = jnp.asarray(a, x.dtype)
    return a if a.ndim == 0 else a.reshape((1,) * (x.ndim - a.ndim) + a.shape)


@dataclass(frozen=True)
class Gaussian:
    """x0 ~ N(mean, diag(variance)); mean and variance are numbers or tuples over the last axis."""

    schedule: Any
    mean: Any = 0.0
    variance: Any = 0.25

    def _parts(self, x, t):
        alpha, sigma = column(self.schedule.alpha(t), x), column(self.schedule.sigma(t), x)
        mean, variance = _row(self.mean, x), _row(self.variance, x)
        return alpha, sigma, mean, variance, alpha**2 * variance + sigma**2

    def denoise(self, x, t):
        """E[x0 | x_t]."""
        alpha, _, mean, variance, total = self._parts(x, jnp.asarray(t))
        return mean + alpha * variance / total * (x - alpha * mean)

    def posterior_variance(self, x, t):
        """Var[x0 | x_t], broadcast against x."""
        _, sigma, _, variance, total = self._parts(x, jnp.asarray(t))
        return jnp.broadcast_to(variance * sigma**2 / total, x.shape)

    def score(self, x, t):
        """grad_x log p_t(x)."""
        alpha, _, mean, _, total = self._parts(x, jnp.asarray(t))
        return -(x - alpha * mean) / total

    def flow(self, x, t, s):
        """The exact solution at s of the probability-flow ODE that passes through x at t."""
        alpha_t, _, mean, _, total_t = self._parts(x, jnp.asarray(t))
        alpha_s, _, _, _, total_s = self._parts(x, jnp.asarray(s))
        return alpha_s * mean + jnp.sqrt(total_s / total_t) * (x - alpha_t * mean)

    def reverse(self, x, t, s):
        """(mean, variance) of q(x_s | x_t) for s < t, where alpha_s > 0."""
        alpha_t, _, mean, variance, total_t = self._parts(x, jnp.asarray(t))
        alpha_s, sigma_s, _, _, total_s = self._parts(x, jnp.asarray(s))
        covariance = alpha_s * alpha_t * variance + alpha_t / alpha_s * sigma_s**2
        gain = covariance / total_t
        return alpha_s * mean + gain * (x - alpha_t * mean), jnp.broadcast_to(total_s - gain * covariance, x.shape)

    def moments(self, x, t):
        """(mean, variance) of x_t, broadcast against x."""
        alpha, _, mean, _, total = self._parts(x, jnp.asarray(t))
        return jnp.broadcast_to(alpha * mean, x.shape), jnp.broadcast_to(total, x.shape)

    def log_prob(self, x, t):
        """log p_t(x), (b,)."""
        mean, total = self.moments(x, t)
        terms = -((x - mean) ** 2) / total - jnp.log(2 * jnp.pi * total)
        return terms.sum(tuple(range(1, x.ndim))) / 2


@dataclass(frozen=True)
class Mixture:
    """x0 ~ sum_k weights_k N(means_k, variances_k I); x is (b, d). means: tuple of k tuples of d numbers.

    variances: k numbers; k tuples of d numbers are diagonals.
    """

    schedule: Any
    weights: tuple[float, ...]
    means: tuple[tuple[float, ...], ...]
    variances: tuple[float, ...]

    def _components(self, x, t):
        """Per component: (log w_k p_k(x_t) (b, k), E[x0 | x_t, k] (b, k, d))."""
        x = x[:, None, :]
        alpha, sigma = column(self.schedule.alpha(t), x), column(self.schedule.sigma(t), x)
        means, variances = jnp.asarray(self.means, x.dtype)[None], jnp.asarray(self.variances, x.dtype)
        variances = (variances[:, None] if variances.ndim == 1 else variances)[None]
        total = alpha**2 * variances + sigma**2
        delta = x - alpha * means
        log_p = (-(delta**2) / total - jnp.log(2 * jnp.pi * total)).sum(-1) / 2
        return log_p + jnp.log(jnp.asarray(self.weights, x.dtype))[None], means + alpha * variances / total * delta

    def denoise(self, x, t):
        """E[x0 | x_t]."""
        log_p, x0 = self._components(x, jnp.asarray(t))
        return (jax.nn.softmax(log_p, axis=-1)[..., None] * x0).sum(1)

    def log_prob(self, x, t):
        """log p_t(x), (b,)."""
        return jax.nn.logsumexp(self._components(x, jnp.asarray(t))[0], axis=-1)

    def responsibilities(self, x, t):
        """p(k | x_t), (b, k)."""
        return jax.nn.softmax(self._components(x, jnp.asarray(t))[0], axis=-1)

    def moments(self):
        """(mean (d,), covariance (d, d)) of x0."""
        weights, means = jnp.asarray(self.weights), jnp.asarray(self.means)
        mean = weights @ means
        spread = jnp.einsum("k,ki,kj->ij", weights, means - mean[None], means - mean[None])
        return mean, spread + jnp.eye(means.shape[1]) * (weights @ jnp.asarray(self.variances))
