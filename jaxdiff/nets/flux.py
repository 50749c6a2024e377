"""The transformer of FLUX.1: joint blocks of picture and text, then blocks over both as one sequence, with rotations.

    e = embedding(time, vector, guidance);   h = W [2 x 2 latents];   c = W tokens;   (h, c) = joint blocks (h, c, e)
    z = [c, h];   z = z + gate W [attention(LN z), gelu(W LN z)]  ...;   y = W (LN(z_h) (1 + scale) + shift)

Queries and keys are turned by three angles: nothing, the row and the column of a patch; the text is at (0, 0, 0). A
sub-module `single_transformer_blocks_0/attn` is the published `single_transformer_blocks.0.attn`. Black Forest Labs
2024 (FLUX.1); parallel layers: Dehghani et al. 2023 (ViT-22B); guidance as an input: Meng et al. 2023.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.errors import ConfigError
from jaxdiff.nets.conditioning import check_positive, check_remat, compute_dtype, dense, remat
from jaxdiff.nets.init import XAVIER
from jaxdiff.nets.joint import (
    Attention,
    JointBlock,
    Modulation,
    Rotary,
    TimeText,
    check_picture,
    check_told,
    modulate,
)
from jaxdiff.nets.layers import ZEROS
from jaxdiff.types import Array

PACK = 2
"""Height and width of the latents that make one element of the sequence."""


class Flux(nn.Module):
    """`net.apply(params, x, time, tokens=, vector=, guidance=)`: x (b, h, w, in_channels) -> (b, h, w, out_channels).

    time (b,) in [0, 1000]; tokens (b, L, token_dim) of T5; vector (b, vector_dim), CLIP's pooled text; guidance (b,),
    where the network is `guided` (FLUX.1 dev; schnell is not). x is of unpacked latents, height and width even. `axes`:
    how many features of a head each of the three angles turns. The defaults are FLUX.1 schnell. Parameters float32,
    computation in `dtype`; `remat` as in `SDUNet`, a block at a time. Raises ConfigError for what does not fit.
    """

    depth: int = 19
    single_depth: int = 38
    heads: int = 24
    in_channels: int = 16
    out_channels: int = 16
    token_dim: int = 4096
    vector_dim: int = 768
    guided: bool = False
    axes: tuple[int, int, int] = (16, 56, 56)
    remat: str = "none"
    dtype: Any = None

    def __post_init__(self):
        super().__post_init__()
        names = ("depth", "single_depth", "heads", "in_channels", "out_channels", "token_dim", "vector_dim")
        check_positive(**{name: getattr(self, name) for name in names})
        check_remat(self.remat)
        if len(self.axes) != 3 or any(n < 2 or n % 2 for n in self.axes):
            raise ConfigError(f"axes must be three even numbers >= 2, got {self.axes}.")

    @property
    def width(self) -> int:
        """Features of picture and text between the blocks."""
        return self.heads * sum(self.axes)

    @nn.compact
    def __call__(
        self,
        x: Array,
        time: Array,
        *,
        tokens: Array,
        vector: Array,
        guidance: Array | None = None,
    ) -> Array:
        check_picture(x, time, self.in_channels, PACK)
        check_told(x, tokens=(tokens, (None, self.token_dim)), vector=(vector, (self.vector_dim,)))
        if self.guided:
            check_told(x, guidance=(guidance, ()))
        elif guidance is not None:
            raise ConfigError("guidance was given to a network that is not told it: leave it out.")
        dtype, (rows, columns) = compute_dtype(x, self.dtype), (n // PACK for n in x.shape[1:3])
        e = TimeText(self.width, name="time_text_embed")(time, vector, guidance)
        h = dense(pack(x.astype(dtype)), self.width, "x_embedder", XAVIER)
        c = dense(tokens.astype(dtype), self.width, "context_embedder", XAVIER)
        h = self._blocks(h, c, e, angles(c.shape[1], rows, columns, self.axes))
        scale, shift = Modulation(2, name="norm_out")(e, compute_dtype(x, None))
        h = modulate(h.astype(scale.dtype), shift, scale)
        return unpack(dense(h, PACK**2 * self.out_channels, "proj_out", ZEROS), rows, columns).astype(x.dtype)

    def _blocks(self, h: Array, c: Array, e: Array, rotary: Rotary) -> Array:
        joint, single = (remat(block, self.remat, ()) for block in (JointBlock, SingleBlock))
        for i in range(self.depth):
            h, c = joint(self.heads, norm=True, name=f"transformer_blocks_{i}")(h, c, e, rotary)
        z = jnp.concatenate([c, h], axis=1)
        for i in range(self.single_depth):
            z = single(self.heads, name=f"single_transformer_blocks_{i}")(z, e, rotary)
        return z[:, c.shape[1] :]


class SingleBlock(nn.Module):
    """Attention and the two layers of the MLP beside each other, over text and picture (b, n, c) as one sequence."""

    heads: int

    @nn.compact
    def __call__(self, z: Array, embedding: Array, rotary: Rotary) -> Array:
        width = z.shape[-1]
        shift, scale, gate = Modulation(3, name="norm")(embedding, z.dtype)
        h = modulate(z, shift, scale)
        y, _ = Attention(self.heads, norm=True, project=False, name="attn")(h, rotary=rotary)
        h = jax.nn.gelu(dense(h, 4 * width, "proj_mlp", XAVIER), approximate=True)
        return z + gate * dense(jnp.concatenate([y, h], axis=-1), width, "proj_out", XAVIER)


def pack(x: Array) -> Array:
    """(b, h, w, c) -> (b, h w / 4, 4 c): the four latents of a square by channel, each channel's four together."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // PACK, PACK, w // PACK, PACK, c).transpose(0, 1, 3, 5, 2, 4)
    return x.reshape(b, (h // PACK) * (w // PACK), c * PACK**2)


def unpack(x: Array, rows: int, columns: int) -> Array:
    """The inverse of `pack`, for so many rows and columns of squares."""
    b, _, c = x.shape
    x = x.reshape(b, rows, columns, c // PACK**2, PACK, PACK).transpose(0, 1, 4, 2, 5, 3)
    return x.reshape(b, rows * PACK, columns * PACK, c // PACK**2)


def angles(length: int, rows: int, columns: int, axes: tuple[int, ...]) -> Rotary:
    """Cosines and sines (length + rows columns, sum(axes) / 2) of text and picture; on the host, in float64 first."""
    grid = np.stack(np.meshgrid([0], np.arange(rows), np.arange(columns), indexing="ij"), axis=-1).reshape(-1, 3)
    place = np.concatenate([np.zeros((length, 3)), grid])
    angle = [place[:, i : i + 1] * 10_000.0 ** (-np.arange(0, n, 2) / n) for i, n in enumerate(axes)]
    angle = np.concatenate(angle, axis=-1)
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
