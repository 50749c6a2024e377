"""Published autoencoders: AutoencoderKL and AutoencoderTiny of diffusers, and TAESD's own files; read and written back.

    net, params = pretrained.vae.load("stable-diffusion-v1-5/vae")
    z = net.normalize(net.apply(params, x, method="encode").mean)

Older files name the attention of an AutoencoderKL query, key, value and proj_attn; all give the same parameters.
TAESD's own files (encoder.safetensors and decoder.safetensors, or both in one) have no config: they say it themselves.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from jaxdiff.errors import CheckpointError, ConfigError
from jaxdiff.nets.vae import AutoencoderKL, AutoencoderTiny
from jaxdiff.pretrained import files, keys
from jaxdiff.pretrained.keys import Rule
from jaxdiff.pretrained.layout import STEM, Settings, Shardings, Source, mirror, open_source, template, zeros
from jaxdiff.types import PyTree

IGNORED = ("sample_size", "force_upcast")
_LEGACY = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out": "proj_attn"}
_POINTS = keys.Transform(lambda x: x[:, :, 0, 0].transpose(1, 0), lambda x: x.transpose(1, 0)[:, :, None, None])
"""A linear layer that is a 1 x 1 convolution in the other layout."""


def load(
    source: Source,
    config: Mapping[str, Any] | None = None,
    *,
    variant: str | None = None,
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    shardings: Shardings | None = None,
) -> tuple[AutoencoderKL | AutoencoderTiny, PyTree]:
    """The autoencoder of a folder `vae/` and its parameters; `dtype` is that of the computation.

    `config` as in config.json, read from the folder where it is not given. Raises CheckpointError or UnsafeFileError
    for files that do not fit or are not read.
    """
    tensors, settings = open_source(source, config, variant)
    net = network(settings, dtype=dtype)
    return net, _load(net, tensors, param_dtype, shardings)


def tiny(folder: str | os.PathLike, *, dtype: Any = None) -> tuple[AutoencoderTiny, PyTree]:
    """TAESD, TAEF1, TAEF2 as their author publishes them: a folder with encoder.safetensors and decoder.safetensors."""
    parts = {name: files.read(Path(folder) / f"{name}.safetensors") for name in ("encoder", "decoder")}
    tensors = {}
    for name, part in parts.items():
        for key, tensor in part.items():
            number, dot, rest = key.partition(".")
            if not number.isdecimal() or not dot:
                raise CheckpointError(f"{folder}: {key} is not a layer of a tiny autoencoder, whose names are numbers.")
            # Their decoder counts the clamp of its input as layer 0; that of diffusers does not.
            tensors[f"{name}.layers.{int(number) - (name == 'decoder')}.{rest}"] = tensor
    last = max((int(key.split(".")[2]) for key in tensors if key.startswith("encoder.")), default=0)
    end = tensors.get(f"encoder.layers.{last}.weight")
    if end is None:
        raise CheckpointError(f"{folder} holds no tiny autoencoder: its encoder does not end with a convolution.")
    pool = any(".pool." in key for key in tensors)
    net = AutoencoderTiny(latent_channels=int(end.shape[0]), pool=pool, dtype=dtype)
    return net, _load(net, tensors, jnp.float32, None)


def export(
    folder: str | os.PathLike, net: AutoencoderKL | AutoencoderTiny, params: PyTree, *, dtype: Any = None
) -> None:
    """Write a folder that diffusers loads; `dtype` e.g. np.float16. Raises ConfigError for TAEF2, which it has not."""
    files.write(folder, keys.export(params, mirror(params), dtype=dtype), config_of(net), stem=STEM)


def network(config: Mapping[str, Any], *, dtype: Any = None) -> AutoencoderKL | AutoencoderTiny:
    """The autoencoder that a config.json describes. Raises CheckpointError for what it asks and is not known here."""
    read = Settings(config, IGNORED)
    make = {"AutoencoderKL": _kl, "AutoencoderTiny": _tiny}
    kind = config.get("_class_name", "AutoencoderKL")
    if not isinstance(kind, str) or kind not in make:
        raise CheckpointError(f"config.json: _class_name must be one of {', '.join(make)}, got {kind!r:.60}.")
    net = make[kind](read).clone(dtype=dtype)
    read.finish()
    return net


def legacy(table: list[Rule]) -> list[Rule]:
    """`table` and the older names of attention, as linear layers or, in original files, as 1 x 1 convolutions."""
    older = []
    for rule in table:
        for name, old in _LEGACY.items():
            module, _, leaf = rule.theirs.rpartition(".")
            before, found, _ = module.partition(f".{name}")
            if found and ".attentions." in before and ".transformer_blocks" not in before:
                older.append(Rule(rule.ours, f"{before}.{old}.{leaf}", rule.transform))
                points = _POINTS if leaf == "weight" else keys.SAME
                original = "proj_out" if old == "proj_attn" else old[0]
                older.append(Rule(rule.ours, f"{before}.{original}.{leaf}", points))
    return [*table, *older]


def _load(net: Any, tensors: Mapping[str, Any], dtype: Any, shardings: Shardings | None) -> PyTree:
    shapes = template(net, {"x": zeros(1, net.factor, net.factor, net.image_channels)}, dtype, shardings)
    return keys.load(shapes, tensors, legacy(mirror(shapes)))


def _kl(read: Settings) -> AutoencoderKL:
    channels = read.integers("block_out_channels", (64,))
    for name, block in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        read.kinds(name, [block] * len(channels), {block: ""}, len(channels))
    read.one_of("act_fn", "silu", ["silu", "swish"])
    image = read.integer("in_channels", 3)
    read.one_of("out_channels", image, [image])
    return AutoencoderKL(
        channels, read.integer("layers_per_block", 1, most=64), read.integer("latent_channels", 4), image,
        read.integer("norm_num_groups", 32), read.flag("mid_block_add_attention", True),
        read.flag("use_quant_conv", True), read.flag("use_post_quant_conv", True),
        read.number("scaling_factor", 0.18215), read.number("shift_factor", 0.0),
    )  # fmt: skip


def _tiny(read: Settings) -> AutoencoderTiny:
    blocks = read.integers("num_encoder_blocks", (1, 3, 3, 3), most=64)
    widths = [
        read.integers(name, (64,) * len(blocks), count=len(blocks))
        for name in ("encoder_block_out_channels", "decoder_block_out_channels", "block_out_channels")
    ]
    if len({w for several in widths for w in several}) > 1:
        raise CheckpointError(f"config.json: the levels of a tiny autoencoder must be equally wide, got {widths[:2]}.")
    if read.integers("num_decoder_blocks", blocks[::-1], most=64) != blocks[::-1]:
        raise CheckpointError("config.json: num_decoder_blocks must be num_encoder_blocks in reverse.")
    fixed = {
        "act_fn": "relu", "upsample_fn": "nearest", "upsampling_scaling_factor": 2, "latent_magnitude": 3,
        "latent_shift": 0.5, "scaling_factor": 1.0, "shift_factor": 0.0,
    }  # fmt: skip
    for name, value in fixed.items():
        read.one_of(name, value, [value])
    image = read.integer("in_channels", 3)
    read.one_of("out_channels", image, [image])
    return AutoencoderTiny(widths[0][0], blocks, read.integer("latent_channels", 4), image)


def config_of(net: AutoencoderKL | AutoencoderTiny) -> dict[str, Any]:
    """The config.json by which diffusers builds the same autoencoder. Raises ConfigError where it has none."""
    common = {"in_channels": net.image_channels, "out_channels": net.image_channels}
    common["latent_channels"] = net.latent_channels
    if isinstance(net, AutoencoderTiny):
        if net.pool:
            raise ConfigError("diffusers has no tiny autoencoder with pool=True (TAEF2): keep its own two files.")
        widths = [net.channels] * len(net.blocks)
        return common | {
            "_class_name": "AutoencoderTiny", "act_fn": "relu", "num_encoder_blocks": list(net.blocks),
            "num_decoder_blocks": list(net.blocks[::-1]), "encoder_block_out_channels": widths,
            "decoder_block_out_channels": widths,
        }  # fmt: skip
    count = len(net.channels)
    return common | {
        "_class_name": "AutoencoderKL", "down_block_types": ["DownEncoderBlock2D"] * count,
        "up_block_types": ["UpDecoderBlock2D"] * count, "block_out_channels": list(net.channels),
        "layers_per_block": net.num_blocks, "norm_num_groups": net.groups, "act_fn": "silu",
        "mid_block_add_attention": net.mid_attention, "use_quant_conv": net.quant,
        "use_post_quant_conv": net.post_quant, "scaling_factor": net.scale, "shift_factor": net.shift,
    }  # fmt: skip
