"""The blocks that latent diffusion's U-Nets and autoencoders share, under the names of their published weights.

    residual     y = skip(x) + conv2(silu(norm2(conv1(silu(norm1(x))) + W e)))
    self         y = x + W softmax(q k^T / sqrt(d)) v  of  norm(x)
    cross        h = proj_in(norm(x));  y = x + proj_out(blocks(h, tokens))
    block        h = h + attn1(LN h);  h = h + attn2(LN h, tokens);  h = h + W2 (a gelu(g)),  (a, g) = W1 LN h
    attn2        W (softmax(q k^T / sqrt(d)) v + softmax(q k'^T / sqrt(d)) v')      k', v' of a picture, where given

A sub-module `resnets_0` is the published `resnets.0`. Rombach et al. 2022 (appendix E.2.1), Shazeer 2020 for GEGLU.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer

from jaxdiff.nets.conditioning import LayerNorm, dense, remat
from jaxdiff.nets.init import XAVIER
from jaxdiff.nets.layers import ZEROS, Conv, GroupNorm, upsample
from jaxdiff.types import Array

LAYER_EPS = 1e-5
TRANSFORMER_EPS = 1e-6
CENTRED = ((1, 1), (1, 1))
"""The padding of a U-Net's down-sampling; autoencoders and DDPM's networks pad `AFTER` only."""
AFTER = ((0, 1), (0, 1))


@dataclasses.dataclass(frozen=True)
class Style:
    """What all blocks of a network have in common: norms, down-sampling padding, and the weights a branch ends with."""

    groups: int = 32
    eps: float = 1e-6
    scale_shift: bool = False
    padding: Any = CENTRED
    linear_projection: bool = False
    end_init: Initializer = XAVIER
    remat: str = "none"


@dataclasses.dataclass(frozen=True)
class Attends:
    """The attention of a level: none, to the map itself, or a transformer of `depth` blocks that sees tokens."""

    kind: Literal["none", "self", "cross"] = "none"
    heads: int = 1
    depth: int = 1


class Context(NamedTuple):
    """What cross-attention looks at: tokens (b, m, d), and keys and values (b, n, c) of pictures, by block.

    A block is named by the end of its path: "down_blocks_0/attentions_1/transformer_blocks_0".
    """

    tokens: Array
    images: Mapping[str, tuple[Array, Array]]


class Residual(nn.Module):
    """x (b, h, w, c) and perhaps an embedding (b, d), already through its SiLU -> (b, h, w, features)."""

    features: int
    style: Style

    @nn.compact
    def __call__(self, x: Array, embedding: Array | None = None) -> Array:
        groups, eps = self.style.groups, self.style.eps
        h = Conv(self.features, name="conv1")(GroupNorm(groups, eps, silu=True, name="norm1")(x))
        film = None
        if embedding is not None:
            width = self.features * (2 if self.style.scale_shift else 1)
            e = dense(embedding.astype(h.dtype), width, "time_emb_proj", XAVIER)
            if self.style.scale_shift:
                film = (e[:, : self.features], e[:, self.features :])
            else:
                h = h + e[:, None, None, :]
        h = GroupNorm(groups, eps, silu=True, name="norm2")(h, film)
        h = Conv(self.features, init=self.style.end_init, name="conv2")(h)
        if x.shape[-1] != self.features:
            x = Conv(self.features, size=1, name="conv_shortcut")(x)
        return x + h


def attend(
    x: Array,
    context: Array,
    heads: int,
    *,
    bias: bool,
    end_init: Initializer = XAVIER,
    more: tuple[Array, Array] | None = None,
) -> Array:
    """Attention of x (b, n, c) to context (b, m, d), its layers in the module that calls this.

    more: keys and values (b, k, c) that x attends to as well, by a softmax of their own.
    """
    channels = x.shape[-1]
    q = dense(x, channels, "to_q", XAVIER, bias=bias)
    k = dense(context, channels, "to_k", XAVIER, bias=bias)
    v = dense(context, channels, "to_v", XAVIER, bias=bias)

    def split(a: Array) -> Array:
        return a.reshape(*a.shape[:2], heads, channels // heads)

    y = jax.nn.dot_product_attention(split(q), split(k), split(v))
    if more is not None:
        y = y + jax.nn.dot_product_attention(split(q), *(split(a.astype(q.dtype)) for a in more))
    return dense(y.reshape(x.shape), channels, "to_out_0", end_init)


class SelfAttention(nn.Module):
    """Attention between the positions of a map, with its norm and its residual."""

    heads: int
    style: Style

    @nn.compact
    def __call__(self, x: Array) -> Array:
        h = GroupNorm(self.style.groups, self.style.eps, name="group_norm")(x).reshape(x.shape[0], -1, x.shape[-1])
        return x + attend(h, h, self.heads, bias=True, end_init=self.style.end_init).reshape(x.shape)


class Attention(nn.Module):
    """Attention of x (b, n, c) to a context (b, m, d)."""

    heads: int

    @nn.compact
    def __call__(self, x: Array, context: Array, more: tuple[Array, Array] | None = None) -> Array:
        return attend(x, context, self.heads, bias=False, more=more)


class Gated(nn.Module):
    """GEGLU: a gelu(g), with the exact gelu, where (a, g) = W x."""

    features: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        a, gate = jnp.split(dense(x, 2 * self.features, "proj", XAVIER), 2, axis=-1)
        return a * jax.nn.gelu(gate, approximate=False)


class FeedForward(nn.Module):
    """The two layers of a transformer block, four times as wide in between."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return dense(Gated(4 * x.shape[-1], name="net_0")(x), x.shape[-1], "net_2", XAVIER)


class TransformerBlock(nn.Module):
    """Self-attention, attention to the context, feed-forward; each with its norm and its residual."""

    heads: int

    @nn.compact
    def __call__(self, x: Array, context: Context) -> Array:
        h = LayerNorm(eps=LAYER_EPS, name="norm1")(x)
        x = x + Attention(self.heads, name="attn1")(h, h)
        h = LayerNorm(eps=LAYER_EPS, name="norm2")(x)
        x = x + Attention(self.heads, name="attn2")(h, context.tokens, context.images.get("/".join(self.path[-3:])))
        return x + FeedForward(name="ff")(LayerNorm(eps=LAYER_EPS, name="norm3")(x))


class Transformer(nn.Module):
    """The transformer blocks of one place of a U-Net: map (b, h, w, c) and its context -> (b, h, w, c)."""

    heads: int
    depth: int
    style: Style

    @nn.compact
    def __call__(self, x: Array, context: Context) -> Array:
        b, height, width, channels = x.shape
        h = GroupNorm(self.style.groups, TRANSFORMER_EPS, name="norm")(x)
        h = self._project(h, "proj_in", XAVIER).reshape(b, -1, channels)
        block = remat(TransformerBlock, self.style.remat, ())
        for i in range(self.depth):
            h = block(self.heads, name=f"transformer_blocks_{i}")(h, context)
        return x + self._project(h.reshape(b, height, width, channels), "proj_out", ZEROS)

    def _project(self, x: Array, name: str, init: Initializer) -> Array:
        if self.style.linear_projection:
            return dense(x, x.shape[-1], name, init)
        return Conv(x.shape[-1], size=1, init=init, name=name)(x)


class Stack(nn.Module):
    """Residual blocks, each followed by attention where there is some; a `middle` ends with one block more."""

    features: int
    num_blocks: int
    attends: Attends
    style: Style
    middle: bool = False
    resample: Literal["none", "up", "down"] = "none"

    @nn.compact
    def __call__(
        self, x: Array, embedding: Array | None, context: Context | None, skips: tuple[Array, ...], size: Any = None
    ) -> tuple[Array, tuple[Array, ...]]:
        """The map, and every map on the way; `skips` are joined to it, the last first; `size` is that of an "up"."""
        made = []
        residual = remat(Residual, self.style.remat, ())
        for i in range(self.num_blocks):
            if skips:
                x, skips = jnp.concatenate([x, skips[-1]], axis=-1), skips[:-1]
            x = residual(self.features, self.style, name=f"resnets_{i}")(x, embedding)
            x = self._attend(x, context, f"attentions_{i}")
            made.append(x)
        if self.middle:
            x = residual(self.features, self.style, name=f"resnets_{self.num_blocks}")(x, embedding)
        if self.resample != "none":
            x = Resample(self.features, self.resample, self.style.padding, name=f"{self.resample}samplers_0")(x, size)
            made.append(x)
        return x, tuple(made)

    def _attend(self, x: Array, context: Any, name: str) -> Array:
        if self.attends.kind == "none":
            return x
        if self.attends.kind == "self":
            return SelfAttention(self.attends.heads, self.style, name=name)(x)
        return Transformer(self.attends.heads, self.attends.depth, self.style, name=name)(x, context)


class Resample(nn.Module):
    """Half the size by a convolution of stride 2, or twice the size (`size`, where it is odd) by repetition first."""

    features: int
    to: Literal["up", "down"]
    padding: Any

    @nn.compact
    def __call__(self, x: Array, size: tuple[int, int] | None) -> Array:
        if self.to == "down":
            return Conv(self.features, stride=2, padding=self.padding, name="conv")(x)
        if size is None or size == (2 * x.shape[1], 2 * x.shape[2]):
            return Conv(self.features, upsample=True, name="conv")(x)
        return Conv(self.features, name="conv")(upsample(x)[:, : size[0], : size[1]])
