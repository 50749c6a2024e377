"""The diffusion transformer, DiT with adaLN-Zero, with optional cross-attention to text.

    (a1, b1, g1, a2, b2, g2) = W silu(e),  W = 0 at the start
    x = x + g1 attention(LN(x) (1 + a1) + b1)
    x = x + cross(x, tokens)                          where the network has token_dim; zero at the start
    x = x + g2 mlp(LN(x) (1 + a2) + b2)

Peebles & Xie 2023 (section 3.2, figure 3); cross-attention as in PixArt-alpha (Chen et al. 2024, section 2.3).
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxdiff.errors import ConfigError
from jaxdiff.nets import init, layers
from jaxdiff.nets.conditioning import (
    Context,
    Embedding,
    LayerNorm,
    check_common,
    check_inputs,
    check_positive,
    check_remat,
    compute_dtype,
    dense,
    remat,
    sinusoid,
)
from jaxdiff.types import Array

NORMAL = init.normal(0.02)


class DiTBlock(nn.Module):
    """One transformer block; x is (b, n, c), `embedding` (b, d) is already through its SiLU."""

    heads: int
    mlp_ratio: int = 4
    dropout: float = 0.0
    cross: bool = False

    @nn.compact
    def __call__(self, x: Array, embedding: Array, context: Any, deterministic: bool) -> Array:
        width = x.shape[-1]
        e = dense(embedding.astype(x.dtype), 6 * width, "modulation", layers.ZEROS)[:, None, :]
        a1, b1, g1, a2, b2, g2 = jnp.split(e, 6, axis=-1)
        h = LayerNorm(affine=False)(x) * (1 + a1) + b1
        x = x + g1 * layers.MultiHead(self.heads, out_init=init.XAVIER, name="attention")(h)
        if self.cross:
            x = x + layers.MultiHead(self.heads, name="cross")(x, *context)
        h = LayerNorm(affine=False)(x) * (1 + a2) + b2
        h = jax.nn.gelu(dense(h, self.mlp_ratio * width, "mlp_in", init.XAVIER), approximate=True)
        h = nn.Dropout(self.dropout)(h, deterministic=deterministic)
        return x + g2 * dense(h, width, "mlp_out", init.XAVIER)


class DiT(nn.Module):
    """`net.apply(params, x, time, labels=, vector=, tokens=, token_mask=)`: x (b, h, w, c) -> (b, h, w, out_channels).

    The defaults are DiT-S/2; B is depth 12, width 768, heads 12; L 24, 1024, 16; XL 28, 1152, 16. Any size is padded
    to a multiple of patch_size and cropped. Conditioning, `dtype`, `remat` and `deterministic` as in `UNet`.
    Raises ConfigError for settings or inputs that do not fit.
    """

    patch_size: int = 2
    width: int = 384
    depth: int = 12
    heads: int = 6
    mlp_ratio: int = 4
    dropout: float = 0.0
    out_channels: int | None = None
    time_scale: float = 1.0
    num_classes: int | None = None
    vector_dim: int | None = None
    token_dim: int | None = None
    remat: str = "none"
    dtype: Any = None

    def __post_init__(self):
        super().__post_init__()
        check_positive(
            patch_size=self.patch_size, width=self.width, depth=self.depth, heads=self.heads, mlp_ratio=self.mlp_ratio,
            out_channels=self.out_channels, num_classes=self.num_classes, vector_dim=self.vector_dim,
            token_dim=self.token_dim,
        )  # fmt: skip
        check_common(self.dropout, self.dtype)
        check_remat(self.remat)
        if self.width % self.heads or self.width % 8:
            raise ConfigError(f"width must be a multiple of heads ({self.heads}) and of 8, got {self.width}.")

    @nn.compact
    def __call__(
        self,
        x: Array,
        time: Array,
        *,
        labels: Array | None = None,
        vector: Array | None = None,
        tokens: Array | None = None,
        token_mask: Array | None = None,
        deterministic: bool = True,
    ) -> Array:
        inputs = {"labels": labels, "vector": vector, "tokens": tokens, "token_mask": token_mask}
        check_inputs(self, x, 4, time, inputs)
        dtype = compute_dtype(x, self.dtype)
        embedding = self._embedding()(time, labels, vector)
        context = None
        if self.token_dim is not None:
            context = Context(self.token_dim, dtype, name="context")(x.shape[0], tokens, token_mask)
        h = layers.space_to_depth(layers.pad_to_multiple(x, self.patch_size), self.patch_size).astype(dtype)
        b, rows, columns, _ = h.shape
        h = dense(h.reshape(b, rows * columns, -1), self.width, "patches", init.XAVIER)
        h = h + positions(rows, columns, self.width).astype(dtype)
        for i in range(self.depth):
            block = remat(DiTBlock, self.remat)(
                self.heads, self.mlp_ratio, self.dropout, self.token_dim is not None, name=f"block_{i}"
            )
            h = block(h, embedding, context, deterministic)
        h = self._out(h.astype(compute_dtype(x, None)), embedding, self.out_channels or x.shape[-1])
        h = layers.depth_to_space(h.reshape(b, rows, columns, -1), self.patch_size)
        return h[:, : x.shape[1], : x.shape[2]].astype(x.dtype)

    def _out(self, h: Array, embedding: Array, channels: int) -> Array:
        e = dense(embedding.astype(h.dtype), 2 * self.width, "out_modulation", layers.ZEROS)[:, None, :]
        scale, shift = jnp.split(e, 2, axis=-1)
        h = LayerNorm(affine=False)(h) * (1 + scale) + shift
        return dense(h, channels * self.patch_size**2, "out", layers.ZEROS)

    def _embedding(self) -> Embedding:
        return Embedding(
            features=self.width,
            frequencies=256,
            time_scale=self.time_scale,
            endpoint=False,
            num_classes=self.num_classes,
            vector_dim=self.vector_dim,
            kernel_init=NORMAL,
            class_init=NORMAL,
            name="time",
        )


def positions(rows: int, columns: int, width: int) -> Array:
    """Fixed 2-D sine-cosine positions (1, rows columns, width): half for the row, half for the column."""
    row = sinusoid(jnp.arange(rows, dtype=jnp.float32), width // 2, endpoint=False)
    column = sinusoid(jnp.arange(columns, dtype=jnp.float32), width // 2, endpoint=False)
    return jnp.concatenate([jnp.repeat(row, columns, axis=0), jnp.tile(column, (rows, 1))], axis=-1)[None]
