"""Does the prompt decide the picture? One sample for each of some captions of a set, looked up among its pictures.

For each sample the pictures are ordered by pixel L2 distance. The figure is the share of samples whose prompt's own
picture is among the nearest, against chance, top / n. The set is that of training, or one held out; there the same
samples drawn without their prompts stand beside it.
"""

import numpy as np

from experiments import inputs, trained
from experiments.configs import Config
from jaxdiff import data
from jaxdiff.errors import ConfigError
from jaxdiff.metrics import retrieval


def check(dataset: inputs.Examples, top: int) -> None:
    """Raise ConfigError unless `top` is a number of pictures there are."""
    if not 1 <= top <= len(dataset):
        raise ConfigError(f"--top must be an integer from 1 to {len(dataset)}, the number of pictures, got {top}.")


def control(
    run: trained.Trained,
    dataset: inputs.Examples,
    chosen: Config,
    count: int,
    *,
    seed: int = 0,
    top: int = 5,
    told: bool = True,
) -> dict:
    """The figure for `count` captions drawn by `seed`, as JSON values, with the rank of every sample.

    Not `told`, the model draws them by the empty prompt.
    """
    if dataset.captions is None:
        raise ConfigError(f"{dataset.name} has no captions; this figure is for models of condition=caption.")
    check(dataset, top)
    own = np.random.default_rng(seed).choice(len(dataset), size=min(count, len(dataset)), replace=False)
    prompts = [dataset.captions[i] for i in own]
    seeds = [seed + i for i in range(len(own))]
    null = run.model.null(len(own))
    x0 = trained.draw(run, chosen, run.model.captions(prompts) if told else null, null, seeds, 16)
    pictures = dataset if isinstance(dataset, data.Dataset) else dataset.in_memory()
    ranks = retrieval.ranks(x0, np.asarray(data.decode(pictures.images)), own)
    figure = retrieval.control(ranks, top, len(dataset))
    settings = {"samples": len(own), "pictures": len(dataset), "seed": seed, "checkpoint": run.step, "told": told}
    settings |= {name: chosen[name] for name in ("solver", "grid", "steps", "scale")}
    return figure | settings | {"ranks": ranks.tolist(), "prompts": prompts}
