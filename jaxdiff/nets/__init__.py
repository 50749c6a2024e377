"""Flax Linen networks: `UNet` with its presets, `DiT`, `MLP`; `SDUNet` and autoencoders of latent diffusion.

They know no diffusion maths.
"""

from jaxdiff.nets.dit import DiT
from jaxdiff.nets.mlp import MLP
from jaxdiff.nets.sd_unet import SDUNet
from jaxdiff.nets.unet import UNet, adm, ddpm_cifar10, edm_ddpmpp, small
from jaxdiff.nets.vae import AutoencoderKL, AutoencoderTiny

__all__ = [
    "MLP",
    "AutoencoderKL",
    "AutoencoderTiny",
    "DiT",
    "SDUNet",
    "UNet",
    "adm",
    "ddpm_cifar10",
    "edm_ddpmpp",
    "small",
]
