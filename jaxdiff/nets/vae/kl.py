"""The autoencoder of latent diffusion, AutoencoderKL (KL-f8 and its relatives).

    encode   q(z | x) = N(mean, exp(log_variance)):  conv, [residual blocks, down] per level, middle, norm, conv
    decode   x = conv, middle, [residual blocks, up] per level, norm, conv
    the latents that a diffusion model sees:  (z - shift) scale

Rombach et al. 2022, section 3.1 and appendix G; Esser et al. 2024 for the shift. GroupNorm eps 1e-6; down-sampling
pads after the last row and column only. Names of parameters: see `ldm`.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from jaxdiff.errors import ConfigError
from jaxdiff.nets.conditioning import check_positive, compute_dtype
from jaxdiff.nets.layers import Conv, GroupNorm
from jaxdiff.nets.ldm import AFTER, Attends, Stack, Style
from jaxdiff.types import Array

LOG_VARIANCE = (-30.0, 20.0)


class Latents(NamedTuple):
    """What an encoder says of a picture: the mean and log-variance (b, h, w, c) of its z; no variance is exact."""

    mean: Array
    log_variance: Array | None = None


class AutoencoderKL(nn.Module):
    """`vae.apply(params, x, method="encode")` -> Latents, `vae.apply(params, z, method="decode")` -> x in [-1, 1].

    x (b, h, w, image_channels), h and w multiples of `factor`; z (b, h / factor, w / factor, latent_channels). The
    defaults are Stable Diffusion's. `normalize(z)` and `unnormalize(z)` go to the latents of the diffusion model and
    back. `dtype` is that of computation. Raises ConfigError for shapes that do not fit.
    """

    channels: tuple[int, ...] = (128, 256, 512, 512)
    num_blocks: int = 2
    latent_channels: int = 4
    image_channels: int = 3
    groups: int = 32
    mid_attention: bool = True
    quant: bool = True
    post_quant: bool = True
    scale: float = 0.18215
    shift: float = 0.0
    dtype: Any = None

    def __post_init__(self):
        super().__post_init__()
        check_positive(num_blocks=self.num_blocks, latent_channels=self.latent_channels, groups=self.groups)
        if not self.channels or any(width % self.groups for width in self.channels):
            raise ConfigError(f"channels must be multiples of groups={self.groups}, got {self.channels}.")

    @property
    def factor(self) -> int:
        """How much smaller the latents are than the picture: 8."""
        return 2 ** (len(self.channels) - 1)

    def setup(self):
        style = Style(self.groups, padding=AFTER)
        common = (self.channels, self.num_blocks, self.mid_attention, style)
        self.encoder = Encoder(2 * self.latent_channels, *common)
        self.decoder = Decoder(self.image_channels, *common)
        if self.quant:
            self.quant_conv = Conv(2 * self.latent_channels, size=1)
        if self.post_quant:
            self.post_quant_conv = Conv(self.latent_channels, size=1)

    def encode(self, x: Array) -> Latents:
        """The distribution of z for pictures x in [-1, 1]."""
        check_picture(x, self.image_channels, self.factor)
        h = self.encoder(x.astype(compute_dtype(x, self.dtype)))
        h = (self.quant_conv(h) if self.quant else h).astype(compute_dtype(x, None))
        return Latents(h[..., : self.latent_channels], jnp.clip(h[..., self.latent_channels :], *LOG_VARIANCE))

    def decode(self, z: Array) -> Array:
        """Pictures from z, as the encoder gives it."""
        check_picture(z, self.latent_channels, 1)
        h = z.astype(compute_dtype(z, self.dtype))
        h = self.post_quant_conv(h) if self.post_quant else h
        return self.decoder(h).astype(compute_dtype(z, None))

    def __call__(self, x: Array) -> Array:
        """Encode and decode, by the mean: what `init` runs."""
        return self.decode(self.encode(x).mean)

    @nn.nowrap
    def normalize(self, z: Array) -> Array:
        """(z - shift) scale: the data of the diffusion model."""
        return (z - self.shift) * self.scale

    @nn.nowrap
    def unnormalize(self, z: Array) -> Array:
        """z / scale + shift."""
        return z / self.scale + self.shift


class Encoder(nn.Module):
    """Pictures to 2 x latent_channels maps, before `quant_conv`."""

    out_channels: int
    channels: tuple[int, ...]
    num_blocks: int
    mid_attention: bool
    style: Style

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = Conv(self.channels[0], name="conv_in")(x)
        for i, width in enumerate(self.channels):
            to = "down" if i < len(self.channels) - 1 else "none"
            level = Stack(width, self.num_blocks, Attends(), self.style, resample=to, name=f"down_blocks_{i}")
            x, _ = level(x, None, None, ())
        x = _middle(x, self.mid_attention, self.style)
        return _last(x, self.out_channels, self.style)


class Decoder(nn.Module):
    """z, after `post_quant_conv`, to pictures."""

    out_channels: int
    channels: tuple[int, ...]
    num_blocks: int
    mid_attention: bool
    style: Style

    @nn.compact
    def __call__(self, z: Array) -> Array:
        x = _middle(Conv(self.channels[-1], name="conv_in")(z), self.mid_attention, self.style)
        for i, width in enumerate(reversed(self.channels)):
            to = "up" if i < len(self.channels) - 1 else "none"
            level = Stack(width, self.num_blocks + 1, Attends(), self.style, resample=to, name=f"up_blocks_{i}")
            x, _ = level(x, None, None, ())
        return _last(x, self.out_channels, self.style)


def _middle(x: Array, attention: bool, style: Style) -> Array:
    attends = Attends("self" if attention else "none")
    return Stack(x.shape[-1], 1, attends, style, middle=True, name="mid_block")(x, None, None, ())[0]


def _last(x: Array, features: int, style: Style) -> Array:
    x = GroupNorm(style.groups, style.eps, silu=True, name="conv_norm_out")(x)
    return Conv(features, name="conv_out")(x)


def check_picture(x: Array, channels: int, multiple: int) -> None:
    """Raise ConfigError unless x is a floating (b, h, w, channels) whose h and w are multiples of `multiple`."""
    fits = x.ndim == 4 and x.shape[-1] == channels and jnp.issubdtype(x.dtype, jnp.floating)
    if not fits or x.shape[1] % multiple or x.shape[2] % multiple:
        raise ConfigError(
            f"need a floating array (b, h, w, {channels}) with h and w multiples of {multiple}, got {x.dtype}{x.shape}."
        )
