"""Flax Linen networks: `UNet` with presets, `DiT`, `MLP`; `SDUNet`, `ControlNet` and `IPAdapter`, autoencoders.

They know no diffusion maths.
"""

from jaxdiff.nets.controlnet import ControlNet
from jaxdiff.nets.dit import DiT
from jaxdiff.nets.ip_adapter import IPAdapter
from jaxdiff.nets.mlp import MLP
from jaxdiff.nets.sd_unet import SDUNet
from jaxdiff.nets.unet import UNet, adm, ddpm_cifar10, edm_ddpmpp, small
from jaxdiff.nets.vae import AutoencoderKL, AutoencoderTiny

__all__ = [
    "MLP",
    "AutoencoderKL",
    "AutoencoderTiny",
    "ControlNet",
    "DiT",
    "IPAdapter",
    "SDUNet",
    "UNet",
    "adm",
    "ddpm_cifar10",
    "edm_ddpmpp",
    "small",
]
