"""Published IP-Adapters, of one file each: read, put into a pipeline, written.

    image_proj.proj.weight, image_proj.norm.weight      the projection of CLIP's embedding of a picture to 4 tokens
    ip_adapter.1.to_k_ip.weight, .to_v_ip.weight        of the first block that attends to tokens; then 3, 5, ...

    pipe = ip_adapter.add(pipe, "ip-adapter_sd15.safetensors")
    clip, weights = pretrained.text.clip_vision("image_encoder")
    embedding = clip.apply(weights, text.clip.preprocess(picture, clip.size)).pooled
    told = pipelines.with_image(*told, embedding, scale=0.6)                        inside your jit, before drawing

Known are those of Stable Diffusion 1, 2 and XL that take CLIP's global embedding, not "plus" nor "full face".
"""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from jaxdiff.atomic import replacing
from jaxdiff.errors import CheckpointError, ConfigError
from jaxdiff.nets.ip_adapter import IPAdapter
from jaxdiff.nets.sd_unet import SDUNet, places
from jaxdiff.pretrained import files, keys
from jaxdiff.pretrained.layout import mirror, template, zeros
from jaxdiff.pretrained.pipelines import Pipeline
from jaxdiff.types import PyTree

FIRST = "image_proj.proj.weight"


def load(source: str | os.PathLike | Mapping[str, Any], net: SDUNet) -> tuple[IPAdapter, PyTree]:
    """The IP-Adapter of a .safetensors file, for the U-Net `net`, and its parameters.

    Raises CheckpointError for one of another kind or for another U-Net, UnsafeFileError for a pickle.
    """
    if not isinstance(net, SDUNet):
        raise ConfigError(f"IP-Adapters are for Stable Diffusion 1, 2 and XL, not for {type(net)}.")
    tensors = source if isinstance(source, Mapping) else files.read(source)
    first = tuple(tensors[FIRST].shape) if FIRST in tensors else ()
    if len(first) != 2 or net.token_dim is None or first[0] % net.token_dim:
        shown = ", ".join(name for name in sorted(tensors) if name.startswith("image_proj"))[:200]
        raise CheckpointError(
            f"this is no IP-Adapter for CLIP's global embedding and texts of {net.token_dim}: {FIRST} must be a matrix"
            f" of so many rows or a multiple, and is {first}. It holds {shown or 'no image_proj at all'}."
        )
    adapter = IPAdapter(tuple(places(net).items()), net.token_dim, first[1], first[0] // net.token_dim)
    shapes = template(adapter, {"image": zeros(1, adapter.image_dim)}, jnp.float32, None)
    return adapter, keys.load(shapes, tensors, mirror(shapes))


def export(path: str | os.PathLike, params: PyTree) -> None:
    """Write a .safetensors file as diffusers reads it."""
    from safetensors import numpy

    if Path(path).suffix != ".safetensors":
        raise ConfigError(f"the file of an IP-Adapter must end in .safetensors, got {path}.")
    with replacing(path) as temporary:
        numpy.save_file(keys.export(params, mirror(params)), temporary, metadata={"format": "pt"})


def add(pipe: Pipeline, source: str | os.PathLike) -> Pipeline:
    """`pipe` with the IP-Adapter of a file; its parameters are "ip_adapter"."""
    adapter, params = load(source, pipe.model.unet)
    model = dataclasses.replace(pipe.model, adapter=adapter)
    return dataclasses.replace(pipe, model=model, params={**pipe.params, "ip_adapter": params})
