"""The blocks of the U-Net: convolution, norm, residual block, attention, and the reshapings around them.

    residual    h = conv(silu(norm(x)));  h = conv(dropout(silu(norm(h + W e))));   y = (skip(x) + h) s
    scale-shift h = conv(dropout(silu(norm(h) (1 + a) + b))),  (a, b) = W e         (ADM)
    attention   y = (x + W softmax(q k^T / sqrt(d)) v) s

e is the conditioning vector, s = `skip_scale` (1, or sqrt(1/2) in EDM). Ho et al. 2020 (appendix B), Dhariwal &
Nichol 2021 (section 3), Karras et al. 2022 (table 7). Norm statistics and the softmax are in float32.
"""

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer

from jaxdiff.errors import ConfigError
from jaxdiff.nets import ops
from jaxdiff.nets.conditioning import at_least_float32, dense
from jaxdiff.nets.init import XAVIER, XAVIER_SQUARE
from jaxdiff.types import Array

ZEROS = nn.initializers.zeros


class Conv(nn.Module):
    """A k x k convolution through `ops.conv`, or up-sampling by 2 and a 3 x 3 through `ops.upsample_conv`."""

    features: int
    size: int = 3
    stride: int = 1
    upsample: bool = False
    init: Initializer = XAVIER
    bias: bool = True
    padding: Any = "SAME"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = self.param("kernel", self.init, (self.size, self.size, x.shape[-1], self.features), jnp.float32)
        bias = self.param("bias", ZEROS, (self.features,), jnp.float32) if self.bias else None
        if self.upsample:
            return ops.upsample_conv(x, kernel, bias)
        return ops.conv(x, kernel, bias, stride=self.stride, padding=self.padding)


class GroupNorm(nn.Module):
    """Group normalisation with a learned scale and bias, followed by SiLU where asked.

    `film` (a, b), each (b, c), modulates each example: norm(x) (1 + a) + b. Perez et al. 2018.
    """

    groups: int
    eps: float = 1e-6
    silu: bool = False

    @nn.compact
    def __call__(self, x: Array, film: tuple[Array, Array] | None = None) -> Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        bias = self.param("bias", ZEROS, (x.shape[-1],), jnp.float32)
        if film is not None:
            wide = at_least_float32(x.dtype)
            gain, shift = 1 + film[0].astype(wide), film[1].astype(wide)
            scale, bias = scale[None].astype(wide) * gain, bias[None].astype(wide) * gain + shift
        return ops.group_norm(x, scale, bias, self.groups, silu=self.silu, eps=self.eps)


class MultiHead(nn.Module):
    """Attention of x (b, n, c) to itself, or to `context` (b, m, d) where mask (b, m) is true."""

    heads: int
    qkv_init: Initializer = XAVIER_SQUARE
    out_init: Initializer = ZEROS

    @nn.compact
    def __call__(self, x: Array, context: Array | None = None, mask: Array | None = None) -> Array:
        channels = x.shape[-1]
        if context is None:
            q, k, v = jnp.split(dense(x, 3 * channels, "qkv", self.qkv_init), 3, axis=-1)
        else:
            q = dense(x, channels, "query", self.qkv_init)
            k, v = jnp.split(dense(context, 2 * channels, "key_value", self.qkv_init), 2, axis=-1)
        q, k, v = (a.reshape(*a.shape[:2], self.heads, channels // self.heads) for a in (q, k, v))
        mask = None if mask is None else mask[:, None, None, :]
        y = jax.nn.dot_product_attention(q, k, v, mask=mask)
        return dense(y.reshape(x.shape), channels, "out", self.out_init)


class Block(nn.Module):
    """A residual block, then self-attention and cross-attention where asked.

    `resample` "down" halves the map by 2 x 2 means and "up" doubles it by repetition, inside the block (ADM, EDM).
    `skip_conv` puts a 1 x 1 convolution on the skip path even where the number of channels stays (EDM).
    """

    features: int
    attention: bool = False
    cross: bool = False
    resample: Literal["none", "up", "down"] = "none"
    groups: int = 32
    eps: float = 1e-6
    dropout: float = 0.0
    scale_shift: bool = False
    skip_scale: float = 1.0
    skip_conv: bool = False
    heads: int = 1
    head_channels: int | None = None
    kernel_init: Initializer = XAVIER
    qkv_init: Initializer = XAVIER_SQUARE

    @nn.compact
    def __call__(self, x: Array, embedding: Array, context: Any, deterministic: bool) -> Array:
        h = GroupNorm(self.groups, self.eps, silu=True, name="norm_in")(x)
        h = downsample(h) if self.resample == "down" else h
        h = Conv(self.features, upsample=self.resample == "up", init=self.kernel_init, name="conv_in")(h)
        h = self._modulate(h, embedding)
        h = nn.Dropout(self.dropout)(h, deterministic=deterministic)
        h = Conv(self.features, init=ZEROS, name="conv_out")(h)
        x = (self._skip(x) + h) * self.skip_scale
        x = self._attend(x, "attention", None) if self.attention else x
        return self._attend(x, "cross", context) if self.cross else x

    def _modulate(self, h: Array, embedding: Array) -> Array:
        width = self.features * (2 if self.scale_shift else 1)
        e = dense(embedding.astype(h.dtype), width, "embedding", self.kernel_init)
        norm = GroupNorm(self.groups, self.eps, silu=True, name="norm_out")
        if not self.scale_shift:
            return norm(h + e[:, None, None, :])
        a, b = jnp.split(e, 2, axis=-1)
        return norm(h, (a, b))

    def _skip(self, x: Array) -> Array:
        x = downsample(x) if self.resample == "down" else x
        if x.shape[-1] != self.features or (self.skip_conv and self.resample != "none"):
            x = dense(x, self.features, "skip", self.kernel_init)
        return upsample(x) if self.resample == "up" else x

    def _attend(self, x: Array, name: str, context: Any) -> Array:
        heads = self.heads if self.head_channels is None else self.features // self.head_channels
        h = GroupNorm(self.groups, self.eps, name=f"{name}_norm")(x)
        h = h.reshape(x.shape[0], -1, x.shape[-1])
        h = MultiHead(heads, self.qkv_init, name=name)(h, *(context or ()))
        return (x + h.reshape(x.shape)) * self.skip_scale


def downsample(x: Array) -> Array:
    """Mean over 2 x 2 positions: (b, 2h, 2w, c) -> (b, h, w, c)."""
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4))


def upsample(x: Array) -> Array:
    """Nearest-neighbour repetition: (b, h, w, c) -> (b, 2h, 2w, c)."""
    return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)


def space_to_depth(x: Array, size: int) -> Array:
    """Patches to channels: (b, h, w, c) -> (b, h / size, w / size, size size c). The inverse of `depth_to_space`."""
    if x.shape[1] % size or x.shape[2] % size:
        raise ConfigError(f"height and width must be multiples of {size}, got {x.shape[1]} x {x.shape[2]}.")
    b, h, w, c = x.shape
    x = x.reshape(b, h // size, size, w // size, size, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h // size, w // size, size * size * c)


def depth_to_space(x: Array, size: int) -> Array:
    """Channels to patches: (b, h, w, size size c) -> (b, h size, w size, c)."""
    b, h, w, c = x.shape
    x = x.reshape(b, h, w, size, size, c // size**2)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h * size, w * size, c // size**2)


def pad_to_multiple(x: Array, multiple: int) -> Array:
    """Pad height and width of x (b, h, w, c) at the bottom and right to a multiple, repeating the edge; crop after."""
    high, wide = -x.shape[1] % multiple, -x.shape[2] % multiple
    if not high and not wide:
        return x
    return jnp.pad(x, ((0, 0), (0, high), (0, wide), (0, 0)), mode="edge")
