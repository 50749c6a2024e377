"""Published U-Nets: UNet2DConditionModel of diffusers (Stable Diffusion 1, 2, XL), read and written back.

    net, params = pretrained.unet.load("stable-diffusion-v1-5/unet")
    eps = net.apply(params, x, time, tokens=tokens)

What their config means: `attention_head_dim` is the number of heads (8 heads in SD 1, a list in SD 2 and XL);
`freq_shift` 1 puts the slowest wave at 1 / 10000; `projection_class_embeddings_input_dim` is the width of XL's pooled
text and its six sizes together.
"""

import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxdiff.nets.sd_unet import NUM_SIZES, SDUNet
from jaxdiff.pretrained import files, keys
from jaxdiff.pretrained.layout import STEM, Settings, Shardings, Source, mirror, open_source, template, zeros
from jaxdiff.types import PyTree

DOWN = {"DownBlock2D": "none", "CrossAttnDownBlock2D": "cross", "AttnDownBlock2D": "self"}
UP = {"UpBlock2D": "none", "CrossAttnUpBlock2D": "cross", "AttnUpBlock2D": "self"}
IGNORED = ("sample_size", "dropout", "upcast_attention", "num_train_timesteps")
"""Keys that change nothing here: the softmax is float32 in any case, and no published network is used with dropout."""

_ONLY: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu", "swish"), "mid_block_scale_factor": (1,), "resnet_out_scale_factor": (1,),
    "time_embedding_type": ("positional",), "conv_in_kernel": (3,), "conv_out_kernel": (3,),
    "attention_type": ("default",), "addition_embed_type_num_heads": (64,),
}  # fmt: skip


def load(
    source: Source,
    config: Mapping[str, Any] | None = None,
    *,
    variant: str | None = None,
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    shardings: Shardings | None = None,
) -> tuple[SDUNet, PyTree]:
    """The U-Net of a folder `unet/` and its parameters; `dtype` is that of the computation.

    `config` as in config.json, read from the folder where it is not given; `param_dtype` of a half-precision file keeps
    its size. Raises CheckpointError or UnsafeFileError for files that do not fit or are not read.
    """
    tensors, settings = open_source(source, config, variant)
    net = network(settings, dtype=dtype)
    shapes = template(net, example(net), param_dtype, shardings)
    return net, keys.load(shapes, tensors, mirror(shapes))


def export(folder: str | os.PathLike, net: SDUNet, params: PyTree, *, dtype: Any = None) -> None:
    """Write a folder that diffusers loads as UNet2DConditionModel; `dtype` e.g. np.float16, None as they are."""
    files.write(folder, keys.export(params, mirror(params), dtype=dtype), config_of(net), stem=STEM)


def network(config: Mapping[str, Any], *, dtype: Any = None) -> SDUNet:
    """The network that a config.json describes. Raises CheckpointError for what it asks and is not known here."""
    read = Settings(config, IGNORED)
    net = SDUNet(**conditional(read), dtype=dtype)
    read.finish()
    return net


def conditional(read: Settings) -> dict[str, Any]:
    """The settings of a UNet2DConditionModel, which a ControlNetModel has too."""
    common = shared(read)
    count = len(common["channels"])
    head = {"attention": _levels(read, count), "heads": read.integers("attention_head_dim", 8, count=count)}
    head["depth"] = read.integers("transformer_layers_per_block", 1, count=count, most=64)
    read.one_of("mid_block_type", "UNetMidBlock2DCrossAttn", ["UNetMidBlock2DCrossAttn"])
    added = read.one_of("addition_embed_type", "none", ["none", "text_time"]) == "text_time"
    size_features = read.integer("addition_time_embed_dim", 256 if added else None)
    joined = read.integer("projection_class_embeddings_input_dim", None, most=2**20)
    return common | head | {
        "mid_attention": "cross", "token_dim": read.integer("cross_attention_dim", 1280),
        "linear_projection": read.flag("use_linear_projection", False),
        "down_padding": read.integer("downsample_padding", 1, least=0, most=1),
        "vector_dim": joined - NUM_SIZES * size_features if added and joined else None,
        "size_features": size_features or 256,
    }  # fmt: skip


def sample_size(config: Mapping[str, Any]) -> int:
    """The height, and width, of the latents that it was trained on."""
    return Settings(config).integer("sample_size", 64)


def shared(read: Settings) -> dict[str, Any]:
    """The settings that UNet2DConditionModel and UNet2DModel have in common."""
    for name, allowed in _ONLY.items():
        read.one_of(name, allowed[0], allowed)
    return {
        "channels": read.integers("block_out_channels", (320, 640, 1280, 1280)),
        "num_blocks": read.integer("layers_per_block", 2, most=64),
        "in_channels": read.integer("in_channels", 4),
        "out_channels": read.integer("out_channels", 4),
        "num_classes": read.integer("num_class_embeds", None, most=2**20),
        "groups": read.integer("norm_num_groups", 32),
        "eps": read.number("norm_eps", 1e-5),
        "scale_shift": read.one_of("resnet_time_scale_shift", "default", ["default", "scale_shift"]) == "scale_shift",
        "sines_first": not read.flag("flip_sin_to_cos", True),
        "time_endpoint": read.integer("freq_shift", 0, least=0, most=1) == 1,
    }


def _levels(read: Settings, count: int) -> tuple[Any, ...]:
    default = [*["CrossAttnDownBlock2D"] * (count - 1), "DownBlock2D"]
    down = read.kinds("down_block_types", default, DOWN, count)
    mirrored = [name for kind in reversed(down) for name, same in UP.items() if same == kind]
    read.one_of("up_block_types", mirrored, [mirrored, tuple(mirrored)])
    return down


def example(net: SDUNet) -> dict[str, Any]:
    """Inputs of the shapes that `net` takes."""
    side = 2 ** (len(net.channels) - 1)
    inputs = {"x": zeros(1, side, side, net.in_channels), "time": zeros(1)}
    if net.token_dim is not None:
        inputs["tokens"] = zeros(1, 1, net.token_dim)
    if net.vector_dim is not None:
        inputs |= {"vector": zeros(1, net.vector_dim), "sizes": zeros(1, NUM_SIZES)}
    if net.num_classes is not None:
        inputs["labels"] = jax.ShapeDtypeStruct((1,), jnp.int32)
    return inputs


def config_of(net: SDUNet) -> dict[str, Any]:
    """The config.json by which diffusers builds the same network."""
    config = shared_config(net) | {
        "_class_name": "UNet2DConditionModel",
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "attention_head_dim": list(net.heads),
        "transformer_layers_per_block": list(net.depth),
        "cross_attention_dim": net.token_dim,
        "use_linear_projection": net.linear_projection,
    }
    if net.vector_dim is not None:
        joined = net.vector_dim + NUM_SIZES * net.size_features
        config |= {"addition_embed_type": "text_time", "addition_time_embed_dim": net.size_features}
        config["projection_class_embeddings_input_dim"] = joined
    return config


def shared_config(net: SDUNet) -> dict[str, Any]:
    """The part that UNet2DConditionModel and UNet2DModel have in common."""
    by_kind = [{kind: name for name, kind in table.items()} for table in (DOWN, UP)]
    return {
        "block_out_channels": list(net.channels), "layers_per_block": net.num_blocks,
        "in_channels": net.in_channels, "out_channels": net.out_channels, "num_class_embeds": net.num_classes,
        "norm_num_groups": net.groups, "norm_eps": net.eps, "downsample_padding": net.down_padding,
        "resnet_time_scale_shift": "scale_shift" if net.scale_shift else "default",
        "flip_sin_to_cos": not net.sines_first, "freq_shift": int(net.time_endpoint),
        "down_block_types": [by_kind[0][kind] for kind in net.attention],
        "up_block_types": [by_kind[1][kind] for kind in reversed(net.attention)],
    }  # fmt: skip
