"""The published DiT: classes of ImageNet drawn in the latents of an autoencoder, as diffusers writes it.

    e_i = silu(W2 silu(W1 sinusoid(time)) + class), of its own weights in each block
    x = x + gate attention(LN(x) (1 + scale) + shift);   x = x + gate' mlp(LN'(x) (1 + scale') + shift')
    y = W (LN(x) (1 + scale) + shift),  (shift, scale) = W e_0

`DiT` is the network to train from scratch; it has one embedding for all blocks, and text. Here the names, the order of
the positions and the two epsilons are those of the published weights. Peebles & Xie 2023.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxdiff.errors import ConfigError
from jaxdiff.nets.conditioning import check_positive, check_remat, compute_dtype, dense, remat, sinusoid
from jaxdiff.nets.init import normal
from jaxdiff.nets.joint import FREQUENCIES, MLP, Attention, Patches, check_picture, check_told, modulate
from jaxdiff.nets.layers import ZEROS, depth_to_space
from jaxdiff.nets.sd_unet import TwoLayers
from jaxdiff.types import Array


class LatentDiT(nn.Module):
    """`net.apply(params, x, time, labels=)`: x (b, h, w, in_channels) -> (b, h, w, out_channels).

    time (b,): the index of a chain; labels (b,), any outside [0, num_classes) for no class. Where out_channels is twice
    in_channels, the second half is a learned variance. `eps`: of the norm before the MLP. The defaults are DiT-XL/2.
    Parameters float32, computation in `dtype`; `remat` as in `SDUNet`, a block at a time. Raises ConfigError for
    settings and inputs that do not fit.
    """

    depth: int = 28
    heads: int = 16
    head_dim: int = 72
    patch_size: int = 2
    in_channels: int = 4
    out_channels: int = 8
    num_classes: int = 1000
    sample_size: int = 32
    eps: float = 1e-5
    remat: str = "none"
    dtype: Any = None

    def __post_init__(self):
        super().__post_init__()
        names = ("depth", "heads", "head_dim", "patch_size", "in_channels", "out_channels", "num_classes")
        check_positive(**{name: getattr(self, name) for name in (*names, "sample_size")})
        check_remat(self.remat)
        if self.width % 8 or self.sample_size < self.patch_size:
            raise ConfigError(f"heads * head_dim must be a multiple of 8, sample_size >= patch_size, got {self}.")

    @property
    def width(self) -> int:
        """Features between the blocks."""
        return self.heads * self.head_dim

    @nn.compact
    def __call__(self, x: Array, time: Array, *, labels: Array) -> Array:
        check_picture(x, time, self.in_channels, self.patch_size)
        check_told(x, labels=(labels, ()))
        dtype, size = compute_dtype(x, self.dtype), self.patch_size
        known = (labels >= 0) & (labels < self.num_classes)
        labels = jnp.where(known, labels, self.num_classes)
        h = Patches(self.width, size, self.sample_size // size, name="pos_embed")(x.astype(dtype))
        block = remat(Block, self.remat, ())
        embeddings = []
        for i in range(self.depth):
            h, e = block(self.heads, self.num_classes, self.eps, name=f"transformer_blocks_{i}")(h, time, labels)
            embeddings.append(e)
        wide = compute_dtype(x, None)
        out = dense(embeddings[0].astype(wide), 2 * self.width, "proj_out_1", ZEROS)[:, None]
        shift, scale = jnp.split(out, 2, axis=-1)
        h = dense(modulate(h.astype(wide), shift, scale), size**2 * self.out_channels, "proj_out_2", ZEROS)
        return depth_to_space(h.reshape(len(x), x.shape[1] // size, x.shape[2] // size, -1), size).astype(x.dtype)


class Block(nn.Module):
    """x (b, n, c), time (b,), labels (b,) in [0, num_classes] -> x and the embedding that modulated it."""

    heads: int
    num_classes: int
    eps: float

    @nn.compact
    def __call__(self, x: Array, time: Array, labels: Array) -> tuple[Array, Array]:
        (shift, scale, gate, *of_mlp), e = ClassModulation(x.shape[-1], self.num_classes, name="norm1")(
            time, labels, x.dtype
        )
        y, _ = Attention(self.heads, name="attn1")(modulate(x, shift, scale))
        x = x + gate * y
        shift, scale, gate = of_mlp
        return x + gate * MLP(name="ff")(modulate(x, shift, scale, self.eps)), e


class ClassModulation(nn.Module):
    """Six vectors (b, 1, c) made of time and class, and the embedding (b, c) that they are made of."""

    features: int
    num_classes: int

    @nn.compact
    def __call__(self, time: Array, labels: Array, dtype: Any) -> tuple[list[Array], Array]:
        e = ClassEmbedding(self.features, self.num_classes, name="emb")(time, labels)
        parts = dense(e.astype(dtype), 6 * self.features, "linear", ZEROS)
        return jnp.split(parts[:, None, :], 6, axis=-1), e


class ClassEmbedding(nn.Module):
    """Time and class as one embedding (b, c), through its SiLU; the row after the last class is that of none."""

    features: int
    num_classes: int

    @nn.compact
    def __call__(self, time: Array, labels: Array) -> Array:
        # Here the slowest wave is exactly 1 / 10000, as in diffusers.
        waves = jnp.roll(sinusoid(time, FREQUENCIES, endpoint=True), FREQUENCIES // 2, axis=-1)
        e = TwoLayers(self.features, name="timestep_embedder")(waves)
        return jax.nn.silu(e + ClassTable(self.features, self.num_classes, name="class_embedder")(labels))


class ClassTable(nn.Module):
    """One row for each class, and one for none."""

    features: int
    num_classes: int

    @nn.compact
    def __call__(self, labels: Array) -> Array:
        return nn.Embed(self.num_classes + 1, self.features, embedding_init=normal(0.02), name="embedding_table")(
            labels
        )
