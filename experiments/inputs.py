"""From a config to the examples: one data set, in memory or read from disk batch by batch, and its batches in order.

    data.path = FILE.npz or FILE.npy                 arrays, for any config    (jaxdiff.data.array_file)
    data.path = a directory of *-idx3-ubyte[.gz]     MNIST's own files         (jaxdiff.data.idx)
    else                                             what data.name says, in SOURCES

A folder whose pictures would take more than data.memory_gb is streamed by Grain; the batches are the same. Records
that cannot be used are replaced by others (jaxdiff.data.faults) and listed in skipped_records.jsonl of the workdir.
"""

import contextlib
import importlib.util
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import jax
import numpy as np

from experiments import cli
from experiments.configs import Config
from jaxdiff import data, text
from jaxdiff.errors import ConfigError, DataError
from jaxdiff.types import Array

Examples: TypeAlias = data.Dataset | data.ImageFolder
Rows: TypeAlias = Mapping[str, np.ndarray]
"""Arrays with a row for each example."""


def _folder(c: Config) -> Examples:
    if not c.path:
        raise ConfigError("config folder needs a directory of pictures. Type --config.data.path=DIR.")
    pictures = data.open_folder(c.path, c.size)
    gigabytes = len(pictures) * np.prod(pictures.shape) / 1e9
    if gigabytes <= c.memory_gb:
        return pictures.in_memory()
    if importlib.util.find_spec("grain") is None:
        raise DataError(
            f"{len(pictures):,} pictures take {gigabytes:.3g} GB, more than data.memory_gb={c.memory_gb:g}, and to "
            f"read them batch by batch needs Grain. Type: pip install 'jaxdiff[grain]', or, to hold them in memory, "
            f"--config.data.memory_gb={gigabytes:.3g} or more."
        )
    return pictures


def _without_path(c: Config, dataset: Examples) -> Examples:
    if c.path:
        raise ConfigError(
            f"the data set {c.name!r} is built in, and data.path is {c.path!r}, which is no array or IDX file. For "
            "pictures of your own type --config=folder."
        )
    return dataset


SOURCES = {
    "emoji": lambda c: _without_path(c, data.emoji(size=c.size)),
    "tfds": lambda c: data.tfds(c.tfds, c.split, c.path or None, size=c.size),
    "folder": _folder,
    "swissroll": lambda c: _without_path(c, data.swissroll(c.points)),
}


def load(config: Config) -> Examples:
    """The data set of `config`. Raises DataError when it is missing or not what the config says."""
    dataset = _open(config.data)
    found, size = dataset.shape, config.data.size
    if len(found) == 3 and found[:2] != (size, size):
        how = f"Type --config.data.size={found[0]}." if found[0] == found[1] else "Crop them to squares first."
        raise DataError(f"the pictures of {dataset.name} are {found[0]} x {found[1]}, and data.size is {size}. {how}")
    if config.condition == "label" and dataset.labels is None:
        raise DataError(f"{dataset.name} has no labels. Type --config.condition=none.")
    if config.condition == "caption" and dataset.captions is None:
        raise DataError(f"{dataset.name} has no captions. Type --config.condition=none, or add a metadata.jsonl.")
    return dataset


def _open(c: Config) -> Examples:
    if c.name not in SOURCES:
        raise cli.unknown("data.name", c.name, SOURCES)
    path = Path(c.path).expanduser()
    if path.suffix in (".npy", ".npz"):
        return data.array_file(path)
    if c.path and path.is_dir() and any(path.glob("*-idx3-ubyte*")):
        return data.idx(path, c.split)
    return SOURCES[c.name](c)


def describe(dataset: Examples) -> dict[str, Any]:
    """What sampling needs to know of the data, as JSON values."""
    return {
        "name": dataset.name,
        "shape": list(dataset.shape),
        "num_examples": len(dataset),
        "num_classes": dataset.num_classes,
        "label_names": list(dataset.label_names or ()),
    }


def arrays(dataset: Examples, condition: str, tokenizer: Any, max_len: int) -> dict[str, np.ndarray]:
    """What lives on the device, one row per example: ids or label if conditioned on, and the images if in memory.

    What a frozen text encoder made of the captions is too much for that: see `batches`.
    """
    rows: dict[str, np.ndarray] = {"image": dataset.images} if isinstance(dataset, data.Dataset) else {}
    if condition == "caption" and isinstance(tokenizer, text.Tokenizer):
        rows |= texts(tokenizer, dataset.captions or (), max_len)
    if condition == "label" and dataset.labels is not None:
        rows["label"] = dataset.labels
    return rows


def texts(tokenizer: Any, captions: Sequence[str], max_len: int) -> dict[str, np.ndarray]:
    """The conditions of captions: their ids, or what the frozen encoder `latents.Texts` makes of them."""
    if isinstance(tokenizer, text.Tokenizer):
        return {"ids": tokenizer.encode(list(captions), max_len)}
    return tokenizer.rows(list(captions))


def faults(dataset: Examples, path: Path) -> data.Faults:
    """The records that the run with the list at `path` skips: those known by now. DataError when they are too many.

    Of several processes each reads its own rows, and lists what it found there: the next ones in PATH.1.jsonl, ...
    """
    path = path.with_suffix(f".{jax.process_index()}.jsonl") if jax.process_index() else path
    known = dataset.skipped if isinstance(dataset, data.Dataset) else data.still_bad(dataset, path)
    return data.Faults(len(dataset), path, known)


def batches(
    dataset: Examples, *, seed: int, step: int, batch_size: int, steps: int, along: Rows | None = None, **reading: Any
) -> Generator[dict[str, np.ndarray]]:
    """From `step` on and without end, what each call of `steps` steps is given: see `take`.

    index (steps, b) says which examples, in the order of `data.order`; image (steps, b, ...) comes with it where the
    pictures are streamed, read ahead while the device works: `reading` (ahead, workers, faults) is for `data.stream`.
    So do the rows of `along`, arrays of the host. Its workers end with it. Raises DataError when too many pictures
    cannot be read.
    """
    along = along or {}
    if isinstance(dataset, data.Dataset):
        sizes: Any = {"batch_size": batch_size, "num_examples": len(dataset), "skipped": dataset.skipped}
        while True:
            index = data.orders(seed, step, steps, **sizes)
            yield {"index": index} | {name: rows[index] for name, rows in along.items()}
            step += steps
    with contextlib.closing(data.stream(dataset, seed=seed, batch_size=batch_size, step=step, **reading)) as stream:
        while True:
            parts = [next(stream) for _ in range(steps)]
            index, image = (np.stack(part) for part in zip(*parts, strict=True))
            yield {"index": index, "image": image} | {name: rows[index] for name, rows in along.items()}


def take(rows: dict[str, Array], batch: dict[str, Array]) -> dict[str, Array]:
    """The examples of one batch: rows `index` of every array on the device, and the images that came along."""
    chosen = jax.tree.map(lambda row: row[batch["index"]], rows)
    return chosen | {name: value for name, value in batch.items() if name != "index"}
