"""Data: sources -> examples in memory -> batches as a pure function of (seed, step) -> [-1, 1] on the device."""

from jaxdiff.data import augment
from jaxdiff.data.batches import order, orders, stream
from jaxdiff.data.dataset import Dataset
from jaxdiff.data.faults import Faults, still_bad
from jaxdiff.data.folders import ImageFolder, folder, open_folder
from jaxdiff.data.image import decode, encode, grid, read_metadata, save_png
from jaxdiff.data.sources import array_file, arrays, emoji, idx, swissroll, tfds

__all__ = [
    "Dataset",
    "Faults",
    "ImageFolder",
    "array_file",
    "arrays",
    "augment",
    "decode",
    "emoji",
    "encode",
    "folder",
    "grid",
    "idx",
    "open_folder",
    "order",
    "orders",
    "read_metadata",
    "save_png",
    "still_bad",
    "stream",
    "swissroll",
    "tfds",
]
