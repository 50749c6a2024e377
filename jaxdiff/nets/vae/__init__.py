"""Autoencoders of pictures: `AutoencoderKL`, `AutoencoderTiny`, and `tiled` for pictures larger than memory."""

from jaxdiff.nets.vae.kl import AutoencoderKL, Latents
from jaxdiff.nets.vae.tiles import tiled
from jaxdiff.nets.vae.tiny import AutoencoderTiny

__all__ = ["AutoencoderKL", "AutoencoderTiny", "Latents", "tiled"]
