"""Initial weights whose program is quick to compile: one integer hash of (key, index) for each leaf.

    u_i = mix(mix(i ^ k_0) ^ k_1) / 2^31 - 1  in (-1, 1),      mix = a 32-bit finaliser (xor-shift, multiply)
    uniform: w = sqrt(3 v) u,     normal: w = s sqrt(2) erfinv(u)

XLA compiles a separate random draw for every leaf of `jit(net.init)`; a hash compiles three times as fast as threefry
(36 M parameters: 4 s instead of 11), and gives the same bits on every device and under every sharding. Ample for
initial weights; every other draw of the library uses JAX's own generators. Constants: Wellons 2018, lowbias32.
"""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.nn.initializers import Initializer

from jaxdiff.types import Array, Key


def bits(key: Key, size: int) -> Array:
    """Hash the indices 0 .. size - 1 (at most 2^32) with `key` to uint32 (size,)."""
    h = lax.iota(jnp.uint32, size)
    for word in jax.random.key_data(key).astype(jnp.uint32):
        h = h ^ word
        h = (h ^ (h >> jnp.uint32(16))) * jnp.uint32(0x7FEB352D)
        h = (h ^ (h >> jnp.uint32(15))) * jnp.uint32(0x846CA68B)
        h = h ^ (h >> jnp.uint32(16))
    return h


def unit(key: Key, shape: tuple[int, ...]) -> Array:
    """Draw float32 uniform in the open interval (-1, 1): the middles of 2^23 equal cells, so never an end."""
    wide = bits(key, math.prod(shape)) >> jnp.uint32(9)
    return ((wide.astype(jnp.float32) + 0.5) * (2.0 / 2**23) - 1.0).reshape(shape)


def uniform(scale: float, mode: Literal["fan_in", "fan_avg"]) -> Initializer:
    """Uniform weights of variance scale / fan for kernels (..., c_in, c_out). Glorot & Bengio 2010; He et al. 2015."""

    def init(key: Key, shape: Any, dtype: Any = jnp.float32, out_sharding: Any = None) -> Array:
        del out_sharding
        window = math.prod(shape[:-2])
        fan = window * (shape[-2] if mode == "fan_in" else (shape[-2] + shape[-1]) / 2)
        return (unit(key, shape) * math.sqrt(3 * scale / fan)).astype(dtype)

    return init


def normal(stddev: float) -> Initializer:
    """Gaussian weights of the given standard deviation."""

    def init(key: Key, shape: Any, dtype: Any = jnp.float32, out_sharding: Any = None) -> Array:
        del out_sharding
        return (lax.erf_inv(unit(key, shape)) * (math.sqrt(2) * stddev)).astype(dtype)

    return init


XAVIER = uniform(1.0, "fan_avg")
"""Glorot uniform: DDPM's and EDM's default."""

XAVIER_SQUARE = uniform(1.0, "fan_in")
"""What `XAVIER` is for c x c matrices, for several of them stored side by side (queries, keys, values)."""
