"""Sources of examples: each returns a `Dataset`, decoded once and held in memory.

emoji, tfds, arrays, array_file, idx    pictures, uint8 (n, h, w, c)  (folders are in jaxdiff.data.folders)
swissroll                               points, float32 (n, 2):  (a cos a, a sin a) / 15 + noise
"""

import dataclasses
import difflib
import importlib.resources
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jaxdiff.data import faults, files
from jaxdiff.data.dataset import Dataset, not_finite
from jaxdiff.data.folders import fit
from jaxdiff.data.image import UNREADABLE
from jaxdiff.errors import ConfigError, DataError, UnsafeFileError

CAPTIONS = ("captions", "caption")  # features of tensorflow-datasets


def emoji(size: int = 32) -> Dataset:
    """The embedded default: 1,906 Noto emoji on white, with their names as captions and categories as labels.

    `size` is 32, or 16 or 8 (averaged). The licence of the pictures is in data/embedded/NOTICE.
    """
    if size not in (8, 16, 32):
        raise ConfigError(
            f"the embedded emoji are 32 x 32: size must be 8, 16 or 32, got {size}. Use folder() for more."
        )
    embedded = importlib.resources.files("jaxdiff.data") / "embedded"
    content = json.loads((embedded / "emoji32.json").read_text(encoding="utf-8"))
    with (embedded / "emoji32.webp").open("rb") as file:
        sheet = np.asarray(Image.open(file).convert("RGB"))
    images = _tiles(sheet, 32)[: len(content["captions"])]
    factor = 32 // size
    if factor > 1:
        blocks = images.reshape(-1, size, factor, size, factor, 3).astype(np.float32)
        images = np.rint(blocks.mean((2, 4))).astype(np.uint8)
    labels = np.asarray(content["labels"], np.int32)
    return Dataset(images, labels, tuple(content["label_names"]), tuple(content["captions"]), "emoji")


def _tiles(sheet: np.ndarray, size: int) -> np.ndarray:
    """A picture of (rows * size, columns * size, c) -> (rows * columns, size, size, c), row by row."""
    rows, columns = sheet.shape[0] // size, sheet.shape[1] // size
    tiles = sheet.reshape(rows, size, columns, size, -1).swapaxes(1, 2)
    return np.ascontiguousarray(tiles.reshape(rows * columns, size, size, -1))


def tfds(
    name: str, split: str = "train", data_dir: str | os.PathLike | None = None, *, size: int | None = None
) -> Dataset:
    """A prepared tensorflow-datasets set of pictures, read from array_record files without TensorFlow.

    Takes the features `image` and, where there are some, the class `label` and the captions: `caption`, or the first of
    `captions` (COCO has five of each picture). `size` crops and scales pictures of any other size to size x size.
    Raises DataError, with the command to type, when the set is not prepared; ConfigError for an unknown name.
    """
    folder = Path(data_dir or "~/tensorflow_datasets").expanduser()
    builder = _tfds_builder(name, folder)
    if not builder.info.splits:
        raise DataError(f"the set {name!r} is not prepared in {folder}. {_how_to_prepare(name, folder)}")
    features = builder.info.features or {}
    if "image" not in features:
        raise DataError(f"the set {name!r} has no feature 'image', only {sorted(features)}.")
    try:
        source: Any = builder.as_data_source(split)
    except NotImplementedError as error:
        how = _how_to_prepare(name, folder)
        raise DataError(f"{name!r} in {folder} is not in array_record files. Delete it. {how}") from error
    except ValueError as error:
        raise DataError(f"split {split!r} of {name!r}: {error}") from error
    found = _read_examples(source, size, sorted({"label", *CAPTIONS} & set(features)), name)
    label_names = tuple(features["label"].names) if found.labels is not None else None
    return dataclasses.replace(found, label_names=label_names)


def _tfds_builder(name: str, folder: Path) -> Any:
    try:
        import tensorflow_datasets
    except ImportError as error:
        raise DataError(f"reading {name!r} needs a package: {error}. Type: pip install 'jaxdiff[tfds]'.") from error
    try:
        return tensorflow_datasets.builder(name, data_dir=folder)
    except ValueError as error:
        known = tensorflow_datasets.list_builders(with_community_datasets=False)
        near = difflib.get_close_matches(name, known, 3)
        reason = str(error).splitlines()[0]
        raise ConfigError(f"tensorflow-datasets cannot open {name!r}: {reason} The nearest names: {near}.") from error


def _how_to_prepare(name: str, folder: Path) -> str:
    install = "pip install tensorflow-cpu tensorflow-datasets importlib_resources pillow"
    builder = f"tfds.builder('{name}', data_dir='{folder}', file_format='array_record')"
    prepare = f'python -c "import tensorflow_datasets as tfds; {builder}.download_and_prepare()"'
    return f"Prepare it once, where TensorFlow may be installed (reading needs none): {install} && {prepare}"


def _read_examples(source: Any, size: int | None, also: Sequence[str], name: str) -> Dataset:
    """The pictures, and of the features `also` the labels and captions."""
    images: np.ndarray | None = None
    labels, captions = np.zeros(len(source), np.int32), [""] * len(source)
    texts = [feature for feature in CAPTIONS if feature in also][:1]
    found = faults.Faults(len(source))
    for i, example in _examples(source, name):
        if isinstance(example, str):
            found.add({i: example})
            continue
        image = example["image"]
        image = image[..., None] if image.ndim == 2 else image
        if size is not None and image.shape[:2] != (size, size):
            image = fit(Image.fromarray(image.squeeze()), size, 1 if image.shape[2] == 1 else 3)
        images = np.zeros((len(source), *image.shape), np.uint8) if images is None else images
        if image.shape != images.shape[1:]:
            raise DataError(f"the pictures differ in shape: {image.shape}, {images.shape[1:]}. Pass size=.")
        images[i] = image
        labels[i] = example["label"] if "label" in also else 0
        captions[i] = _caption(example[texts[0]]) if texts else ""
    if images is None:
        raise DataError("the split is empty.")
    told = tuple(captions) if texts else None
    return Dataset(images, labels if "label" in also else None, None, told, name, found.found)


def _caption(value: Any) -> str:
    """One text, or the first of several, each perhaps beside a number of its own."""
    value = value["text"] if isinstance(value, Mapping) else value
    first = value if isinstance(value, bytes | str) else next(iter(np.ravel(value)), "")
    return first.decode("utf-8", "replace") if isinstance(first, bytes) else str(first)


def _examples(source: Any, name: str) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Every example, read by the thousand; where one of them cannot be read, one by one, and what is wrong with it."""
    from google.protobuf.message import DecodeError  # comes with tensorflow-datasets

    unreadable = (*UNREADABLE, DecodeError)
    for start in range(0, len(source), 1000):
        indices = range(start, min(start + 1000, len(source)))
        try:
            yield from zip(indices, source.__getitems__(indices), strict=True)
        except unreadable:
            yield from ((i, _example(source, i, name, unreadable)) for i in indices)


def _example(source: Any, index: int, name: str, unreadable: tuple[type[Exception], ...]) -> dict[str, Any] | str:
    try:
        return source[index]
    except unreadable as error:
        return f"record {index} of {name} cannot be read: {error!r:.300}"


def arrays(
    images: np.ndarray,
    labels: Sequence[int] | np.ndarray | None = None,
    captions: Sequence[str] | np.ndarray | None = None,
    *,
    label_names: Sequence[str] | None = None,
    name: str = "arrays",
) -> Dataset:
    """Arrays of your own: `images` uint8 (n, h, w, c) or (n, h, w), or float32 (n, ...) taken as they are.

    Examples that hold NaN or infinite values are in `skipped`: see `faults`. Raises DataError when lengths or types do
    not fit, or too many examples are not finite.
    """
    images = np.asarray(images)
    images = images[..., None] if images.dtype == np.uint8 and images.ndim == 3 else images
    if images.ndim == 0:
        raise DataError(f"images must be an array of examples, got the single value {images}.")
    found = faults.Faults(len(images))
    found.add({i: f"example {i} of {name} holds NaN or infinite values." for i in not_finite(images)})
    texts = None if captions is None else tuple(str(caption) for caption in captions)
    names = None if label_names is None else tuple(label_names)
    return Dataset(images, None if labels is None else _labels(labels), names, texts, name, found.found)


def _labels(labels: Sequence[int] | np.ndarray) -> np.ndarray:
    numbers = np.asarray(labels)
    if numbers.dtype.kind not in "iu":
        raise DataError(f"labels must be integers, got {numbers.dtype}.")
    if numbers.size and not -(2**31) <= int(numbers.min()) <= int(numbers.max()) < 2**31:
        raise DataError(f"labels must be below 2**31, got values from {numbers.min()} to {numbers.max()}.")
    return numbers.astype(np.int32)


def array_file(path: str | os.PathLike) -> Dataset:
    """A .npy of images, or a .npz of `images` and, where present, `labels`, `captions` and `label_names`.

    Raises UnsafeFileError for pickled content, DataError for a missing or damaged file.
    """
    path = Path(path)
    if path.suffix not in (".npy", ".npz"):
        raise UnsafeFileError(f"refusing {path}: only .npy and .npz are read. Save with numpy.savez(path, images=...).")
    parts = files.read_npz(path) if path.suffix == ".npz" else {"images": files.read_npy(path)}
    if "images" not in parts:
        raise DataError(f"{path} has no array 'images', only {sorted(parts)}.")
    texts = {
        key: _texts(parts[key], f"{key} of {path}") if key in parts else None for key in ("captions", "label_names")
    }
    return arrays(parts["images"], parts.get("labels"), **texts, name=path.stem)


def _texts(values: np.ndarray, where: str) -> list[str]:
    if values.ndim != 1:
        raise DataError(f"{where} must be a list of texts, got shape {values.shape}.")
    try:
        return [str(value) for value in values]
    except (ValueError, SystemError) as error:  # code points that Unicode does not have
        raise DataError(f"{where} are damaged: {error}") from error


def idx(path: str | os.PathLike, split: str = "train") -> Dataset:
    """MNIST's own files, as MNIST, Fashion-MNIST and KMNIST publish them: a folder of *-ubyte or *-ubyte.gz.

    `split` is train or test. Raises DataError for a missing or damaged file.
    """
    prefixes = {"train": "train", "test": "t10k"}
    if split not in prefixes:
        raise ConfigError(f"split must be one of {sorted(prefixes)}, got {split!r}.")
    images = files.read_idx(Path(path), f"{prefixes[split]}-images-idx3-ubyte")
    labels = files.read_idx(Path(path), f"{prefixes[split]}-labels-idx1-ubyte")
    return arrays(images, labels, name=Path(path).name)


def swissroll(count: int = 10_000, seed: int = 0, *, noise: float = 0.02) -> Dataset:
    """Points of a spiral in the plane, float32 (count, 2), about within [-1, 1]: angle in [1.5 pi, 4.5 pi]."""
    if count < 1:
        raise ConfigError(f"count must be an integer >= 1, got {count}.")
    rng = np.random.default_rng(seed)
    angle = 1.5 * np.pi * (1.0 + 2.0 * rng.random(count))
    points = np.stack([angle * np.cos(angle), angle * np.sin(angle)], axis=1) / 15.0
    return Dataset((points + noise * rng.standard_normal(points.shape)).astype(np.float32), name="swissroll")
