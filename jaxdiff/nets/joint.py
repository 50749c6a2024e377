"""What the published transformers share (DiT, Stable Diffusion 3, FLUX), under the names of their weights.

    embedding    e = silu(W2 silu(W1 sinusoid(time)) + U2 silu(U1 vector) + the same of a guidance scale)
    modulation   (shift, scale, gate, ...) = W e,      h = LN(x) (1 + scale) + shift
    attention    softmax(q k^T / sqrt(d)) v over one sequence [tokens, picture], each with its own W; q and k perhaps
                 normed by head, and perhaps turned: (q_2i, q_2i+1) by the angle position 10000^(-2i / d)
    joint block  x = x + gate attention(h);   x = x + gate' mlp(h'),   h' = LN(x) (1 + scale') + shift'; tokens the same

A sub-module `ff/net_0/proj` is the published `ff.net.0.proj`. Peebles & Xie 2023; Esser et al. 2024 (figure 2); Su et
al. 2024 for the rotation. The second attention of a joint block is that of Stable Diffusion 3.5 medium.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxdiff.errors import ConfigError
from jaxdiff.nets.conditioning import LayerNorm, at_least_float32, dense, sinusoid
from jaxdiff.nets.init import XAVIER
from jaxdiff.nets.layers import ZEROS, Conv
from jaxdiff.nets.sd_unet import TwoLayers
from jaxdiff.types import Array

FREQUENCIES = 256
QK_EPS = 1e-6

Rotary = tuple[Any, Any]
"""Cosines and sines of the angles, each (n, d / 2)."""


def waves(number: Array) -> Array:
    """Cosines, then sines, of a number (b,): (b, 256)."""
    return jnp.roll(sinusoid(number, FREQUENCIES, endpoint=False), FREQUENCIES // 2, axis=-1)


class TimeText(nn.Module):
    """Time (b,) in [0, 1000], vector (b, d) and perhaps a guidance scale (b,) as one embedding (b, features)."""

    features: int

    @nn.compact
    def __call__(self, time: Array, vector: Array, guidance: Array | None = None) -> Array:
        e = TwoLayers(self.features, name="timestep_embedder")(waves(time))
        if guidance is not None:
            e = e + TwoLayers(self.features, name="guidance_embedder")(waves(1000 * guidance))
        return jax.nn.silu(e + TwoLayers(self.features, name="text_embedder")(vector.astype(e.dtype)))


class Modulation(nn.Module):
    """`parts` vectors (b, 1, c) made of an embedding (b, c), in `dtype`; zero at the start."""

    parts: int

    @nn.compact
    def __call__(self, embedding: Array, dtype: Any) -> list[Array]:
        e = dense(embedding.astype(dtype), self.parts * embedding.shape[-1], "linear", ZEROS)
        return jnp.split(e[:, None, :], self.parts, axis=-1)


def modulate(x: Array, shift: Array, scale: Array, eps: float = 1e-6) -> Array:
    """LN(x) (1 + scale) + shift."""
    return LayerNorm(affine=False, eps=eps)(x) * (1 + scale) + shift


class RMSNorm(nn.Module):
    """x / rms(x) with a learned scale, over the last axis; statistics at least float32."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        wide = x.astype(at_least_float32(x.dtype))
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32).astype(wide.dtype)
        y = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + QK_EPS)
        return (y * scale.reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)


def rotate(x: Array, rotary: Rotary) -> Array:
    """Turn each pair of neighbours in x (b, n, heads, d) by its angle."""
    cos, sin = (jnp.asarray(part, at_least_float32(x.dtype))[None, :, None, :] for part in rotary)
    pairs = x.reshape(*x.shape[:-1], -1, 2).astype(cos.dtype)
    a, b = pairs[..., 0], pairs[..., 1]
    return jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(x.shape).astype(x.dtype)


class Attention(nn.Module):
    """Attention among x (b, n, c) and, where there are some, tokens (b, m, c): (of x, of the tokens or None).

    norm: queries and keys are normed by head. project: what x gets goes through a last layer. last: tokens get nothing.
    """

    heads: int
    norm: bool = False
    project: bool = True
    last: bool = False

    @nn.compact
    def __call__(self, x: Array, tokens: Array | None = None, rotary: Rotary | None = None) -> tuple[Array, Any]:
        q, k, v = self._split(x, "to_{}", "norm_{}")
        count = 0
        if tokens is not None:
            count, told = tokens.shape[1], self._split(tokens, "add_{}_proj", "norm_added_{}")
            q, k, v = (jnp.concatenate(both, axis=1) for both in zip(told, (q, k, v), strict=True))
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        y = jax.nn.dot_product_attention(q, k, v).reshape(x.shape[0], -1, x.shape[-1])
        of_tokens, y = y[:, :count], y[:, count:]
        y = dense(y, x.shape[-1], "to_out_0", XAVIER) if self.project else y
        if tokens is None or self.last:
            return y, None
        return y, dense(of_tokens, x.shape[-1], "to_add_out", XAVIER)

    def _split(self, x: Array, layer: str, norm: str) -> list[Array]:
        """Queries, keys and values (b, n, heads, d)."""
        parts = []
        for name in "qkv":
            y = dense(x, x.shape[-1], layer.format(name), XAVIER).reshape(*x.shape[:2], self.heads, -1)
            parts.append(RMSNorm(name=norm.format(name))(y) if self.norm and name != "v" else y)
        return parts


class Gelu(nn.Module):
    """gelu(W x), in its tanh form."""

    features: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return jax.nn.gelu(dense(x, self.features, "proj", XAVIER), approximate=True)


class MLP(nn.Module):
    """The two layers of a block, four times as wide in between."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return dense(Gelu(4 * x.shape[-1], name="net_0")(x), x.shape[-1], "net_2", XAVIER)


class JointBlock(nn.Module):
    """x (b, n, c) and tokens (b, m, c) see each other; `embedding` (b, c) is already through its SiLU.

    norm: as in `Attention`. dual: x also attends to itself alone. last: the tokens are not needed any more.
    """

    heads: int
    norm: bool = False
    dual: bool = False
    last: bool = False

    @nn.compact
    def __call__(self, x: Array, tokens: Array, embedding: Array, rotary: Rotary | None = None) -> tuple[Array, Array]:
        shift, scale, gate, *more = Modulation(9 if self.dual else 6, name="norm1")(embedding, x.dtype)
        told = Modulation(2 if self.last else 6, name="norm1_context")(embedding, x.dtype)
        first = told[::-1] if self.last else told  # where there are but two, the scale is the first
        h, c = modulate(x, shift, scale), modulate(tokens, first[0], first[1])
        y, answer = Attention(self.heads, self.norm, last=self.last, name="attn")(h, c, rotary)
        change = gate * y
        if self.dual:
            y, _ = Attention(self.heads, self.norm, name="attn2")(modulate(x, more[3], more[4]))
            change = change + more[5] * y
        x = _add_mlp(x + change, more[:3], "ff")
        if self.last:
            return x, tokens
        return x, _add_mlp(tokens + told[2] * answer, told[3:], "ff_context")


def _add_mlp(x: Array, modulation: list[Array], name: str) -> Array:
    shift, scale, gate = modulation
    return x + gate * MLP(name=name)(modulate(x, shift, scale))


class Patches(nn.Module):
    """Patches of x (b, h, w, c) with their positions: (b, n, features).

    The positions are fixed: sines and cosines of the column, then of the row, both counted in units in which a picture
    of `base` patches has steps of 1. With `most`, they are the middle of a table for most x most patches, which
    published files hold; it is not trained.
    """

    features: int
    size: int
    base: int
    most: int | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        h = Conv(self.features, size=self.size, stride=self.size, padding="VALID", name="proj")(x)
        b, rows, columns, _ = h.shape
        if self.most is None:
            where = positions(rows, columns, self.features, self.base)
        else:
            side = self.most
            make = lambda key, shape: positions(side, side, self.features, self.base).reshape(shape)  # noqa: E731
            table = jax.lax.stop_gradient(self.param("embedding", make, (1, side * side, self.features)))
            top, left = (side - rows) // 2, (side - columns) // 2
            where = table.reshape(side, side, -1)[top : top + rows, left : left + columns]
        return h.reshape(b, rows * columns, -1) + where.reshape(1, rows * columns, -1).astype(h.dtype)


def positions(rows: int, columns: int, features: int, base: int) -> Array:
    """(rows, columns, features): half for the column, half for the row."""
    steps = (jnp.arange(n, dtype=jnp.float32) / (n / base) for n in (rows, columns))
    row, column = (sinusoid(step, features // 2, endpoint=False) for step in steps)
    shape = (rows, columns, features // 2)
    return jnp.concatenate([jnp.broadcast_to(column[None], shape), jnp.broadcast_to(row[:, None], shape)], axis=-1)


def check_picture(x: Array, time: Array, channels: int, size: int, most: int | None = None) -> None:
    """Raise ConfigError unless x is (b, h, w, channels) of whole patches, at most `most` a side, and time is (b,)."""
    if x.ndim != 4 or x.shape[-1] != channels or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ConfigError(f"x must be floating (b, h, w, {channels}), got {x.dtype}{x.shape}.")
    if time.shape != x.shape[:1]:
        raise ConfigError(f"time must have shape {x.shape[:1]}, one per example, got {time.shape}.")
    if any(n % size or n < size for n in x.shape[1:3]):
        raise ConfigError(f"height and width of x must be multiples of {size}, got {x.shape[1]} x {x.shape[2]}.")
    if most is not None and max(x.shape[1:3]) > most * size:
        raise ConfigError(f"x may have {most * size} rows and columns at most, got {x.shape[1]} x {x.shape[2]}.")


def check_told(x: Array, **told: tuple[Array | None, tuple[int | None, ...]]) -> None:
    """Raise ConfigError unless each named array has its shape after the batch; None is any length."""
    for name, (value, shape) in told.items():
        given: tuple[int, ...] = () if value is None else tuple(value.shape)
        wanted = (x.shape[0], *shape)
        if len(given) != len(wanted) or any(n not in (None, m) for n, m in zip(wanted, given, strict=True)):
            sizes = ", ".join("L" if n is None else str(n) for n in wanted)
            raise ConfigError(f"{name} must have shape ({sizes}), got {given or None}.")
