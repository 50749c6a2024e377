"""Published unconditional U-Nets: UNet2DModel of diffusers (DDPM's CIFAR-10, LSUN, CelebA), read and written back.

    net, params = pretrained.ddpm.load("ddpm-cifar10-32")
    eps = net.apply(params, x, time)                        x (b, h, w, 3) in [-1, 1], time the index of the chain

Here `attention_head_dim` is the width of a head, and null one head. Older files name attention query, key, value and
proj_attn.
"""

import os
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from jaxdiff.errors import CheckpointError
from jaxdiff.nets.sd_unet import SDUNet
from jaxdiff.pretrained import files, keys, unet
from jaxdiff.pretrained.layout import STEM, Settings, Shardings, Source, mirror, open_source, template
from jaxdiff.pretrained.vae import legacy
from jaxdiff.types import PyTree


def load(
    source: Source,
    config: Mapping[str, Any] | None = None,
    *,
    variant: str | None = None,
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    shardings: Shardings | None = None,
) -> tuple[SDUNet, PyTree]:
    """The network of a folder and its parameters, as `unet.load`."""
    tensors, settings = open_source(source, config, variant)
    net = network(settings, dtype=dtype)
    shapes = template(net, unet.example(net), param_dtype, shardings)
    return net, keys.load(shapes, tensors, legacy(mirror(shapes)))


def export(folder: str | os.PathLike, net: SDUNet, params: PyTree, *, dtype: Any = None) -> None:
    """Write a folder that diffusers loads as UNet2DModel."""
    files.write(folder, keys.export(params, mirror(params), dtype=dtype), config_of(net), stem=STEM)


def network(config: Mapping[str, Any], *, dtype: Any = None) -> SDUNet:
    """The network that a config.json describes. Raises CheckpointError for what it asks and is not known here."""
    read = Settings(config, unet.IGNORED)
    defaults = {"block_out_channels": (224, 448, 672, 896), "in_channels": 3, "out_channels": 3}
    for name, value in defaults.items():
        read.default(name, value)
    common = unet.shared(read)
    channels, count = common["channels"], len(common["channels"])
    attention = read.kinds("down_block_types", ["DownBlock2D", *["AttnDownBlock2D"] * (count - 1)], unet.DOWN, count)
    mirrored = [name for kind in reversed(attention) for name, same in unet.UP.items() if same == kind]
    read.one_of("up_block_types", mirrored, [mirrored, tuple(mirrored)])
    for name in ("downsample_type", "upsample_type"):
        read.one_of(name, "conv", ["conv"])
    read.one_of("mid_block_type", "UNetMidBlock2D", ["UNetMidBlock2D"])
    middle = "self" if read.flag("add_attention", True) else "none"
    if common["scale_shift"] and "self" in (middle, *attention):
        raise CheckpointError("config.json: scale_shift with attention without a norm is not known here.")
    # Left out, it is 8; null is one head.
    width = None if "attention_head_dim" in config and config["attention_head_dim"] is None else 8
    width = read.integer("attention_head_dim", width)
    net = SDUNet(
        **common, attention=attention, mid_attention=middle, token_dim=None, depth=(1,) * count, dtype=dtype,
        heads=tuple(max(1, c // (width or c)) for c in channels),
        down_padding=read.integer("downsample_padding", 1, least=0, most=1),
    )  # fmt: skip
    read.finish()
    return net


def config_of(net: SDUNet) -> dict[str, Any]:
    """The config.json by which diffusers builds the same network. Raises CheckpointError where it has none."""
    widths = {c // heads for c, heads in zip(net.channels, net.heads, strict=True)}
    if len(widths) > 1 and any(heads > 1 for heads in net.heads):
        raise CheckpointError(f"UNet2DModel has one width for all heads; these are {sorted(widths)}.")
    return unet.shared_config(net) | {
        "_class_name": "UNet2DModel",
        "mid_block_type": "UNetMidBlock2D",
        "attention_head_dim": None if set(net.heads) == {1} else widths.pop(),
        "add_attention": net.mid_attention == "self",
    }
