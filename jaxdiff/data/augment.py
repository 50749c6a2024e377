"""Augmentation on the device, a pure function of per-example keys: the same example with the same key looks the same.

flip:  x[..., ::-1 along width] with probability 1/2        crop:  a random window of the reflected-padded picture
"""

import jax
import jax.numpy as jnp

from jaxdiff.errors import ConfigError
from jaxdiff.types import Array, Key


def _each(key: Key, count: int) -> Key:
    """One key -> one per example, by index; a batch of keys is taken as it is."""
    if key.ndim == 1:
        return key
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(count))


def flip(key: Key, x: Array) -> Array:
    """Mirror each picture of (b, h, w, c) left-right with probability 1/2; `key` is one key or (b,) keys."""
    coins = jax.vmap(jax.random.bernoulli)(_each(key, x.shape[0]))
    return jnp.where(coins[:, None, None, None], x[:, :, ::-1, :], x)


def crop(key: Key, x: Array, *, pad: int) -> Array:
    """Shift each picture of (b, h, w, c) by up to `pad` pixels each way, filled by reflection; keys as in `flip`."""
    if not 1 <= pad < min(x.shape[1:3]):
        raise ConfigError(
            f"pad must be between 1 and {min(x.shape[1:3]) - 1} for pictures of {x.shape[1:3]}, got {pad}."
        )
    padded = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)), mode="reflect")

    def one(key: Key, picture: Array) -> Array:
        top, left = jax.random.randint(key, (2,), 0, 2 * pad + 1)
        return jax.lax.dynamic_slice(picture, (top, left, 0), x.shape[1:])

    return jax.vmap(one)(_each(key, x.shape[0]), padded)
