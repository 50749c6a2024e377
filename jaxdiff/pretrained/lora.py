"""Low-rank additions to the weights of a Stable Diffusion: read in every layout, added, trained, written.

    W' = W + scale s (down up),     s = alpha / rank  (1 where the file says no alpha)

    lora_unet_down_blocks_0_..._to_q.lora_down.weight, .lora_up.weight, .alpha           kohya; lora_te_, te1_, te2_
    unet.down_blocks.0...to_q.lora_A.weight, .lora_B.weight (or .lora.down, .lora.up)    diffusers; text_encoder., _2.
    unet.down_blocks.0...processor.to_q_lora.down.weight, .up.weight                      diffusers before 0.22
    base_model.model.down_blocks.0...to_q.lora_A.weight, .lora_B.weight                   peft: the U-Net alone

A LoRA is a pytree, {part: {path: Factors}}, and `merge` a pure function of it: as arguments of your jit, neither
another scale nor another LoRA of the same ranks compiles again. To train one:

    trained, fixed = split(init(key, params, rank=8))
    loss(trained) = ... merge(params, join(trained, fixed)) ...        params are constants of the loss

Hu et al. 2022, section 4.1.
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.atomic import replacing
from jaxdiff.errors import CheckpointError, ConfigError, check_count
from jaxdiff.pretrained import files, keys
from jaxdiff.pretrained.layout import mirror
from jaxdiff.pretrained.text import clip_text_table
from jaxdiff.types import Array, Key, PyTree

PARTS = {
    "unet": ("unet.", "lora_unet_", "base_model.model."),
    "text_0": ("text_encoder.", "lora_te_", "lora_te1_"),
    "text_1": ("text_encoder_2.", "lora_te2_"),
}
"""Part of the parameters -> how its keys begin."""

LAYOUTS = {"diffusers": ("lora_A", "lora_B"), "kohya": ("lora_down", "lora_up"), "peft": ("lora_A", "lora_B")}
"""The layouts that are written -> what they call down and up."""
PEFT = "adapter_config.json"

_ENDS = re.compile(
    r"(?P<module>.+?)(?:_lora|\.lora_linear_layer|\.lora)?[._](?:lora_)?(?P<kind>down|up|A|B)(?:\.default)?\.weight"
    r"|(?P<of>.+)\.alpha"
)


class Factors(NamedTuple):
    """One addition, in the layout of our kernels: down (..., c_in, r), up (r, c_out), scale ()."""

    down: Array
    up: Array
    scale: Array


LoRA = dict[str, dict[str, Factors]]


def load(source: str | os.PathLike | Mapping[str, Any], params: PyTree) -> LoRA:
    """The LoRA of a .safetensors file or a folder, for the parameters of a pipeline: {"unet": ..., "text_0": ...}.

    Raises CheckpointError, naming them, for keys that belong to no kernel of `params`, and for shapes that do not fit.
    """
    tensors = source if isinstance(source, Mapping) else files.read(source)
    default = _peft_alpha(source)
    found: dict[tuple[str, str], dict[str, Any]] = {}
    places = {part: _modules(part, tree) for part, tree in params.items() if part in PARTS}
    unknown = []
    for name, tensor in tensors.items():
        place = _place(name, places)
        if place is None:
            unknown.append(name)
        else:
            found.setdefault(place[:2], {})[place[2]] = tensor
    if unknown:
        more = f" and {len(unknown) - 4} more" if len(unknown) > 4 else ""
        raise CheckpointError(f"not of this model: {', '.join(sorted(unknown)[:4])}{more}. Is it a LoRA for another?")
    lora: LoRA = {}
    for (part, path), pair in sorted(found.items()):
        kernel = _leaf(params[part], path)
        lora.setdefault(part, {})[path] = _factors(f"{part}/{path}", pair, kernel.shape, default)
    return lora


def merge(params: PyTree, lora: LoRA, scale: Any = 1.0) -> PyTree:
    """`params` with `scale` times the LoRA added; pure, so that its gradient by `lora` trains one."""
    return {part: _add(tree, lora.get(part, {}), scale) for part, tree in params.items()}


def init(
    key: Key,
    params: PyTree,
    *,
    rank: int = 8,
    alpha: float | None = None,
    match: str = r".*attn[12]/to_(q|k|v|out_0)/kernel",
) -> LoRA:
    """A LoRA to train, which adds nothing yet: of every kernel of `params["unet"]` whose path matches, down random.

    `params` may be shapes. alpha: None for that of the rank, a scale of 1. Raises ConfigError where nothing matches.
    """
    check_count("rank", rank, "LoRAs have ranks from 4 to 128.")
    paths = {_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(params["unet"])[0]}
    chosen = {path: leaf for path, leaf in paths.items() if re.fullmatch(match, path)}
    if not chosen:
        raise ConfigError(f"no kernel matches {match!r}. Paths look like {next(iter(paths))!r}.")
    made = {}
    for i, (path, leaf) in enumerate(sorted(chosen.items())):
        shape = (*leaf.shape[:-1], rank)
        down = jax.random.normal(jax.random.fold_in(key, i), shape) / np.sqrt(np.prod(shape[:-1]))
        scale = jnp.float32(1.0 if alpha is None else alpha / rank)
        made[path] = Factors(down, jnp.zeros((rank, leaf.shape[-1])), scale)
    return {"unet": made}


def split(lora: LoRA) -> tuple[PyTree, PyTree]:
    """(trained, fixed): the down and up of every addition as a dict, and its scale, which is no parameter."""
    trained = {
        part: {path: {"down": f.down, "up": f.up} for path, f in entries.items()} for part, entries in lora.items()
    }
    return trained, {part: {path: f.scale for path, f in entries.items()} for part, entries in lora.items()}


def join(trained: PyTree, fixed: PyTree) -> LoRA:
    """The LoRA that `split` took apart."""
    return {
        part: {path: Factors(pair["down"], pair["up"], fixed[part][path]) for path, pair in entries.items()}
        for part, entries in trained.items()
    }


def export(path: str | os.PathLike, lora: LoRA, params: PyTree, *, layout: str = "diffusers") -> None:
    """Write a .safetensors file in the layout "diffusers", "kohya" or "peft"; `params` may be shapes.

    kohya's has an alpha for each; else the scales are put into the up factors. peft's, of the U-Net alone, has its
    adapter_config.json beside it. Raises ConfigError for another layout, or what it cannot hold.
    """
    from safetensors import numpy

    path = Path(path)
    if path.suffix != ".safetensors":
        raise ConfigError(f"the file of a LoRA must end in .safetensors, got {path}.")
    if layout not in LAYOUTS:
        raise ConfigError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}.")
    tensors: dict[str, np.ndarray] = {}
    for part, entries in lora.items():
        names = {at: name for name, at in _modules(part, params[part]).items() if "." in name}
        for at, factors in entries.items():
            tensors |= _tensors(layout, part, names[at], factors, xl="text_1" in params)
    config = _peft_config(lora, tensors) if layout == "peft" else None
    with replacing(path) as temporary:
        numpy.save_file(tensors, temporary, metadata={"format": "pt"})
    if config is not None:
        with replacing(path.with_name(PEFT)) as temporary:
            temporary.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _tensors(layout: str, part: str, name: str, factors: Factors, *, xl: bool) -> dict[str, np.ndarray]:
    """One addition under the names of a layout, for an SD or, where `xl`, for an XL."""
    down, up, scale = (np.asarray(x) for x in factors)
    rank = up.shape[0]
    up = up.T if layout == "kohya" else (up * scale).T
    down = down.transpose(3, 2, 0, 1) if down.ndim == 4 else down.T
    up = up[:, :, None, None] if down.ndim == 4 else up
    name = name if part == "unet" else f"text_model.{name}"
    if layout == "kohya":
        begin = "lora_te1_" if xl and part == "text_0" else PARTS[part][1]
        name = name.replace(".", "_")
    else:
        begin = PARTS[part][2 if layout == "peft" else 0]
    made = {f"{begin}{name}.{end}.weight": x for end, x in zip(LAYOUTS[layout], (down, up), strict=True)}
    if layout == "kohya":
        made[f"{begin}{name}.alpha"] = scale * rank
    return {key: np.array(x, np.float32, order="C") for key, x in made.items()}


def _peft_config(lora: LoRA, tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The adapter_config.json of a U-Net's LoRA whose scales are in its factors."""
    ranks = {factors.up.shape[0] for entries in lora.values() for factors in entries.values()}
    if set(lora) != {"unet"} or len(ranks) != 1:
        raise ConfigError(f"peft's layout holds one rank, of the U-Net alone; this has {sorted(ranks)} of {[*lora]}.")
    ends = (PARTS["unet"][2], ".lora_A.weight")
    modules = sorted(name.removeprefix(ends[0]).removesuffix(ends[1]) for name in tensors if name.endswith(ends[1]))
    rank = ranks.pop()
    return {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": modules, "bias": "none"}


def _modules(part: str, tree: PyTree) -> dict[str, str]:
    """Module name, with dots and with underscores for them -> path of its kernel."""
    table = mirror(tree) if part == "unet" else clip_text_table()
    names = {}
    for rule in keys.resolve(tree, table):
        if rule.ours.endswith("/kernel"):
            module = rule.theirs.removesuffix(".weight")
            names |= {module: rule.ours, module.replace(".", "_"): rule.ours}
    return names


def _place(name: str, places: Mapping[str, Mapping[str, str]]) -> tuple[str, str, str] | None:
    """(part, path of the kernel, kind) of a key, or None."""
    ends = _ENDS.fullmatch(name)
    if ends is None:
        return None
    module = (ends["module"] or ends["of"]).replace(".processor", "")
    kind = {"A": "down", "B": "up", None: "alpha"}.get(ends["kind"], ends["kind"])
    for part, modules in places.items():
        for begin in PARTS[part]:
            rest = module.removeprefix(begin)
            for prefix in ("", "text_model.", "text_model_"):
                path = modules.get(rest.removeprefix(prefix)) or modules.get(rest.removeprefix(prefix) + ".0")
                if module.startswith(begin) and path:
                    return part, path, kind
    return None


def _factors(where: str, pair: Mapping[str, Any], shape: tuple[int, ...], default: float | None) -> Factors:
    """The factors of one kernel, checked against its shape."""
    if not {"down", "up"} <= set(pair):
        raise CheckpointError(f"{where} has {' and '.join(sorted(pair))} only; a LoRA has a down and an up for each.")
    down, up = (np.asarray(pair[kind]) for kind in ("down", "up"))
    rank = down.shape[0]
    if len(shape) == 4 and down.ndim == 4:
        down = down.transpose(2, 3, 1, 0)
    elif len(shape) == 4 and down.ndim == 2:
        down = down.T.reshape(1, 1, -1, rank)
    else:
        down = down.reshape(rank, -1).T
    up = up.reshape(up.shape[0], -1).T
    if (*down.shape[:-1], up.shape[-1]) != tuple(shape) or up.shape[0] != rank:
        raise CheckpointError(f"{where}: factors {down.shape} and {up.shape} do not make its {tuple(shape)}.")
    alpha = float(np.asarray(pair["alpha"])) if "alpha" in pair else default
    scale = 1.0 if alpha is None else alpha / rank
    return Factors(jnp.asarray(down, jnp.float32), jnp.asarray(up, jnp.float32), jnp.asarray(scale, jnp.float32))


def _peft_alpha(source: Any) -> float | None:
    """lora_alpha of the adapter_config.json beside a peft file."""
    if isinstance(source, Mapping):
        return None
    folder = Path(source) if Path(source).is_dir() else Path(source).parent
    if not (folder / PEFT).is_file():
        return None
    alpha = files.config(folder, PEFT).get("lora_alpha")
    return float(alpha) if isinstance(alpha, int | float) else None


def _add(tree: PyTree, entries: Mapping[str, Factors], scale: Any) -> PyTree:
    def leaf(path: Any, kernel: Array) -> Array:
        factors = entries.get(_name(path))
        if factors is None:
            return kernel
        added = jnp.tensordot(factors.down, factors.up, axes=1) * (factors.scale * scale)
        return (kernel.astype(added.dtype) + added).astype(kernel.dtype)

    return jax.tree_util.tree_map_with_path(leaf, tree)


def _leaf(tree: PyTree, path: str) -> Any:
    for name in path.split("/"):
        tree = tree["params"][name] if "params" in tree else tree[name]
    return tree


def _name(path: Any) -> str:
    return "/".join(str(key.key) for key in path).removeprefix("params/")
