"""BERT, and the sentence encoders made of it (all-MiniLM-L6-v2 and its kin).

    h = norm(word + position + type);   h = norm(h + attention(h));   h = norm(h + mlp(h));   tokens = h
    pooled = m / |m|,   m = sum(mask tokens) / sum(mask)

Devlin et al. 2019 (section 3); pooling: Reimers & Gurevych 2019 (section 3), normalised as all-MiniLM is used.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxdiff.text import layers
from jaxdiff.text.encoder import TextFeatures
from jaxdiff.types import Array


class Bert(nn.Module):
    """Token ids int32 (b, L <= max_len), `mask` bool (b, L) -> TextFeatures. The defaults are all-MiniLM-L6-v2's.

    One sentence at a time: the type of every token is 0. Raises ConfigError for settings or ids that do not fit.
    """

    vocab_size: int = 30522
    width: int = 384
    depth: int = 6
    heads: int = 12
    hidden: int = 1536
    max_len: int = 512
    types: int = 2
    act: str = "gelu"
    eps: float = 1e-12
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, ids: Array, mask: Array) -> TextFeatures:
        layers.check(self.width, self.heads, self.act)
        layers.check_ids(ids, self.max_len)
        layers.check_mask(mask, ids)
        normal = nn.initializers.normal(0.02)
        positions = self.param("positions", normal, (self.max_len, self.width))
        types = self.param("types", normal, (self.types, self.width))
        x = nn.Embed(self.vocab_size, self.width, dtype=self.dtype, name="token_embedding")(ids)
        x = x + types[None, :1].astype(x.dtype) + positions[None, : ids.shape[1]].astype(x.dtype)
        x = layers.Norm(self.eps, name="norm")(x)
        for i in range(self.depth):
            mlp = layers.MLP(self.hidden, self.act, dtype=self.dtype, parent=None)
            attention = layers.Attention(self.heads, dtype=self.dtype, parent=None)
            x = _Block(attention, mlp, self.eps, name=f"layer_{i}")(x, mask)
        pooled = layers.masked_mean(x, mask)
        size = jnp.linalg.norm(pooled, axis=-1, keepdims=True)
        return TextFeatures(x, mask, pooled / jnp.maximum(size, 1e-12))


class _Block(nn.Module):
    attention: layers.Attention
    mlp: layers.MLP
    eps: float

    @nn.compact
    def __call__(self, x: Array, mask: Array) -> Array:
        x = layers.Norm(self.eps, name="norm_1")(x + self.attention(x, mask=mask))
        return layers.Norm(self.eps, name="norm_2")(x + self.mlp(x))
