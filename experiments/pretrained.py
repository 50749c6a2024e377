"""Pictures from a published Stable Diffusion: what `experiments.sample --pretrained DIR` does.

    python -m experiments.sample --pretrained DIR --prompt "a red house" --solver unipc --steps 20 --scale 7.5

One program draws every picture: parameters, prompts, seeds, scale and times are its arguments.
"""

import argparse
import json
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from experiments import cli, pictures, trained
from jaxdiff import data, pipelines, sample, solver
from jaxdiff.errors import ConfigError
from jaxdiff.pretrained import inversion
from jaxdiff.pretrained import pipelines as published
from jaxdiff.types import Array

SOLVERS = solver.ALL | {"unipc": solver.unipc, "deis": solver.deis}
STEPS, SCALE = 20, 7.5


def check(args: argparse.Namespace) -> None:
    """Raise ConfigError for options that say nothing to a published model, or are missing."""
    for name in ("label", "checkpoint", "each"):
        if getattr(args, name):
            raise ConfigError(f"--{name} is for the model of a --workdir, not for --pretrained.")
    if not args.prompt:
        raise ConfigError('--pretrained needs a --prompt. Type --prompt "a red house".')
    if args.scale is not None and args.scale < 0:
        raise ConfigError(f"--scale must be >= 0, got {args.scale}. 1 is no guidance.")
    if args.size and any(n < 8 or n % 8 for n in args.size):
        raise ConfigError(f"--size must be multiples of 8, got {args.size}.")


def run(args: argparse.Namespace) -> int:
    """Draw and write; returns the exit status."""
    pipe = published.load(args.pretrained, variant=args.variant, dtype=jnp.bfloat16 if args.half else None)
    for path in args.inversion:
        pipe = inversion.add(pipe, inversion.load(path))
    per = args.seeds or list(range(args.seed, args.seed + (args.num or 1)))
    trained.check_seeds(per)
    prompts = [prompt for prompt in args.prompt for _ in per]
    seeds = per * len(args.prompt)
    steps, scale = args.steps or STEPS, SCALE if args.scale is None else args.scale
    name = args.solver or pipe.chain.solver
    used = cli.call("--solver", name, SOLVERS, schedule=pipe.model.schedule)
    times = pipe.chain.times(steps, name)
    if args.grid:
        times = cli.call("--grid", args.grid, sample.GRIDS, schedule=pipe.model.schedule, num_steps=steps)
    draw = program(pipe, used, tuple(args.size) if args.size else pipe.size)
    x0 = in_batches(draw, pipe, prompts, args.negative, seeds, scale, times, args.batch or 1)
    info = {
        "prompts": json.dumps(prompts), "seeds": json.dumps(seeds), "negative": args.negative, "solver": name,
        "steps": steps, "scale": scale,
    }  # fmt: skip
    data.save_png(args.out, pictures.sheet(x0, prompts), info)
    print(f"wrote {args.out}: {len(x0)} pictures of {x0.shape[1]} x {x0.shape[2]}")
    return 0


def program(pipe: published.Pipeline, used: solver.Solver, size: tuple[int, int]) -> Callable[..., Array]:
    """The jitted program from ids to pictures."""

    @jax.jit
    def draw(params, keys, prompt, negative, scale, times):
        cond, null = (pipe.encode(params, texts, size=size) for texts in (prompt, negative))
        settings = {"times": times, "solver": used, "scale": scale, "size": size}
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
        parts.append(np.asarray(draw(pipe.params, keys, *chosen, scale, times)))
    return np.concatenate(parts)[:count]
