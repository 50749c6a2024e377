"""The tiny autoencoders: TAESD (SD, SDXL, SD3, FLUX latents) and TAEF2 (FLUX.2), convolutions and ReLU only.

    block    y = relu(x + conv(relu(conv(relu(conv(x))))))
    TAEF2's deepest level first adds  W2 relu(groupnorm(W1 x)),  with 4 groups, to x
    encode   conv, block, [conv of stride 2, 3 blocks] x 3, conv         of (x + 1) / 2
    decode   conv of 3 tanh(z / 3), relu, [3 blocks, up, conv] x 3, block, conv       2 y - 1

Their z are the latents of the diffusion model themselves: nothing is scaled. Bohan 2023, published code and weights.
`layers_4` of encoder or decoder is the published `layers.4` (counted as diffusers does, without the clamp).
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxdiff.nets.conditioning import compute_dtype
from jaxdiff.nets.init import XAVIER
from jaxdiff.nets.layers import Conv, GroupNorm
from jaxdiff.nets.ldm import CENTRED
from jaxdiff.nets.vae.kl import Latents, check_picture
from jaxdiff.types import Array

POOL_GROUPS = 4
POOL_EPS = 1e-5


class AutoencoderTiny(nn.Module):
    """`encode` and `decode` as those of `AutoencoderKL`; encoding has no variance, and `normalize` does nothing.

    `blocks` counts the residual blocks of each level of the encoder; the decoder has them in reverse. `pool` is TAEF2's
    branch: AutoencoderTiny(latent_channels=32, pool=True). Raises ConfigError for shapes that do not fit.
    """

    channels: int = 64
    blocks: tuple[int, ...] = (1, 3, 3, 3)
    latent_channels: int = 4
    image_channels: int = 3
    pool: bool = False
    dtype: Any = None

    @property
    def factor(self) -> int:
        """How much smaller the latents are than the picture: 8."""
        return 2 ** (len(self.blocks) - 1)

    def setup(self):
        self.encoder = TinyEncoder(self.channels, self.blocks, self.latent_channels, self.pool)
        self.decoder = TinyDecoder(self.channels, self.blocks, self.image_channels, self.pool)

    def encode(self, x: Array) -> Latents:
        """The latents of pictures x in [-1, 1]."""
        check_picture(x, self.image_channels, self.factor)
        z = self.encoder((x.astype(compute_dtype(x, self.dtype)) + 1) / 2)
        return Latents(z.astype(compute_dtype(x, None)))

    def decode(self, z: Array) -> Array:
        """Pictures from latents; not clipped to [-1, 1]."""
        check_picture(z, self.latent_channels, 1)
        x = self.decoder(3 * jnp.tanh(z.astype(compute_dtype(z, self.dtype)) / 3))
        return 2 * x.astype(compute_dtype(z, None)) - 1

    def __call__(self, x: Array) -> Array:
        """Encode and decode: what `init` runs."""
        return self.decode(self.encode(x).mean)

    @nn.nowrap
    def normalize(self, z: Array) -> Array:
        """z itself."""
        return z

    @nn.nowrap
    def unnormalize(self, z: Array) -> Array:
        """z itself."""
        return z


class TinyBlock(nn.Module):
    """Three convolutions and their residual, after the pooled branch of TAEF2 where asked."""

    pool: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:
        channels = x.shape[-1]
        if self.pool:
            h = Conv(4 * channels, size=1, bias=False, name="pool_0")(x)
            h = jax.nn.relu(GroupNorm(POOL_GROUPS, POOL_EPS, name="pool_1")(h))
            x = x + Conv(channels, size=1, bias=False, name="pool_3")(h)
        h = jax.nn.relu(Conv(channels, name="conv_0")(x))
        h = jax.nn.relu(Conv(channels, name="conv_2")(h))
        return jax.nn.relu(x + Conv(channels, name="conv_4")(h))


class TinyEncoder(nn.Module):
    """Pictures in [0, 1] to latents."""

    channels: int
    blocks: tuple[int, ...]
    out_channels: int
    pool: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:
        place = 0
        for level, count in enumerate(self.blocks):
            if level == 0:
                x = Conv(self.channels, name="layers_0")(x)
            else:
                x = Conv(self.channels, stride=2, padding=CENTRED, bias=False, name=f"layers_{place}")(x)
            pool = self.pool and level == len(self.blocks) - 1
            for i in range(count):
                x = TinyBlock(pool, name=f"layers_{place + 1 + i}")(x)
            place += 1 + count
        return Conv(self.out_channels, name=f"layers_{place}")(x)


class TinyDecoder(nn.Module):
    """Latents, already clamped, to pictures in [0, 1]."""

    channels: int
    blocks: tuple[int, ...]
    out_channels: int
    pool: bool

    @nn.compact
    def __call__(self, z: Array) -> Array:
        x, place = jax.nn.relu(Conv(self.channels, name="layers_0")(z)), 2
        for level, count in enumerate(reversed(self.blocks)):
            for i in range(count):
                x = TinyBlock(self.pool and level == 0, name=f"layers_{place + i}")(x)
            place += count + 1  # the up-sampling is a layer of theirs
            if level < len(self.blocks) - 1:
                x = Conv(self.channels, upsample=True, bias=False, init=XAVIER, name=f"layers_{place}")(x)
                place += 1
        return Conv(self.out_channels, name=f"layers_{place - 1}")(x)
