"""The U-Net of latent diffusion: Stable Diffusion 1, 2 and XL, and DDPM's networks as diffusers writes them.

    e = W2 silu(W1 sinusoid(time)) + class + U2 silu(U1 [vector, sinusoid(sizes)])
    x -> conv_in -> [blocks, down] per level -> middle -> [blocks with skips, up] per level -> norm, silu, conv_out -> y
    skips <- skips + r,  middle <- middle + r'                                     (r, r') of ControlNets, where given

A sub-module `down_blocks_0/resnets_0` is the published `down_blocks.0.resnets.0`: one renaming imports and exports it.
`UNet` is the network to train from scratch; it has other attention, other conditioning and any size. Rombach et al.
2022 (appendix E.2.1); Podell et al. 2023 (SDXL, section 2.2: `vector` and `sizes`); Ho et al. 2020 (appendix B).
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxdiff.errors import ConfigError
from jaxdiff.nets.conditioning import check_positive, check_remat, compute_dtype, dense, sinusoid
from jaxdiff.nets.init import XAVIER, normal
from jaxdiff.nets.layers import ZEROS, Conv, GroupNorm
from jaxdiff.nets.ldm import AFTER, CENTRED, Attends, Context, Stack, Style
from jaxdiff.types import Array

Attention = Literal["none", "self", "cross"]
NUM_SIZES = 6


class Residuals(NamedTuple):
    """What `ControlNet` gives: for each map that skips to the way up, in order, and for the middle."""

    skips: tuple[Array, ...]
    middle: Array


class SDUNet(nn.Module):
    """`net.apply(params, x, time, tokens=, vector=, sizes=, labels=)`: x (b, h, w, c) -> (b, h, w, out_channels).

    time (b,): the index of a chain. tokens (b, L, token_dim) for levels that attend "cross"; vector (b, vector_dim) and
    sizes (b, 6) for XL: original height and width, crop top and left, target height and width; labels (b,).
    `heads` and `depth` are, by level, heads of attention and blocks in a transformer. The defaults are SD 1.
    Parameters float32, computation in `dtype`; `remat` "full" or "dots" spares memory in training, a residual block and
    a block of a transformer at a time. Raises ConfigError for settings and inputs that do not fit.
    """

    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    num_blocks: int = 2
    attention: tuple[Attention, ...] = ("cross", "cross", "cross", "none")
    mid_attention: Attention = "cross"
    heads: tuple[int, ...] = (8, 8, 8, 8)
    depth: tuple[int, ...] = (1, 1, 1, 1)
    in_channels: int = 4
    out_channels: int = 4
    token_dim: int | None = 768
    vector_dim: int | None = None
    size_features: int = 256
    num_classes: int | None = None
    linear_projection: bool = False
    scale_shift: bool = False
    groups: int = 32
    eps: float = 1e-5
    down_padding: int = 1
    sines_first: bool = False
    time_endpoint: bool = False
    remat: str = "none"
    dtype: Any = None

    def __post_init__(self):
        super().__post_init__()
        _check_settings(self)

    @nn.compact
    def __call__(
        self,
        x: Array,
        time: Array,
        *,
        tokens: Array | None = None,
        vector: Array | None = None,
        sizes: Array | None = None,
        labels: Array | None = None,
        residuals: Residuals | None = None,
        images: Mapping[str, tuple[Array, Array]] | None = None,
    ) -> Array:
        """`residuals`: those of `ControlNet`, added up. `images`: of `IPAdapter`, keys and values by block."""
        self._check_inputs(x, time, tokens=tokens, vector=vector, sizes=sizes, labels=labels)
        if images is not None and set(images) != set(places(self)):
            raise ConfigError(f"images must be of the blocks {list(places(self))}, got {list(images)}.")
        dtype = compute_dtype(x, self.dtype)
        embedding = jax.nn.silu(self._embedding(time, vector, sizes, labels))
        context = None if tokens is None else Context(tokens.astype(dtype), images or {})
        h, skips = self._way_down(Conv(self.channels[0], name="conv_in")(x.astype(dtype)), embedding, context)
        h, skips = _add(h, skips, residuals)
        h = self._way_up(h, skips, embedding, context)
        h = GroupNorm(self.groups, self.eps, silu=True, name="conv_norm_out")(h)
        return Conv(self.out_channels, init=ZEROS, name="conv_out")(h.astype(compute_dtype(x, None))).astype(x.dtype)

    @property
    def width(self) -> int:
        """Features of the embedding of the time."""
        return 4 * self.channels[0]

    def _embedding(self, time: Array, vector: Array | None, sizes: Array | None, labels: Array | None) -> Array:
        e = TwoLayers(self.width, name="time_embedding")(self._waves(time, self.channels[0]))
        if self.num_classes is not None and labels is not None:
            e = e + nn.Embed(self.num_classes, self.width, embedding_init=normal(1.0), name="class_embedding")(labels)
        if vector is not None and sizes is not None:
            waves = self._waves(sizes.reshape(-1), self.size_features).reshape(sizes.shape[0], -1)
            both = jnp.concatenate([vector.astype(waves.dtype), waves], axis=-1)
            e = e + TwoLayers(self.width, name="add_embedding")(both)
        return e

    def _waves(self, number: Array, features: int) -> Array:
        number = number if jnp.issubdtype(number.dtype, jnp.floating) else number.astype(jnp.float32)
        waves = sinusoid(number, features, endpoint=self.time_endpoint)
        return waves if self.sines_first else jnp.roll(waves, features // 2, axis=-1)

    def _way_down(self, h: Array, embedding: Array, context: Context | None) -> tuple[Array, tuple[Array, ...]]:
        """The middle, and every map on the way to it."""
        last = len(self.channels) - 1
        skips = (h,)
        for i in range(last + 1):
            h, made = self._level(f"down_blocks_{i}", i, self.num_blocks, "down" if i < last else "none")(
                h, embedding, context, ()
            )
            skips += made
        middle = self._level("mid_block", last, 1, "none", middle=True)
        return middle(h, embedding, context, ())[0], skips

    def _way_up(self, h: Array, skips: tuple[Array, ...], embedding: Array, context: Context | None) -> Array:
        last = len(self.channels) - 1
        for i in range(last + 1):
            used, skips = skips[-self.num_blocks - 1 :], skips[: -self.num_blocks - 1]
            level = self._level(f"up_blocks_{i}", last - i, self.num_blocks + 1, "up" if i < last else "none")
            h, _ = level(h, embedding, context, used, skips[-1].shape[1:3] if skips else None)
        return h

    def _level(
        self, name: str, level: int, count: int, to: Literal["none", "up", "down"], middle: bool = False
    ) -> Stack:
        kind = self.mid_attention if middle else self.attention[level]
        attends = Attends(kind, self.heads[level], self.depth[level])
        return Stack(self.channels[level], count, attends, self._style(), middle=middle, resample=to, name=name)

    def _style(self) -> Style:
        padding = CENTRED if self.down_padding else AFTER
        shared = {name: getattr(self, name) for name in ("groups", "eps", "scale_shift", "linear_projection", "remat")}
        return Style(**shared, padding=padding, end_init=ZEROS)

    @nn.nowrap
    def _check_inputs(self, x: Array, time: Array, **inputs: Array | None) -> None:
        if x.ndim != 4 or x.shape[-1] != self.in_channels or not jnp.issubdtype(x.dtype, jnp.floating):
            raise ConfigError(f"x must be floating (b, h, w, {self.in_channels}), got {x.dtype}{x.shape}.")
        if time.shape != x.shape[:1]:
            raise ConfigError(f"time must have shape {x.shape[:1]}, one per example, got {time.shape}.")
        sizes = NUM_SIZES if self.vector_dim else None
        wanted = {"tokens": (-1, self.token_dim), "vector": (self.vector_dim,), "sizes": (sizes,), "labels": ()}
        for name, shape in wanted.items():
            used = self.num_classes is not None if name == "labels" else shape[-1] is not None
            given = None if (value := inputs[name]) is None else tuple(value.shape)
            if given is not None and used and len(given) == len(shape) + 1:
                shape = tuple(n if m == -1 else m for n, m in zip(given[1:], shape, strict=True))
            if used != (given is not None) or (used and given != (x.shape[0], *shape)):
                need = f"have shape {(x.shape[0], *shape)}" if used else "not be given: this network has no use for it"
                raise ConfigError(f"{name} must {need}, got {given}.")


class TwoLayers(nn.Module):
    """W2 silu(W1 x)."""

    features: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        h = jax.nn.silu(dense(x, self.features, "linear_1", XAVIER))
        return dense(h, self.features, "linear_2", XAVIER)


def places(net: SDUNet) -> dict[str, int]:
    """Every block that attends to tokens, as `ldm.Context` names it, and its width; in the published order."""
    last = len(net.channels) - 1
    levels = [(f"down_blocks_{i}", i, net.num_blocks, net.attention[i]) for i in range(last + 1)]
    levels += [(f"up_blocks_{i}", last - i, net.num_blocks + 1, net.attention[last - i]) for i in range(last + 1)]
    levels += [("mid_block", last, 1, net.mid_attention)]
    return {
        f"{name}/attentions_{j}/transformer_blocks_{k}": net.channels[level]
        for name, level, count, kind in levels
        if kind == "cross"
        for j in range(count)
        for k in range(net.depth[level])
    }


def _add(h: Array, skips: tuple[Array, ...], residuals: Residuals | None) -> tuple[Array, tuple[Array, ...]]:
    if residuals is None:
        return h, skips
    got, wanted = ([tuple(a.shape) for a in (*maps, middle)] for maps, middle in (residuals, (skips, h)))
    if got != wanted:
        raise ConfigError(f"residuals must have the shapes {wanted}, got {got}. They are of another network.")
    added = tuple(skip + more.astype(skip.dtype) for skip, more in zip(skips, residuals.skips, strict=True))
    return h + residuals.middle.astype(h.dtype), added


def _check_settings(net: SDUNet) -> None:
    check_remat(net.remat)
    check_positive(num_blocks=net.num_blocks, groups=net.groups, in_channels=net.in_channels)
    for name in ("attention", "heads", "depth"):
        if len(getattr(net, name)) != len(net.channels):
            raise ConfigError(
                f"{name} must have one entry for each of {len(net.channels)} levels, got {getattr(net, name)}."
            )
    for width, heads in zip(net.channels, net.heads, strict=True):
        if width % net.groups or width % heads:
            raise ConfigError(f"groups={net.groups} and heads={heads} must divide the {width} channels of their level.")
    cross = "cross" in (*net.attention, net.mid_attention)
    if cross != (net.token_dim is not None):
        raise ConfigError(
            f'token_dim must be given where a level attends "cross", and only there; got {net.token_dim}.'
        )
