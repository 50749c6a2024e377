"""Pictures from a published Stable Diffusion or FLUX: what `experiments.sample --pretrained DIR` does.

    python -m experiments.sample --pretrained DIR --prompt "a red house" --solver unipc --steps 20 --scale 7.5

One program draws every picture: parameters, prompts, seeds, scale and times are its arguments.
"""

import argparse
import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import cli, pictures, trained
from jaxdiff import data, pipelines, sample, solver
from jaxdiff.errors import ConfigError
from jaxdiff.nets import Flux
from jaxdiff.pretrained import controlnet, inversion, ip_adapter, lora
from jaxdiff.pretrained import pipelines as published
from jaxdiff.pretrained import text as encoders
from jaxdiff.text import clip
from jaxdiff.types import Array

SOLVERS = solver.ALL | {"unipc": solver.unipc, "deis": solver.deis}
STEPS, SCALE, TOLD_SCALE = 20, 7.5, 3.5


def check(args: argparse.Namespace) -> None:
    """Raise ConfigError for options that say nothing to a published model, or are missing."""
    for name in ("label", "checkpoint"):
        if getattr(args, name):
            raise ConfigError(f"--{name} is for the model of a --workdir, not for --pretrained.")
    if not args.prompt:
        raise ConfigError('--pretrained needs a --prompt. Type --prompt "a red house".')
    if args.scale is not None and args.scale < 0:
        raise ConfigError(f"--scale must be >= 0, got {args.scale}. 1 is no guidance.")
    if args.size and any(n < 8 or n % 8 for n in args.size):
        raise ConfigError(f"--size must be multiples of 8, got {args.size}.")
    if len(args.controlnet) != len(args.control) or len(args.control_scale) not in (1, len(args.control)):
        raise ConfigError(
            f"give a --control picture for each --controlnet, and one --control_scale or as many; got "
            f"{len(args.controlnet)}, {len(args.control)} and {len(args.control_scale)}."
        )
    if len(args.lora_scale) not in (1, len(args.lora)):
        raise ConfigError(f"give one --lora_scale or one for each of {len(args.lora)} --lora, got {args.lora_scale}.")
    if bool(args.ip_adapter) != bool(args.image):
        raise ConfigError("--ip_adapter and --image go together. Type --ip_adapter FILE --image photo.png.")


def run(args: argparse.Namespace) -> int:
    """Draw and write; returns the exit status."""
    pipe = published.load(args.pretrained, variant=args.variant, dtype=jnp.bfloat16 if args.half else None)
    size = tuple(args.size) if args.size else pipe.size
    pipe, shown = adapt(pipe, args, size)
    per = args.seeds or list(range(args.seed, args.seed + (args.num or 1)))
    trained.check_seeds(per)
    prompts = [prompt for prompt in args.prompt for _ in per]
    seeds = per * len(args.prompt)
    steps, scale = args.steps or STEPS, chosen_scale(pipe, args)
    name = args.solver or pipe.chain.solver
    used = cli.call("--solver", name, SOLVERS, schedule=pipe.model.schedule)
    times = pipe.times(steps, name, size=size)
    if args.grid:
        times = cli.call("--grid", args.grid, sample.GRIDS, schedule=pipe.model.schedule, num_steps=steps)
    draw = program(pipe, used, size)
    x0 = in_batches(draw, pipe, prompts, args.negative, seeds, scale, times, args.batch or 1, shown)
    info = {
        "prompts": json.dumps(prompts), "seeds": json.dumps(seeds), "negative": args.negative, "solver": name,
        "steps": steps, "scale": scale,
    }  # fmt: skip
    data.save_png(args.out, pictures.sheet(x0, prompts), info)
    print(f"wrote {args.out}: {len(x0)} pictures of {x0.shape[1]} x {x0.shape[2]}")
    if args.each:
        for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
            path = Path(args.each) / f"{i:05d}_seed{seed}.png"
            data.save_png(path, pictures.sheet(x0[i : i + 1]), info | {"prompts": prompt, "seeds": seed})
        print(f"wrote {len(x0)} files to {args.each}")
    return 0


def chosen_scale(pipe: published.Pipeline, args: argparse.Namespace) -> float:
    """The guidance, or, of FLUX dev, the number that the network is told in its place."""
    net = pipe.model.unet
    if not isinstance(net, Flux):
        return SCALE if args.scale is None else args.scale
    if args.negative or (args.scale is not None and not net.guided):
        raise ConfigError(
            "FLUX is drawn without guidance: leave out --negative, and --scale too if it is not FLUX dev."
        )
    return TOLD_SCALE if args.scale is None else args.scale


def adapt(
    pipe: published.Pipeline, args: argparse.Namespace, size: tuple[int, int]
) -> tuple[published.Pipeline, dict[str, Any]]:
    """`pipe` with what the command line adds to it, and the pictures, of one row, that these are shown."""
    shown: dict[str, Any] = {}
    for path, strength in zip(args.lora, np.broadcast_to(args.lora_scale, len(args.lora)), strict=True):
        merged = lora.merge(pipe.params, lora.load(path, pipe.params), float(strength))
        pipe = dataclasses.replace(pipe, params=merged)
    for path in args.inversion:
        pipe = inversion.add(pipe, inversion.load(path))
    for path in args.controlnet:
        pipe = controlnet.add(pipe, path, variant=_variant(path, args.variant))
    if args.control:
        scale = np.broadcast_to(np.float32(args.control_scale), (1, len(args.control)))
        shown["control"] = ([pictures.read(path, size) for path in args.control], scale)
    if args.ip_adapter:
        pipe = ip_adapter.add(pipe, args.ip_adapter)
        folders = [Path(folder) / "image_encoder" for folder in (Path(args.ip_adapter).parent, args.pretrained)]
        folder = next(filter(Path.is_dir, folders), folders[0])
        net, weights = encoders.clip_vision(folder, variant=_variant(folder, args.variant))
        features: Any = jax.jit(net.apply)(weights, clip.preprocess(jnp.asarray(pictures.read(args.image)), net.size))
        shown["image"] = (features.pooled, jnp.full(1, args.ip_scale))
    return pipe, shown


def _variant(folder: str | Path, variant: str | None) -> str | None:
    """`variant` where the folder has it: what is added is often published in one precision only."""
    return variant if variant and any(Path(folder).glob(f"*.{variant}.*")) else None


def program(pipe: published.Pipeline, used: solver.Solver, size: tuple[int, int]) -> Callable[..., Array]:
    """The jitted program from ids to pictures."""

    @jax.jit
    def draw(params, keys, prompt, negative, scale, times, shown):
        cond, null = (pipe.encode(params, texts, size=size, guidance=scale) for texts in (prompt, negative))
        rows = jax.tree.map(lambda x: jnp.broadcast_to(x, (len(keys), *x.shape[1:])), shown)
        if "control" in rows:
            cond, null = pipelines.with_control(cond, null, *rows["control"])
        if "image" in rows:
            cond, null = pipelines.with_image(cond, null, *rows["image"])
        settings = {"times": times, "solver": used, "size": size}
        settings["scale"] = 1 if isinstance(pipe.model.unet, Flux) else scale
        return pipelines.text_to_image(keys, pipe.model, params, cond, null, **settings)

    return draw


def in_batches(
    draw: Callable[..., Array],
    pipe: published.Pipeline,
    prompts: Sequence[str],
    negative: str,
    seeds: Sequence[int],
    scale: float,
    times: np.ndarray,
    batch: int,
    shown: dict[str, Any],
) -> np.ndarray:
    """Pictures (n, h, w, 3), `batch` at a time; the last batch is filled up, so that one program makes all."""
    count, batch = len(prompts), min(batch, len(prompts))
    # In one call, so that all prompts have the same number of chunks.
    texts = pipe.tokenize(prompts, [negative] * count)
    parts = []
    for start in range(0, count, batch):
        rows = np.minimum(np.arange(start, start + batch), count - 1)
        keys = jax.vmap(jax.random.key)(jnp.asarray(np.asarray(seeds, np.uint32)[rows]))
        chosen = jax.tree.map(lambda x, rows=rows: x[rows], texts)
        parts.append(np.asarray(draw(pipe.params, keys, *chosen, scale, times, shown)))
    return np.concatenate(parts)[:count]
