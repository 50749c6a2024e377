"""MMDiT, the transformer of Stable Diffusion 3 and 3.5: picture and text in one attention, each with its own weights.

    e = embedding(time, vector);   h = patches(x) + positions;   c = W tokens
    (h, c) = joint blocks (h, c, e), the last of which answers the picture alone;   y = W (LN(h) (1 + scale) + shift)

A sub-module `transformer_blocks_0/attn` is the published `transformer_blocks.0.attn`. Esser et al. 2024 (section 4).
"""

from typing import Any

import flax.linen as nn

from jaxdiff.errors import ConfigError
from jaxdiff.nets.conditioning import check_positive, check_remat, compute_dtype, dense, remat
from jaxdiff.nets.init import XAVIER
from jaxdiff.nets.joint import JointBlock, Modulation, Patches, TimeText, check_picture, check_told, modulate
from jaxdiff.nets.layers import ZEROS, depth_to_space
from jaxdiff.types import Array


class MMDiT(nn.Module):
    """`net.apply(params, x, time, tokens=, vector=)`: x (b, h, w, in_channels) -> (b, h, w, out_channels).

    time (b,) in [0, 1000]; tokens (b, L, token_dim); vector (b, vector_dim), the pooled texts. `dual`: the blocks in
    which the picture also attends to itself alone (3.5 medium); `qk_norm`: 3.5. The defaults are Stable Diffusion 3
    medium. Parameters float32, computation in `dtype`; `remat` as in `SDUNet`, a block at a time. Raises ConfigError
    for settings and inputs that do not fit.
    """

    depth: int = 24
    heads: int = 24
    head_dim: int = 64
    patch_size: int = 2
    in_channels: int = 16
    out_channels: int = 16
    token_dim: int = 4096
    vector_dim: int = 2048
    sample_size: int = 128
    max_positions: int = 192
    dual: tuple[int, ...] = ()
    qk_norm: bool = False
    remat: str = "none"
    dtype: Any = None

    def __post_init__(self):
        super().__post_init__()
        names = ("depth", "heads", "head_dim", "patch_size", "in_channels", "out_channels", "token_dim", "vector_dim")
        check_positive(**{name: getattr(self, name) for name in (*names, "sample_size", "max_positions")})
        check_remat(self.remat)
        if self.width % 8:
            raise ConfigError(f"heads * head_dim must be a multiple of 8, got {self.heads} * {self.head_dim}.")
        if self.sample_size < self.patch_size or any(not 0 <= i < self.depth for i in self.dual):
            raise ConfigError(
                f"dual must name blocks below {self.depth}, and sample_size be >= patch_size; got {self}."
            )

    @property
    def width(self) -> int:
        """Features of picture and text between the blocks."""
        return self.heads * self.head_dim

    @nn.compact
    def __call__(self, x: Array, time: Array, *, tokens: Array, vector: Array) -> Array:
        check_picture(x, time, self.in_channels, self.patch_size, self.max_positions)
        check_told(x, tokens=(tokens, (None, self.token_dim)), vector=(vector, (self.vector_dim,)))
        dtype, size = compute_dtype(x, self.dtype), self.patch_size
        e = TimeText(self.width, name="time_text_embed")(time, vector)
        patches = Patches(self.width, size, self.sample_size // size, self.max_positions, name="pos_embed")
        h = patches(x.astype(dtype))
        c = dense(tokens.astype(dtype), self.width, "context_embedder", XAVIER)
        block = remat(JointBlock, self.remat, ())
        for i in range(self.depth):
            settings = {"dual": i in self.dual, "last": i == self.depth - 1, "name": f"transformer_blocks_{i}"}
            h, c = block(self.heads, self.qk_norm, **settings)(h, c, e)
        scale, shift = Modulation(2, name="norm_out")(e, compute_dtype(x, None))
        h = modulate(h.astype(scale.dtype), shift, scale)
        h = dense(h, size**2 * self.out_channels, "proj_out", ZEROS)
        return depth_to_space(h.reshape(len(x), x.shape[1] // size, x.shape[2] // size, -1), size).astype(x.dtype)
