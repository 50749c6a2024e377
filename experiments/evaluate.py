"""Does the prompt decide the picture? One sample for each of 64 training captions, looked up in the training set.

    python -m experiments.evaluate --workdir=runs/emoji

For each sample the training pictures are ordered by pixel L2 distance. The figure is the share of samples whose
prompt's own picture is among the 5 nearest, against chance, 5 / n. Written to evaluate.json in the workdir.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import cli, inputs, trained, workdir
from experiments.sample import settings
from experiments.train import use_compile_cache
from jaxdiff import data
from jaxdiff.errors import ConfigError
from jaxdiff.metrics import retrieval


def caption_control(
    run: trained.Trained, dataset: inputs.Examples, chosen: Any, count: int, seed: int, top: int
) -> dict:
    """The figure for `count` captions drawn by `seed`, as JSON values, with the rank of every sample."""
    if dataset.captions is None:
        raise ConfigError(f"{dataset.name} has no captions; this figure is for models of condition=caption.")
    if not 1 <= top <= len(dataset):
        raise ConfigError(f"--top must be an integer from 1 to {len(dataset)}, the number of pictures, got {top}.")
    own = np.random.default_rng(seed).choice(len(dataset), size=min(count, len(dataset)), replace=False)
    prompts = [dataset.captions[i] for i in own]
    seeds = [seed + i for i in range(len(own))]
    x0 = trained.draw(run, chosen, run.model.captions(prompts), run.model.null(len(own)), seeds, 16)
    pictures = dataset if isinstance(dataset, data.Dataset) else dataset.in_memory()
    ranks = retrieval.ranks(x0, np.asarray(data.decode(pictures.images)), own)
    figure = retrieval.control(ranks, top, len(dataset))
    settings = {"samples": len(own), "pictures": len(dataset), "seed": seed, "checkpoint": run.step}
    settings |= {name: chosen[name] for name in ("solver", "grid", "steps", "scale")}
    return figure | settings | {"ranks": ranks.tolist(), "prompts": prompts}


def run(argv: Sequence[str]) -> int:
    """The command line; returns the exit status."""
    parser = cli.Parser(
        prog="python -m experiments.evaluate",
        description="Measure how well prompts control the pictures of a trained model.",
    )
    add = parser.add_argument
    add("--workdir", required=True, help="the directory of the training run")
    add("--num", type=int, default=64, help="training captions to sample (default: 64)")
    add("--top", type=int, default=5, help="how many of the nearest pictures count (default: 5)")
    add("--seed", type=int, default=0, help="of the choice of captions and of the samples (default: 0)")
    add("--steps", type=int, help="solver steps (default: as the config)")
    add("--solver", help="(default: as the config)")
    add("--grid", help="(default: as the config)")
    add("--scale", type=float, help="guidance (default: as the config)")
    add("--checkpoint", type=int, help="the training step to use (default: the newest)")
    parser.set_defaults(prompt=True, label=(), negative="", batch=16)
    args = cli.parse_args(parser, argv)
    use_compile_cache()
    loaded = trained.load(Path(args.workdir), args.checkpoint)
    if loaded.model.condition != "caption":
        raise ConfigError(f"this figure is for models of condition=caption, got {loaded.model.condition}.")
    chosen = settings(args, loaded.config)
    cli.try_to_write(Path(args.workdir))
    figure = caption_control(loaded, inputs.load(loaded.config), chosen, args.num, args.seed, args.top)
    workdir.write_json(Path(args.workdir) / "evaluate.json", figure)
    print(
        f"own picture in the top {args.top}: {figure[f'recall_at_{args.top}']:.1%} of {figure['samples']} prompts; "
        f"chance {figure['chance']:.3%}; {figure['times_chance']:.1f} times chance"
    )
    return 0


if __name__ == "__main__":
    cli.main(run)
