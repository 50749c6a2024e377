"""Sources of examples: each returns a `Dataset`, decoded once and held in memory.

emoji, tfds, arrays, array_file, idx    pictures, uint8 (n, h, w, c)  (folders are in jaxdiff.data.folders)
swissroll                               points, float32 (n, 2):  (a cos a, a sin a) / 15 + noise
"""

import difflib
import gzip
import importlib.resources
import json
import math
import os
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jaxdiff.data.dataset import Dataset
from jaxdiff.data.folders import fit
from jaxdiff.errors import ConfigError, DataError, UnsafeFileError


def emoji(size: int = 32) -> Dataset:
    """The embedded default: 1,906 Noto emoji on white, with their names as captions and categories as labels.

    `size` is 32, or 16 or 8 (averaged). The licence of the pictures is in data/embedded/NOTICE.
    """
    if size not in (8, 16, 32):
        raise ConfigError(
            f"the embedded emoji are 32 x 32: size must be 8, 16 or 32, got {size}. Use folder() for more."
        )
    files = importlib.resources.files("jaxdiff.data") / "embedded"
    content = json.loads((files / "emoji32.json").read_text(encoding="utf-8"))
    with (files / "emoji32.webp").open("rb") as file:
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

    Takes the features `image` and, where there is one, the class `label`. `size` crops and scales to size x size, for
    sets whose pictures differ. Raises DataError, with the command to type, when the set is not prepared; ConfigError
    for an unknown name.
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
    images, labels = _read_examples(source, size, "label" in features)
    label_names = tuple(features["label"].names) if labels is not None else None
    return Dataset(images, labels, label_names, None, name)


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


def _read_examples(source: Any, size: int | None, with_labels: bool) -> tuple[np.ndarray, np.ndarray | None]:
    images: np.ndarray | None = None
    labels = np.zeros(len(source), np.int32)
    for start in range(0, len(source), 1000):
        indices = range(start, min(start + 1000, len(source)))
        for i, example in zip(indices, source.__getitems__(indices), strict=True):
            image = example["image"] if size is None else fit(Image.fromarray(example["image"].squeeze()), size)
            image = image[..., None] if image.ndim == 2 else image
            images = np.empty((len(source), *image.shape), np.uint8) if images is None else images
            if image.shape != images.shape[1:]:
                raise DataError(f"the pictures differ in shape: {image.shape}, {images.shape[1:]}. Pass size=.")
            images[i] = image
            labels[i] = example["label"] if with_labels else 0
    if images is None:
        raise DataError("the split is empty.")
    return images, labels if with_labels else None


def arrays(
    images: np.ndarray,
    labels: Sequence[int] | np.ndarray | None = None,
    captions: Sequence[str] | np.ndarray | None = None,
    *,
    label_names: Sequence[str] | None = None,
    name: str = "arrays",
) -> Dataset:
    """Arrays of your own: `images` uint8 (n, h, w, c) or (n, h, w), or float32 (n, ...) taken as they are.

    Raises DataError when lengths, types or values do not fit.
    """
    images = np.asarray(images)
    images = images[..., None] if images.dtype == np.uint8 and images.ndim == 3 else images
    if labels is not None:
        labels = np.asarray(labels)
        if labels.dtype.kind not in "iu":
            raise DataError(f"labels must be integers, got {labels.dtype}.")
        labels = labels.astype(np.int32)
    texts = None if captions is None else tuple(str(caption) for caption in captions)
    return Dataset(images, labels, None if label_names is None else tuple(label_names), texts, name)


def array_file(path: str | os.PathLike) -> Dataset:
    """A .npy of images, or a .npz of `images` and, where present, `labels`, `captions` and `label_names`.

    Raises UnsafeFileError for pickled content, DataError for a missing or damaged file.
    """
    path = Path(path)
    if path.suffix not in (".npy", ".npz"):
        raise UnsafeFileError(f"refusing {path}: only .npy and .npz are read. Save with numpy.savez(path, images=...).")
    try:
        loaded = np.load(path, allow_pickle=False)
        parts = {"images": loaded} if isinstance(loaded, np.ndarray) else {key: loaded[key] for key in loaded.files}
    except FileNotFoundError as error:
        raise DataError(f"there is no file {path}.") from error
    except (ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
        if "pickle" in str(error).lower():
            raise UnsafeFileError(f"refusing {path}: pickled arrays can run code. Save plain arrays.") from error
        raise DataError(f"{path} is damaged: {error}") from error
    if "images" not in parts:
        raise DataError(f"{path} has no array 'images', only {sorted(parts)}.")
    names = [str(label) for label in parts["label_names"]] if "label_names" in parts else None
    return arrays(parts["images"], parts.get("labels"), parts.get("captions"), label_names=names, name=path.stem)


def idx(path: str | os.PathLike, split: str = "train") -> Dataset:
    """MNIST's own files, as MNIST, Fashion-MNIST and KMNIST publish them: a folder of *-ubyte or *-ubyte.gz.

    `split` is train or test. Raises DataError for a missing or damaged file.
    """
    prefixes = {"train": "train", "test": "t10k"}
    if split not in prefixes:
        raise ConfigError(f"split must be one of {sorted(prefixes)}, got {split!r}.")
    images = _read_idx(Path(path), f"{prefixes[split]}-images-idx3-ubyte")
    labels = _read_idx(Path(path), f"{prefixes[split]}-labels-idx1-ubyte")
    return arrays(images, labels, name=Path(path).name)


def _read_idx(folder: Path, name: str) -> np.ndarray:
    """IDX: bytes 0, 0, type (8 = uint8), rank, then big-endian sizes, then the values."""
    plain, packed = folder / name, folder / f"{name}.gz"
    try:
        content = gzip.decompress(packed.read_bytes()) if packed.exists() else plain.read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"there is neither {plain} nor {packed.name} beside it.") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{packed if packed.exists() else plain} cannot be read: {error}") from error
    rank = content[3] if len(content) > 3 else 0
    shape = tuple(int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(rank))
    body = content[4 + 4 * rank :]
    if content[:3] != b"\0\0\x08" or len(content) < 4 + 4 * rank or len(body) != math.prod(shape):
        raise DataError(f"{plain} is damaged or is not an IDX file of bytes.")
    return np.frombuffer(body, np.uint8).reshape(shape)


def swissroll(count: int = 10_000, seed: int = 0, *, noise: float = 0.02) -> Dataset:
    """Points of a spiral in the plane, float32 (count, 2), about within [-1, 1]: angle in [1.5 pi, 4.5 pi]."""
    if count < 1:
        raise ConfigError(f"count must be an integer >= 1, got {count}.")
    rng = np.random.default_rng(seed)
    angle = 1.5 * np.pi * (1.0 + 2.0 * rng.random(count))
    points = np.stack([angle * np.cos(angle), angle * np.sin(angle)], axis=1) / 15.0
    return Dataset((points + noise * rng.standard_normal(points.shape)).astype(np.float32), name="swissroll")
