"""Flax Linen networks: `UNet` with presets, `DiT`, `MLP`; `SDUNet`, `ControlNet` and `IPAdapter`, autoencoders; the
published transformers `MMDiT` (Stable Diffusion 3), `Flux` and `LatentDiT`.

They know no diffusion maths.
"""

from jaxdiff.nets.controlnet import ControlNet
from jaxdiff.nets.dit import DiT
from jaxdiff.nets.flux import Flux
from jaxdiff.nets.ip_adapter import IPAdapter
from jaxdiff.nets.latent_dit import LatentDiT
from jaxdiff.nets.mlp import MLP
from jaxdiff.nets.mmdit import MMDiT
from jaxdiff.nets.sd_unet import SDUNet
from jaxdiff.nets.unet import UNet, adm, ddpm_cifar10, edm_ddpmpp, small
from jaxdiff.nets.vae import AutoencoderKL, AutoencoderTiny

__all__ = [
    "MLP",
    "AutoencoderKL",
    "AutoencoderTiny",
    "ControlNet",
    "DiT",
    "Flux",
    "IPAdapter",
    "LatentDiT",
    "MMDiT",
    "SDUNet",
    "UNet",
    "adm",
    "ddpm_cifar10",
    "edm_ddpmpp",
    "small",
]
