"""Published ControlNets: ControlNetModel of diffusers, and original files; read, put into a pipeline, trained, written.

    pipe = controlnet.add(pipe, "sd-controlnet-canny")                              one after the other for several
    told = pipelines.with_control(*told, [picture], scale=0.8)                      inside your jit, before drawing

To train one, begin with the weights of the U-Net: `init`. Their config is that of a U-Net's first half, and
`conditioning_embedding_out_channels`, `conditioning_channels`, `controlnet_conditioning_channel_order` (rgb or bgr).
"""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxdiff.errors import CheckpointError, ConfigError
from jaxdiff.nets.controlnet import ControlNet
from jaxdiff.nets.sd_unet import SDUNet
from jaxdiff.pretrained import files, keys, single_file, unet
from jaxdiff.pretrained.layout import STEM, Settings, Shardings, Source, mirror, open_source, template, zeros
from jaxdiff.pretrained.pipelines import Pipeline
from jaxdiff.types import Key, PyTree

_UP = ("out_channels", "up_block_types")


def load(
    source: Source,
    config: Mapping[str, Any] | None = None,
    *,
    variant: str | None = None,
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    shardings: Shardings | None = None,
) -> tuple[ControlNet, PyTree]:
    """The ControlNet of a folder, or of an original file with its `config`, and its parameters, as `unet.load`."""
    tensors, settings = open_source(source, config, variant)
    net = network(settings, dtype=dtype)
    if any("zero_convs." in name for name in tensors):
        tensors = single_file.controlnet(tensors, net)
    shapes = template(net, example(net), param_dtype, shardings)
    return net, keys.load(shapes, tensors, mirror(shapes))


def export(folder: str | os.PathLike, net: ControlNet, params: PyTree, *, dtype: Any = None) -> None:
    """Write a folder that diffusers loads as ControlNetModel; `dtype` e.g. np.float16, None as they are."""
    files.write(folder, keys.export(params, mirror(params), dtype=dtype), config_of(net), stem=STEM)


def add(pipe: Pipeline, source: str | os.PathLike, *, variant: str | None = None) -> Pipeline:
    """`pipe` with the ControlNet of a folder after those it has; its parameters are "control_0", "control_1" ...

    Raises CheckpointError where it is for another U-Net.
    """
    if not isinstance(pipe.model.unet, SDUNet):
        raise ConfigError(f"ControlNets are for Stable Diffusion 1, 2 and XL, not for {type(pipe.model.unet)}.")
    net, params = load(source, variant=variant, dtype=pipe.model.unet.dtype)
    for name in ("channels", "num_blocks", "token_dim", "vector_dim"):
        ours, wanted = getattr(net, name), getattr(pipe.model.unet, name)
        if ours != wanted:
            raise CheckpointError(f"{source} is for another U-Net: its {name} is {ours}, not {wanted}.")
    if net.factor != pipe.model.vae.factor:
        raise CheckpointError(f"{source} is for another autoencoder: a latent is {net.factor} of its pixels.")
    model = dataclasses.replace(pipe.model, controls=(*pipe.model.controls, net))
    return dataclasses.replace(pipe, model=model, params={**pipe.params, f"control_{len(pipe.model.controls)}": params})


def init(key: Key, net: SDUNet, params: PyTree, **settings: Any) -> tuple[ControlNet, PyTree]:
    """A ControlNet to train for a U-Net and its parameters: the first half of them copied, which adds nothing yet.

    settings: those of `ControlNet` that a U-Net has not. Zhang et al. 2023 (section 3.2).
    """
    same = {f.name: getattr(net, f.name) for f in dataclasses.fields(net) if f.name not in ("parent", "name")}
    control = ControlNet(**same | settings)
    theirs = params["params"]

    def fresh(key: Key) -> PyTree:
        inputs = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), example(control))
        return {name: tree for name, tree in control.init(key, **inputs)["params"].items() if name not in theirs}

    shapes = template(control, example(control), jnp.float32, None)["params"]
    copied = {name: tree for name, tree in theirs.items() if name in shapes}
    return control, {"params": copied | jax.jit(fresh)(key)}


def network(config: Mapping[str, Any], *, dtype: Any = None) -> ControlNet:
    """The ControlNet that a config.json describes. Raises CheckpointError for what it asks and is not known here."""
    read = Settings(config, unet.IGNORED)
    order = read.one_of("controlnet_conditioning_channel_order", "rgb", ["rgb", "bgr"])
    net = ControlNet(
        **unet.conditional(read), dtype=dtype, bgr=order == "bgr",
        picture_channels=read.integer("conditioning_channels", 3),
        picture_widths=read.integers("conditioning_embedding_out_channels", (16, 32, 96, 256)),
    )  # fmt: skip
    read.finish()
    return net


def example(net: ControlNet) -> dict[str, Any]:
    """Inputs of the shapes that `net` takes."""
    side = 2 ** (len(net.channels) - 1) * net.factor
    return unet.example(net) | {"picture": zeros(1, side, side, net.picture_channels)}


def config_of(net: ControlNet) -> dict[str, Any]:
    """The config.json by which diffusers builds the same ControlNet."""
    return {name: value for name, value in unet.config_of(net).items() if name not in _UP} | {
        "_class_name": "ControlNetModel",
        "conditioning_channels": net.picture_channels,
        "conditioning_embedding_out_channels": list(net.picture_widths),
        "controlnet_conditioning_channel_order": "bgr" if net.bgr else "rgb",
    }
