"""CLIP's two encoders: text (also OpenCLIP H and bigG, as Stable Diffusion uses them) and pictures.

    h = embedding(ids) + position;   h = h + attention(norm(h));   h = h + mlp(norm(h))           causal for text
    tokens = final_norm(h_L)         pooled = projection(tokens at the end of the text)           text
    tokens = h_L                     pooled = projection(post_norm(h_L at the class token))       pictures
    score = 100 max(cos(pooled text, pooled picture), 0)

Radford et al. 2021 (section 2.4); score: Hessel et al. 2021, eq. 1, with the usual factor of 100.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxdiff.errors import ConfigError
from jaxdiff.text import layers
from jaxdiff.text.encoder import TextFeatures
from jaxdiff.types import Array

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class ImageFeatures(NamedTuple):
    """What the picture encoder gives: `tokens` (b, 1 + n, d), the class token first, and `pooled` (b, d)."""

    tokens: Array
    pooled: Array


class _Block(nn.Module):
    attention: layers.Attention
    mlp: layers.MLP
    eps: float
    causal: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = x + self.attention(layers.Norm(self.eps, name="norm_1")(x), causal=self.causal)
        return x + self.mlp(layers.Norm(self.eps, name="norm_2")(x))


def _states(net: Any, x: Array, *, causal: bool) -> list[Array]:
    """x and what each layer makes of it; called within the compact method of `net`."""
    states = [x]
    for i in range(net.depth):
        attention = layers.Attention(net.heads, dtype=net.dtype, parent=None)
        mlp = layers.MLP(net.hidden, net.act, dtype=net.dtype, parent=None)
        states.append(_Block(attention, mlp, net.eps, causal, parent=net, name=f"layer_{i}")(states[-1]))
    return states


class CLIPText(nn.Module):
    """Token ids int32 (b, L <= max_len) -> TextFeatures. The defaults are those of ViT-L/14 (Stable Diffusion 1.x).

    `eos` is where `pooled` is taken: at its first place, or, for the 2 of old configs, at the largest id. `mask` is
    all True: Stable Diffusion looks at the padding too. `projection` is the width of `pooled` after its projection,
    None for none. Raises ConfigError for settings or ids that do not fit.
    """

    vocab_size: int = 49408
    width: int = 768
    depth: int = 12
    heads: int = 12
    hidden: int = 3072
    max_len: int = 77
    act: str = "quick_gelu"
    eps: float = 1e-5
    eos: int = 49407
    projection: int | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, ids: Array, *, skip: int = 0, final_norm: bool = True) -> TextFeatures:
        """`tokens` after `depth - skip` layers (clip-skip), through the final norm or, as SDXL has it, not.

        diffusers' clip_skip=k is skip=k for SD 1.x and skip=k + 1, final_norm=False for SDXL. `pooled` always comes
        from the last layer.
        """
        self._check(ids, skip)
        embedding = nn.Embed(self.vocab_size, self.width, dtype=self.dtype, name="token_embedding")
        positions = self.param("positions", nn.initializers.normal(0.02), (self.max_len, self.width))
        h = embedding(ids) + positions[None, : ids.shape[1]].astype(self.dtype)
        states = _states(self, h, causal=True)
        norm = layers.Norm(self.eps, name="final_norm")
        last, tokens = norm(states[-1]), states[self.depth - skip]
        if final_norm:
            tokens = norm(tokens) if skip else last
        end = jnp.argmax(ids if self.eos == 2 else ids == self.eos, axis=-1)
        pooled = jnp.take_along_axis(last, end[:, None, None], axis=1)[:, 0]
        if self.projection is not None:
            pooled = nn.Dense(self.projection, use_bias=False, dtype=self.dtype, name="projection")(pooled)
        return TextFeatures(tokens, jnp.ones(ids.shape, bool), pooled)

    def _check(self, ids: Array, skip: int) -> None:
        layers.check(self.width, self.heads, self.act)
        layers.check_ids(ids, self.max_len)
        if not 0 <= skip <= self.depth:
            raise ConfigError(f"skip must be between 0 and depth={self.depth}, got {skip}.")


class CLIPVision(nn.Module):
    """Pictures (b, size, size, 3) from `preprocess` -> ImageFeatures. The defaults are those of ViT-L/14.

    `tokens` is the state after `depth - skip` layers, before any norm, as transformers' hidden_states are. Raises
    ConfigError for settings or pictures that do not fit.
    """

    size: int = 224
    patch: int = 14
    width: int = 1024
    depth: int = 24
    heads: int = 16
    hidden: int = 4096
    act: str = "quick_gelu"
    eps: float = 1e-5
    projection: int | None = 768
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, *, skip: int = 0) -> ImageFeatures:
        self._check(x, skip)
        patches = (self.patch, self.patch)
        convolution = nn.Conv(self.width, patches, patches, "VALID", use_bias=False, dtype=self.dtype, name="patches")
        h = convolution(x).reshape(x.shape[0], -1, self.width)
        first = self.param("class_embedding", nn.initializers.normal(0.02), (self.width,)).astype(h.dtype)
        h = jnp.concatenate([jnp.broadcast_to(first.reshape(1, 1, -1), (len(h), 1, self.width)), h], axis=1)
        positions = self.param("positions", nn.initializers.normal(0.02), (h.shape[1], self.width))
        h = layers.Norm(self.eps, name="pre_norm")(h + positions[None].astype(h.dtype))
        states = _states(self, h, causal=False)
        pooled = layers.Norm(self.eps, name="post_norm")(states[-1][:, 0])
        if self.projection is not None:
            pooled = nn.Dense(self.projection, use_bias=False, dtype=self.dtype, name="projection")(pooled)
        return ImageFeatures(states[self.depth - skip], pooled)

    def _check(self, x: Array, skip: int) -> None:
        layers.check(self.width, self.heads, self.act)
        if x.ndim != 4 or x.shape[1:] != (self.size, self.size, 3):
            raise ConfigError(f"x must be (b, {self.size}, {self.size}, 3), got {x.shape}. Use preprocess(x, size).")
        if not 0 <= skip <= self.depth:
            raise ConfigError(f"skip must be between 0 and depth={self.depth}, got {skip}.")


def preprocess(x: Array, size: int = 224) -> Array:
    """Pictures (b, h, w, 3) in [-1, 1] -> (b, size, size, 3): shorter side scaled, centre cut, CLIP's mean and std.

    The scaling is bicubic with antialiasing, as Pillow's, but not rounded to 8 bits in between.
    """
    b, h, w, _ = x.shape
    short = min(h, w)
    shape = (b, size * h // short, size * w // short, 3)
    x = jax.image.resize(x, shape, "cubic", antialias=True).clip(-1, 1)
    top, left = (shape[1] - size) // 2, (shape[2] - size) // 2
    x = (x[:, top : top + size, left : left + size] + 1) / 2
    mean, std = (jnp.asarray(c, x.dtype).reshape(1, 1, 1, 3) for c in (MEAN, STD))
    return (x - mean) / std


def score(text: Array, image: Array) -> Array:
    """CLIP score (b,) of pairs of `pooled` (b, d): 100 max(cos, 0)."""
    text, image = (u / jnp.linalg.norm(u, axis=-1, keepdims=True) for u in (text, image))
    return 100 * jnp.maximum((text * image).sum(axis=-1), 0)
