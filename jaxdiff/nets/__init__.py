"""Flax Linen networks: `UNet` with its presets, `DiT`, `MLP`. They know no diffusion maths."""

from jaxdiff.nets.dit import DiT
from jaxdiff.nets.mlp import MLP
from jaxdiff.nets.unet import UNet, adm, ddpm_cifar10, edm_ddpmpp, small

__all__ = ["MLP", "DiT", "UNet", "adm", "ddpm_cifar10", "edm_ddpmpp", "small"]
