"""Data: sources -> examples in memory -> batches as a pure function of (seed, step) -> [-1, 1] on the device."""

from jaxdiff.data import augment
from jaxdiff.data.batches import order, orders
from jaxdiff.data.image import decode, encode, grid, read_metadata, save_png
from jaxdiff.data.sources import Dataset, emoji

__all__ = ["Dataset", "augment", "decode", "emoji", "encode", "grid", "order", "orders", "read_metadata", "save_png"]
