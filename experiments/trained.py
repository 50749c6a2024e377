"""A trained run, read back from its workdir: the averaged parameters, and pictures drawn from them in batches."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import latents, workdir
from experiments import model as models
from experiments.configs import Config
from jaxdiff.errors import ConfigError
from jaxdiff.train import checkpoint
from jaxdiff.types import Array, PyTree


@dataclasses.dataclass(frozen=True)
class Trained:
    """What a workdir holds: the model, the EMA of its parameters, and how and on what it was trained.

    With the parameters are those that it stands on and does not train, see `experiments.latents`.
    """

    model: Any
    params: PyTree
    config: Config
    info: dict[str, Any]
    step: int


def load(directory: Path, step: int | None = None) -> Trained:
    """Read the newest checkpoint, or that of `step`. Raises CheckpointError when there is none that fits.

    Raises ConfigError for the run of an autoencoder, which draws nothing.
    """
    run = restore(directory, step)
    if isinstance(run.model, models.Autoencoder):
        raise ConfigError(
            f"{directory} holds an autoencoder, which draws no pictures of its own. Train a model in its latents: "
            f"python -m experiments.train --config=latent_emoji --config.frozen.autoencoder={directory}"
        )
    return run


def restore(directory: Path, step: int | None = None) -> Trained:
    """As `load`, of any run."""
    config, info = workdir.load(directory)
    if config.pretrained:
        raise ConfigError(
            f"{directory} holds a fine-tuning of {config.pretrained}. Write it out, and draw with --pretrained: "
            f"python -m experiments.export --workdir={directory} --out=DIR"
        )
    tokenizer, coder = models.load_tokenizer(config, directory), latents.coder_of(config)
    latents.check(directory, coder, tokenizer)
    model = models.build(config, info, tokenizer, coder)
    template = jax.eval_shape(lambda: models.carry(model, config, jax.random.key(0)))
    carry, _ = checkpoint.Checkpoints(directory / "checkpoints").restore(template, step)
    state = carry["state"]
    return Trained(model, state.ema_params["ema"] | model.frozen, config, info, int(state.step))


def check_seeds(seeds: Sequence[int]) -> None:
    """Raise ConfigError unless all seeds are 32-bit numbers, which is what the command line and PNG files name."""
    for seed in seeds:
        if not 0 <= seed < 2**32:
            raise ConfigError(f"a seed must be an integer from 0 to {2**32 - 1}, got {seed}.")


def draw(
    run: Trained, settings: Config, cond: dict[str, Array], null: dict[str, Array], seeds: Sequence[int], batch: int
) -> np.ndarray:
    """Samples (n, ...) in [-1, 1], one per seed and row of `cond` and `null`, `batch` at a time.

    The sample of a seed does not depend on its place, on the batch size or on the other seeds. The last batch is filled
    up with copies, so that one compiled program makes all. Raises ConfigError as `model.sampler` does.
    """
    check_seeds(seeds)
    sample = jax.jit(models.sampler(run.model, settings))
    count, batch = len(seeds), min(batch, len(seeds))
    parts = []
    for start in range(0, count, batch):
        rows = np.minimum(np.arange(start, start + batch), count - 1)
        keys = jax.vmap(jax.random.key)(jnp.asarray(np.asarray(seeds, np.uint32)[rows]))
        part = sample(run.params, keys, *jax.tree.map(lambda x, rows=rows: x[rows], (cond, null)))
        parts.append(np.asarray(part))
    return np.concatenate(parts)[:count]
