"""Original single files: the CompVis and Stability layout, one .safetensors with the whole of a Stable Diffusion.

    model.diffusion_model.input_blocks.4.1...        unet      down_blocks.1.attentions.0...
    first_stage_model.encoder.down.0.block.1...      vae       encoder.down_blocks.0.resnets.1...
    cond_stage_model.transformer.text_model...       text_encoder of SD 1 (transformers' layout)
    cond_stage_model.model...                        text_encoder of SD 2 (OpenCLIP's)
    conditioner.embedders.0.transformer, .1.model    text_encoder and text_encoder_2 of SDXL
    control_model.zero_convs.0.0, input_hint_block   a ControlNet, in a file of its own, perhaps without that prefix

The input blocks of the original are counted through all levels; output blocks likewise, each up-sampling in the last.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from jaxdiff.errors import CheckpointError
from jaxdiff.nets.controlnet import ControlNet
from jaxdiff.nets.sd_unet import SDUNet
from jaxdiff.nets.vae import AutoencoderKL
from jaxdiff.pretrained import keys

UNET, VAE, CONTROL = "model.diffusion_model.", "first_stage_model.", "control_model."
TEXT = (
    ("cond_stage_model.transformer.", "cond_stage_model.model."),
    ("conditioner.embedders.0.transformer.", "conditioner.embedders.0.model."),
    ("conditioner.embedders.1.model.",),
)
_RESIDUAL = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def part(tensors: Mapping[str, Any], prefixes: Iterable[str]) -> dict[str, Any]:
    """The tensors below the first of `prefixes` that has any. Raises CheckpointError where none has."""
    for prefix in prefixes:
        if found := keys.select(tensors, prefix):
            return found
    raise CheckpointError(f"the file has nothing below {' or '.join(prefixes)}: it is not an original single file.")


def unet(tensors: Mapping[str, Any], net: SDUNet) -> dict[str, Any]:
    """The tensors of the U-Net by their names in diffusers; what has no other name keeps its own."""
    return _renamed(part(tensors, [UNET]), _invert(unet_places(net)), _RESIDUAL | {"conv": "op"})


def controlnet(tensors: Mapping[str, Any], net: ControlNet) -> dict[str, Any]:
    """The tensors of a ControlNet, as `unet`."""
    return _renamed(part(tensors, [CONTROL, ""]), _invert(control_places(net)), _RESIDUAL | {"conv": "op"})


def vae(tensors: Mapping[str, Any], net: AutoencoderKL) -> dict[str, Any]:
    """The tensors of the autoencoder; its attention, 1 x 1 convolutions here, keeps the last part of its names."""
    inner = {"conv_shortcut": "nin_shortcut", "group_norm": "norm"}
    return _renamed(part(tensors, [VAE]), _invert(vae_places(net)), inner)


def text(tensors: Mapping[str, Any], number: int) -> dict[str, Any]:
    """The tensors of text encoder 0 or 1, in the layouts that `text.clip_text` reads."""
    first = [*TEXT[0], *TEXT[1]]
    return part(tensors, first if number == 0 else TEXT[2])


def original(names: Iterable[str], places: Mapping[str, str], *, autoencoder: bool = False) -> dict[str, str]:
    """Names in diffusers -> names in the original layout, for the `places` of the network: the way back."""
    inner = _ATTENTION | {"conv_shortcut": "nin_shortcut"} if autoencoder else _RESIDUAL
    made = {}
    for name in names:
        module, _, leaf = name.rpartition(".")
        place, rest = _longest(module, places)
        if "downsamplers" in place and not autoencoder:
            rest = "op"
        made[name] = ".".join(filter(None, [places.get(place, place), inner.get(rest, rest), leaf]))
    return made


def unet_places(net: SDUNet) -> dict[str, str]:
    """Modules of diffusers -> modules of the original, down to single blocks."""
    last, blocks = len(net.channels) - 1, net.num_blocks
    places = {
        "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
        "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
        "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
    }  # fmt: skip
    n = 0
    for i in range(last + 1):
        for j in range(blocks):
            n += 1
            places[f"down_blocks.{i}.resnets.{j}"] = f"input_blocks.{n}.0"
            if net.attention[i] != "none":
                places[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{n}.1"
        n += 1
        places[f"down_blocks.{i}.downsamplers.0"] = f"input_blocks.{n}.0"
    for n in range((last + 1) * (blocks + 1)):
        i, j = divmod(n, blocks + 1)
        attends = net.attention[last - i] != "none"
        places[f"up_blocks.{i}.resnets.{j}"] = f"output_blocks.{n}.0"
        if attends:
            places[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{n}.1"
        if j == blocks:
            places[f"up_blocks.{i}.upsamplers.0"] = f"output_blocks.{n}.{1 + attends}"
    return places


def control_places(net: ControlNet) -> dict[str, str]:
    """Modules of diffusers -> modules of the original ControlNet: the first half of a U-Net, and its own."""
    places = {name: place for name, place in unet_places(net).items() if not place.startswith("out")}
    maps = len(net.channels) * (net.num_blocks + 1)
    places |= {f"controlnet_down_blocks.{i}": f"zero_convs.{i}.0" for i in range(maps)}
    hint, count = "controlnet_cond_embedding", 2 * (len(net.picture_widths) - 1)
    places |= {f"{hint}.blocks.{i}": f"input_hint_block.{2 * i + 2}" for i in range(count)}
    places |= {f"{hint}.conv_in": "input_hint_block.0", f"{hint}.conv_out": f"input_hint_block.{2 * count + 2}"}
    return places | {"controlnet_mid_block": "middle_block_out.0"}


def vae_places(net: AutoencoderKL) -> dict[str, str]:
    """Modules of diffusers -> modules of the original autoencoder."""
    last = len(net.channels) - 1
    places = {}
    for side in ("encoder", "decoder"):
        places[f"{side}.conv_norm_out"] = f"{side}.norm_out"
        for ours, theirs in (("resnets.0", "block_1"), ("attentions.0", "attn_1"), ("resnets.1", "block_2")):
            places[f"{side}.mid_block.{ours}"] = f"{side}.mid.{theirs}"
    for i in range(last + 1):
        for j in range(net.num_blocks + 1):
            places[f"encoder.down_blocks.{i}.resnets.{j}"] = f"encoder.down.{i}.block.{j}"
            places[f"decoder.up_blocks.{i}.resnets.{j}"] = f"decoder.up.{last - i}.block.{j}"
        places[f"encoder.down_blocks.{i}.downsamplers.0"] = f"encoder.down.{i}.downsample"
        places[f"decoder.up_blocks.{i}.upsamplers.0"] = f"decoder.up.{last - i}.upsample"
    return places


def _renamed(tensors: Mapping[str, Any], places: Mapping[str, str], inner: Mapping[str, str]) -> dict[str, Any]:
    inner = _invert(inner)
    made = {}
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        place, rest = _longest(module, places)
        made[".".join(filter(None, [places.get(place, place), inner.get(rest, rest), leaf]))] = tensor
    return made


def _longest(module: str, places: Mapping[str, str]) -> tuple[str, str]:
    """The longest beginning of a module's name that is a place, and the rest."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        if (place := ".".join(parts[:length])) in places:
            return place, ".".join(parts[length:])
    return "", module


def _invert(table: Mapping[str, str]) -> dict[str, str]:
    return {value: key for key, value in table.items()}
