"""The forward process and its posterior, and noise that belongs to an example.

    q(x_t | x0)      = N(alpha_t x0, sigma_t^2)
    q(x_s | x_t, x0) = N(alpha_s c x0 + (sigma_s / sigma_t) sqrt(1 - c) x_t, sigma_s^2 c)     for s <= t
    c                = 1 - exp(logsnr_t - logsnr_s)

(Kingma et al. 2021, appendix A.2, with the factors gathered so that nothing is divided by alpha.)
"""

import jax
import jax.numpy as jnp

from jaxdiff.errors import ConfigError
from jaxdiff.schedule import as_float, expand
from jaxdiff.types import Array, Key, Schedule


def q_sample(schedule: Schedule, x0: Array, eps: Array, t: Array) -> Array:
    """x_t = alpha x0 + sigma eps (Ho et al. 2020, eq. 4); x0 and eps (b, ...), t a scalar or (b,)."""
    x0, eps = as_float(x0), as_float(eps)
    return expand(schedule.alpha(t), x0) * x0 + expand(schedule.sigma(t), x0) * eps


def q_posterior(schedule: Schedule, x0: Array, x_t: Array, t: Array, s: Array) -> tuple[Array, Array, Array]:
    """(mean, variance, log-variance) of x_s given x_t and x0, for s <= t (Ho et al. 2020, eq. 6 and 7).

    The mean is (b, ...); the other two broadcast against it. The log-variance is finite also where the variance is 0.
    """
    x0 = as_float(x0)
    x_t = as_float(x_t).astype(x0.dtype)
    sigma_s, sigma_t = expand(schedule.sigma(s), x0), expand(schedule.sigma(t), x0)
    gap = jnp.minimum(expand(schedule.logsnr(t) - schedule.logsnr(s), x0), 0)
    fresh = -jnp.expm1(gap)
    ratio = jnp.where(sigma_t > 0, sigma_s / jnp.where(sigma_t > 0, sigma_t, 1), 1)
    mean = expand(schedule.alpha(s), x0) * fresh * x0 + ratio * jnp.exp(gap / 2) * x_t
    variance = jnp.square(sigma_s) * fresh
    return mean, variance, jnp.log(jnp.maximum(variance, float(jnp.finfo(x0.dtype).tiny)))


def prior(key: Key, schedule: Schedule, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> Array:
    """x_1 ~ N(0, sigma(1)^2), of `shape` (b, ...): sigma(1) is 80 for EDM, not 1. Keys as for `normal`."""
    noise = normal(key, shape, dtype)
    return expand(schedule.sigma(jnp.ones((), noise.dtype)), noise) * noise


def normal(key: Key, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> Array:
    """Standard normal noise of `shape` (b, ...), a key for each example: row i depends on its own key only.

    `key` is one key (example i uses fold_in(key, i)) or (b,) keys.
    """
    keys = example_keys(key, shape[0])
    return jax.vmap(lambda k: jax.random.normal(k, tuple(shape[1:]), dtype))(keys)


def example_keys(key: Key, b: int) -> Key:
    """(b,) keys, one for each example: fold_in(key, i) from one key; (b,) keys are returned as they are.

    Raises ConfigError for anything but one typed key or b of them.
    """
    kind = getattr(key, "dtype", type(key).__name__)
    if not (isinstance(key, jax.Array) and jnp.issubdtype(kind, jax.dtypes.prng_key)):
        raise ConfigError(f"key must be a typed key, got one of {kind}. Use jax.random.key(seed).")
    if key.ndim == 0:
        return jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(b))
    if key.shape != (b,):
        raise ConfigError(f"key must be one key or {b} keys, one for each example, got shape {key.shape}.")
    return key


def fold_keys(keys: Key, n: Array) -> Key:
    """fold_in(key, n) of each of (b,) keys; n is a scalar or (b,)."""
    return jax.vmap(jax.random.fold_in)(keys, jnp.broadcast_to(n, keys.shape))


def split_keys(keys: Key) -> tuple[Key, Key]:
    """Two keys from each of (b,) keys, for an example that draws twice."""
    both = jax.vmap(jax.random.split)(keys)
    return both[:, 0], both[:, 1]
