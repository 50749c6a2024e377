"""Other people's weights: read from safetensors, checked key by key, and written back for their libraries.

pipe = pretrained.pipelines.load(folder)        Stable Diffusion 1, 2, XL, 3, FLUX, DiT: see `jaxdiff.pipelines`
"""

from jaxdiff.pretrained import (
    controlnet,
    ddpm,
    files,
    inversion,
    ip_adapter,
    keys,
    lora,
    pipelines,
    schedulers,
    single_file,
    text,
    transformer,
    unet,
    vae,
)

__all__ = [
    "controlnet",
    "ddpm",
    "files",
    "inversion",
    "ip_adapter",
    "keys",
    "lora",
    "pipelines",
    "schedulers",
    "single_file",
    "text",
    "transformer",
    "unet",
    "vae",
]
