"""From a config to the examples: one data set in memory, described by a few numbers that a workdir keeps."""

from typing import Any

import numpy as np

from experiments import cli
from experiments.configs import Config
from jaxdiff import data
from jaxdiff.errors import ConfigError, DataError


def _folder(c: Config) -> data.Dataset:
    if not c.path:
        raise ConfigError("config folder needs a directory of pictures. Type --config.data.path=DIR.")
    return data.folder(c.path, size=c.size)


SOURCES = {
    "emoji": lambda c: data.emoji(size=c.size),
    "tfds": lambda c: data.tfds(c.tfds, c.split, c.path or None),
    "folder": _folder,
    "swissroll": lambda c: data.swissroll(c.points),
}


def load(config: Config) -> data.Dataset:
    """The data set of `config`. Raises DataError when it is missing or not what the config says."""
    if config.data.name not in SOURCES:
        raise cli.unknown("data.name", config.data.name, SOURCES)
    dataset = SOURCES[config.data.name](config.data)
    found = dataset.images.shape[1:]
    if len(found) == 3 and found[:2] != (config.data.size, config.data.size):
        raise DataError(
            f"the pictures of {dataset.name} are {found[0]} x {found[1]}, and data.size is {config.data.size}. "
            f"Type --config.data.size={found[0]}."
        )
    if config.condition == "label" and dataset.labels is None:
        raise DataError(f"{dataset.name} has no labels. Type --config.condition=none.")
    if config.condition == "caption" and dataset.captions is None:
        raise DataError(f"{dataset.name} has no captions. Type --config.condition=none, or add a metadata.jsonl.")
    return dataset


def describe(dataset: data.Dataset) -> dict[str, Any]:
    """What sampling needs to know of the data, as JSON values."""
    return {
        "name": dataset.name,
        "shape": list(dataset.images.shape[1:]),
        "num_examples": len(dataset),
        "num_classes": dataset.num_classes,
        "label_names": list(dataset.label_names or ()),
    }


def arrays(dataset: data.Dataset, condition: str, tokenizer: Any, max_len: int) -> dict[str, np.ndarray]:
    """The arrays that training reads, one row per example: image, and ids or label if conditioned on."""
    rows: dict[str, np.ndarray] = {"image": dataset.images}
    if condition == "caption":
        rows["ids"] = tokenizer.encode(dataset.captions, max_len)
    if condition == "label" and dataset.labels is not None:
        rows["label"] = dataset.labels
    return rows
