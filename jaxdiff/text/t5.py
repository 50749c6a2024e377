"""The encoder of T5 v1.1 (Stable Diffusion 3, FLUX, PixArt, Imagen), and of the first T5.

    h = h + attention(rms(h)) + b;   h = h + down(gelu(gate(h')) up(h')), h' = rms(h);   tokens = rms(h)

No scaling of the dot products, no biases; instead of positions a learned number b for each head and bucket of the
distance j - i, shared by all layers: n / 4 exact buckets each way, then logarithmic ones up to `max_distance`. Raffel
et al. 2020 (section 2.1), Shazeer 2020 (GEGLU).
"""

import math
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from jaxdiff.errors import ConfigError
from jaxdiff.text import layers
from jaxdiff.text.encoder import TextFeatures
from jaxdiff.types import Array


class T5Encoder(nn.Module):
    """Token ids int32 (b, L) -> TextFeatures; `pooled` is the mean over the mask. The defaults are those of XXL.

    Raises ConfigError for settings or ids that do not fit.
    """

    vocab_size: int = 32128
    width: int = 4096
    depth: int = 24
    heads: int = 64
    head_dim: int = 64
    hidden: int = 10240
    act: str = "gelu_new"
    gated: bool = True
    buckets: int = 32
    max_distance: int = 128
    eps: float = 1e-6
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, ids: Array, mask: Array | None = None) -> TextFeatures:
        """`mask` bool (b, L), default all: Stable Diffusion 3 and FLUX look at the padding too, PixArt does not."""
        self._check(ids, mask)
        table = self.param("relative_bias", nn.initializers.normal(0.02), (self.buckets, self.heads))
        index = relative_buckets(ids.shape[1], self.buckets, self.max_distance)
        bias = table[index].transpose(2, 0, 1)[None]
        x = nn.Embed(self.vocab_size, self.width, dtype=self.dtype, name="token_embedding")(ids)
        for i in range(self.depth):
            mlp = layers.MLP(self.hidden, self.act, self.gated, use_bias=False, dtype=self.dtype, parent=None)
            attention = layers.Attention(self.heads, self.head_dim, False, 1.0, self.dtype, parent=None)
            x = _Block(attention, mlp, self.eps, name=f"layer_{i}")(x, mask, bias)
        tokens = layers.Norm(self.eps, rms=True, name="final_norm")(x)
        seen = jnp.ones(ids.shape, bool) if mask is None else mask
        return TextFeatures(tokens, seen, layers.masked_mean(tokens, seen))

    def _check(self, ids: Array, mask: Array | None) -> None:
        layers.check(self.heads * self.head_dim, self.heads, self.act)
        layers.check_ids(ids, None)
        if self.buckets < 4 or self.max_distance <= self.buckets // 4:
            raise ConfigError(
                f"buckets must be >= 4, max_distance > buckets / 4, got {self.buckets}, {self.max_distance}."
            )
        if mask is not None:
            layers.check_mask(mask, ids)


class _Block(nn.Module):
    attention: layers.Attention
    mlp: layers.MLP
    eps: float

    @nn.compact
    def __call__(self, x: Array, mask: Array | None, bias: Array) -> Array:
        x = x + self.attention(layers.Norm(self.eps, rms=True, name="norm_1")(x), mask=mask, bias=bias)
        return x + self.mlp(layers.Norm(self.eps, rms=True, name="norm_2")(x))


def relative_buckets(length: int, buckets: int, max_distance: int) -> np.ndarray:
    """The bucket of each (query, key), int32 (length, length), in the float32 of the reference; on the host."""
    position = np.arange(length)
    distance = position[None, :] - position[:, None]
    half = buckets // 2
    exact = half // 2
    size = np.abs(distance)
    ratio = np.log(np.maximum(size, 1).astype(np.float32) / np.float32(exact)) / np.float32(
        math.log(max_distance / exact)
    )
    far = np.minimum(exact + (ratio * np.float32(half - exact)).astype(np.int32), half - 1)
    return np.where(distance > 0, half, 0) + np.where(size < exact, size, far)
