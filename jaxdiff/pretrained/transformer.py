"""Published transformers: DiT, Stable Diffusion 3's MMDiT and FLUX.1, as diffusers writes them; read and written back.

net, params = pretrained.transformer.load("stable-diffusion-3-medium-diffusers/transformer")
velocity = net.apply(params, x, time, tokens=tokens, vector=vector)

SD3Transformer2DModel      MMDiT        tokens, vector                 its table of positions is in the file
FluxTransformer2DModel     Flux         tokens, vector, guidance       here x is not packed: 64 channels are 16
DiTTransformer2DModel      LatentDiT    labels                         published as Transformer2DModel
"""

import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxdiff.errors import CheckpointError
from jaxdiff.nets.flux import PACK, Flux
from jaxdiff.nets.latent_dit import LatentDiT
from jaxdiff.nets.mmdit import MMDiT
from jaxdiff.pretrained import files, keys
from jaxdiff.pretrained.layout import MOST, STEM, Settings, Shardings, Source, mirror, open_source, template, zeros
from jaxdiff.types import PyTree

Net = MMDiT | Flux | LatentDiT
MAX_BLOCKS = 256
"""No published transformer has more; a damaged config must not keep the machine building blocks."""


def load(
    source: Source,
    config: Mapping[str, Any] | None = None,
    *,
    variant: str | None = None,
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    shardings: Shardings | None = None,
) -> tuple[Net, PyTree]:
    """The transformer of a folder `transformer/` and its parameters; `dtype` is that of the computation.

    `config` as in config.json, read from the folder where it is not given; `param_dtype` of a half-precision file keeps
    its size. Raises CheckpointError or UnsafeFileError for files that do not fit or are not read.
    """
    tensors, settings = open_source(source, config, variant)
    net = network(settings, dtype=dtype)
    shapes = template(net, example(net), param_dtype, shardings)
    return net, keys.load(shapes, tensors, table(shapes))


def export(folder: str | os.PathLike, net: Net, params: PyTree, *, dtype: Any = None) -> None:
    """Write a folder that diffusers loads as its class; `dtype` e.g. np.float16, None as they are."""
    files.write(folder, keys.export(params, table(params), dtype=dtype), config_of(net), stem=STEM)


def table(params: PyTree) -> list[keys.Rule]:
    """The names: those of `layout.mirror`, but for Stable Diffusion 3's table of positions."""
    where = "pos_embed/embedding"
    return [rule if rule.ours != where else rule._replace(theirs="pos_embed.pos_embed") for rule in mirror(params)]


def network(config: Mapping[str, Any], *, dtype: Any = None) -> Net:
    """The network that a config.json describes. Raises CheckpointError for what it asks and is not known here."""
    read = Settings(config, ("dropout", "norm_num_groups", "upcast_attention"))
    kind = config.get("_class_name")
    if not isinstance(kind, str) or kind not in KINDS:
        raise CheckpointError(f"config.json: _class_name must be one of {', '.join(KINDS)}, got {kind!r:.60}.")
    net = KINDS[kind].read(read, dtype)
    read.finish()
    return net


def example(net: Net) -> dict[str, Any]:
    """Inputs of the shapes that `net` takes."""
    side = PACK if isinstance(net, Flux) else net.patch_size
    inputs = {"x": zeros(1, side, side, net.in_channels), "time": zeros(1)}
    if isinstance(net, LatentDiT):
        return inputs | {"labels": jax.ShapeDtypeStruct((1,), jnp.int32)}
    inputs |= {"tokens": zeros(1, 1, net.token_dim), "vector": zeros(1, net.vector_dim)}
    return inputs | {"guidance": zeros(1)} if isinstance(net, Flux) and net.guided else inputs


def config_of(net: Net) -> dict[str, Any]:
    """The config.json by which diffusers builds the same network."""
    name, kind = next((name, kind) for name, kind in KINDS.items() if isinstance(net, kind.net))
    return {"_class_name": name} | kind.write(net)


def sample_size(config: Mapping[str, Any]) -> int:
    """The height, and width, of the latents that it was trained on; FLUX's config does not say, and means 128."""
    return Settings(config).integer("sample_size", 32 if KINDS[config["_class_name"]] is _DIT else 128)


class Kind(NamedTuple):
    """One class of diffusers: our network, made from its config, and its config, made from ours."""

    net: type[Net]
    read: Callable[[Settings, Any], Net]
    write: Callable[[Any], dict[str, Any]]


def _read_mmdit(read: Settings, dtype: Any) -> MMDiT:
    depth, heads = read.integer("num_layers", 18, most=MAX_BLOCKS), read.integer("num_attention_heads", 18)
    head_dim, channels = read.integer("attention_head_dim", 64), read.integer("in_channels", 16)
    read.one_of("caption_projection_dim", 1152, [heads * head_dim])
    return MMDiT(
        depth=depth, heads=heads, head_dim=head_dim, patch_size=read.integer("patch_size", 2), in_channels=channels,
        out_channels=read.integer("out_channels", channels), token_dim=read.integer("joint_attention_dim", 4096),
        vector_dim=read.integer("pooled_projection_dim", 2048), sample_size=read.integer("sample_size", 128),
        max_positions=read.integer("pos_embed_max_size", 96, most=2**12), dual=_dual(read, depth),
        qk_norm=read.one_of("qk_norm", "none", ["none", "rms_norm"]) == "rms_norm", dtype=dtype,
    )  # fmt: skip


def _dual(read: Settings, depth: int) -> tuple[int, ...]:
    """Numbers of blocks, from 0: an empty list is allowed, and `Settings.integers` asks for numbers >= 1."""
    blocks = read.get("dual_attention_layers", ())
    whole = isinstance(blocks, list | tuple) and all(type(i) is int and 0 <= i < depth for i in blocks)
    if not whole:
        raise CheckpointError(
            f"config.json: dual_attention_layers must be numbers of blocks below {depth}, got {blocks!r:.80}."
        )
    return tuple(blocks)


def _write_mmdit(net: MMDiT) -> dict[str, Any]:
    return {
        "sample_size": net.sample_size, "patch_size": net.patch_size, "in_channels": net.in_channels,
        "num_layers": net.depth, "attention_head_dim": net.head_dim, "num_attention_heads": net.heads,
        "joint_attention_dim": net.token_dim, "caption_projection_dim": net.width,
        "pooled_projection_dim": net.vector_dim, "out_channels": net.out_channels,
        "pos_embed_max_size": net.max_positions, "dual_attention_layers": list(net.dual),
        "qk_norm": "rms_norm" if net.qk_norm else None,
    }  # fmt: skip


def _read_flux(read: Settings, dtype: Any) -> Flux:
    read.one_of("patch_size", 1, [1])
    axes = read.integers("axes_dims_rope", (16, 56, 56))
    read.one_of("attention_head_dim", 128, [sum(axes)])
    packed = read.integer("in_channels", 64)
    made = read.integer("out_channels", packed)
    if packed % PACK**2 or made % PACK**2 or len(axes) != 3:
        raise CheckpointError(
            f"config.json: in_channels and out_channels must be multiples of 4 and axes_dims_rope three numbers, "
            f"got {packed}, {made} and {axes}."
        )
    return Flux(
        depth=read.integer("num_layers", 19, most=MAX_BLOCKS), heads=read.integer("num_attention_heads", 24),
        single_depth=read.integer("num_single_layers", 38, most=MAX_BLOCKS), in_channels=packed // PACK**2,
        out_channels=made // PACK**2, token_dim=read.integer("joint_attention_dim", 4096),
        vector_dim=read.integer("pooled_projection_dim", 768), guided=read.flag("guidance_embeds", False),
        axes=axes, dtype=dtype,
    )  # fmt: skip


def _write_flux(net: Flux) -> dict[str, Any]:
    return {
        "patch_size": 1, "in_channels": PACK**2 * net.in_channels, "out_channels": PACK**2 * net.out_channels,
        "num_layers": net.depth, "num_single_layers": net.single_depth, "attention_head_dim": sum(net.axes),
        "num_attention_heads": net.heads, "joint_attention_dim": net.token_dim,
        "pooled_projection_dim": net.vector_dim, "guidance_embeds": net.guided, "axes_dims_rope": list(net.axes),
    }  # fmt: skip


def _read_dit(read: Settings, dtype: Any) -> LatentDiT:
    read.one_of("activation_fn", "gelu-approximate", ["gelu-approximate"])
    read.one_of("norm_type", "ada_norm_zero", ["ada_norm_zero"])
    read.one_of("attention_bias", True, [True])
    channels = read.integer("in_channels", 4)
    return LatentDiT(
        depth=read.integer("num_layers", 28, most=MAX_BLOCKS), heads=read.integer("num_attention_heads", 16),
        head_dim=read.integer("attention_head_dim", 72), patch_size=read.integer("patch_size", 2),
        in_channels=channels, out_channels=read.integer("out_channels", channels),
        num_classes=read.integer("num_embeds_ada_norm", 1000, most=MOST), sample_size=read.integer("sample_size", 32),
        eps=read.number("norm_eps", 1e-5), dtype=dtype,
    )  # fmt: skip


def _write_dit(net: LatentDiT) -> dict[str, Any]:
    return {
        "num_layers": net.depth, "num_attention_heads": net.heads, "attention_head_dim": net.head_dim,
        "patch_size": net.patch_size, "in_channels": net.in_channels, "out_channels": net.out_channels,
        "num_embeds_ada_norm": net.num_classes, "sample_size": net.sample_size, "norm_eps": net.eps,
        "norm_type": "ada_norm_zero", "activation_fn": "gelu-approximate", "attention_bias": True,
    }  # fmt: skip


_DIT = Kind(LatentDiT, _read_dit, _write_dit)
KINDS = {
    "SD3Transformer2DModel": Kind(MMDiT, _read_mmdit, _write_mmdit),
    "FluxTransformer2DModel": Kind(Flux, _read_flux, _write_flux),
    "DiTTransformer2DModel": _DIT,
    "Transformer2DModel": _DIT,
}
