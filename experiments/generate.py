"""Samples of a trained run for measuring it: many, in parts that a killed run finds again, over all devices.

Sample i of seed s is made with the key of s * 2^20 + i, for the condition of the i-th example in the order of s; so it
is the same in every run of the command, whatever was there before.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from experiments import features, inputs, trained, workdir
from experiments import model as models
from experiments.configs import Config
from jaxdiff import data, train
from jaxdiff.errors import ConfigError
from jaxdiff.types import Array

SPACING = 2**20


@dataclasses.dataclass(frozen=True)
class Samples:
    """Examples as the data has them (uint8 pictures, or float32), and the training example each was conditioned on."""

    x: np.ndarray
    own: np.ndarray


def own_examples(dataset: inputs.Examples, seed: int, count: int) -> np.ndarray:
    """Whose conditions the samples of a seed have: the first of an order of the training set, again and again."""
    return data.order(seed, 0, batch_size=count, num_examples=len(dataset))


def conditions(run: trained.Trained, dataset: inputs.Examples, rows: np.ndarray) -> dict[str, Array]:
    """The conditions of examples `rows`: their labels or captions."""
    if run.model.condition == "caption":
        return run.model.captions([str(caption) for caption in np.asarray(dataset.captions)[rows]])
    if run.model.condition == "label":
        labels = np.asarray(dataset.labels)
        return {"label": jnp.asarray(labels[rows], jnp.int32)}
    return {}


def draw(
    run: trained.Trained, dataset: inputs.Examples, chosen: Config, seed: int, count: int, *, folder: Path, mesh: Any,
    batch: int,
) -> Samples:  # fmt: skip
    """`count` samples with the settings `chosen`, kept below `folder`. Raises ConfigError as `model.sampler` does."""
    if not 0 <= seed < 2**12 or count > SPACING:
        raise ConfigError(f"a seed must be from 0 to 4095 and --num at most {SPACING}, got {seed} and {count}.")
    settings = {name: chosen[name] for name in ("solver", "grid", "steps", "scale", "clip")}
    settings |= {"checkpoint": run.step, "seed": seed, "data": run.info["name"], "batch": batch}
    where = folder / f"samples-{features.digest(settings)}"
    where.mkdir(parents=True, exist_ok=True)
    workdir.write_json(where / "settings.json", settings)
    own = own_examples(dataset, seed, count)
    sample = jax.jit(models.sampler(run.model, chosen))
    place = train.mesh.batch_sharding(mesh)
    params = jax.device_put(run.params, train.mesh.replicated(mesh))
    bar = tqdm(total=-(-count // batch), desc=f"steps {chosen.steps}, scale {chosen.scale:g}, seed {seed}")

    def make(rows: np.ndarray) -> np.ndarray:
        keys = jax.vmap(jax.random.key)(jnp.asarray(seed * SPACING + rows, jnp.uint32))
        cond, null = conditions(run, dataset, own[rows]), run.model.null(len(rows))
        x0 = sample(params, *jax.device_put((keys, cond, null), place))
        bar.update()
        return np.asarray(data.encode(x0) if len(run.model.shape) == 3 else x0)

    with bar:
        return Samples(features.in_parts(where, count, batch, make), own)
