"""A small text encoder, trained from scratch beside the picture network.

    h = embed(ids) + position;   h = h + attention(norm(h));   h = h + mlp(norm(h));   tokens = norm(h)
    pooled = sum(mask * tokens) / sum(mask)

The seam: anything that returns `TextFeatures` conditions a network. The first position is never masked, so an empty
caption (all ids 0) is the learned embedding of id 0 there: one null token, not an attention over nothing.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxdiff.errors import ConfigError
from jaxdiff.text.layers import masked_mean, wide
from jaxdiff.types import Array


class TextFeatures(NamedTuple):
    """What a text encoder gives: `tokens` (b, L, d), `mask` bool (b, L) of those to look at, `pooled` (b, d)."""

    tokens: Array
    mask: Array
    pooled: Array


class TextEncoder(nn.Module):
    """Token ids int32 (b, L) -> TextFeatures: a pre-norm transformer of `depth` layers (0: embeddings and positions).

    Raises ConfigError when L exceeds `max_len` or `heads` does not divide `dim`.
    """

    vocab_size: int
    dim: int = 128
    depth: int = 2
    heads: int = 4
    max_len: int = 32
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, ids: Array) -> TextFeatures:
        self._check(ids)
        mask = (jnp.asarray(ids) != 0).at[:, 0].set(True)
        positions = self.param("positions", nn.initializers.normal(0.02), (self.max_len, self.dim))
        x = nn.Embed(self.vocab_size, self.dim, dtype=self.dtype, name="embed")(ids)
        x = x + positions[None, : ids.shape[1]].astype(self.dtype)
        for i in range(self.depth):
            x = _Block(self.heads, self.dtype, name=f"block_{i}")(x, mask)
        tokens = _norm(x, "norm")
        return TextFeatures(tokens, mask, masked_mean(tokens, mask))

    def _check(self, ids: Array) -> None:
        if ids.ndim != 2 or not 1 <= ids.shape[1] <= self.max_len:
            raise ConfigError(f"ids must have shape (b, L) with 1 <= L <= max_len={self.max_len}, got {ids.shape}.")
        if self.dim % self.heads:
            raise ConfigError(f"heads must divide dim={self.dim}, got {self.heads}.")


class _Block(nn.Module):
    heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, mask: Array) -> Array:
        batch, length, dim = x.shape
        h = _norm(x, "norm_attention")
        h = nn.Dense(3 * dim, dtype=self.dtype, name="qkv")(h).reshape(batch, length, 3, self.heads, -1)
        h = jax.nn.dot_product_attention(h[:, :, 0], h[:, :, 1], h[:, :, 2], mask=mask[:, None, None, :])
        x = x + nn.Dense(dim, dtype=self.dtype, name="out")(h.reshape(x.shape))
        h = _norm(x, "norm_mlp")
        h = nn.gelu(nn.Dense(4 * dim, dtype=self.dtype, name="up")(h))
        return x + nn.Dense(dim, dtype=self.dtype, name="down")(h)


def _norm(x: Array, name: str) -> Array:
    """LayerNorm with statistics of at least float32, whatever the compute type."""
    return nn.LayerNorm(dtype=wide(x), name=name)(x.astype(wide(x))).astype(x.dtype)
