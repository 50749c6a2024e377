"""Examples in memory, decoded once.

Pictures stay uint8 until a batch reaches the device, where `jaxdiff.data.decode` maps them to [-1, 1].
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from jaxdiff.errors import DataError


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Examples in memory: `images` uint8 (n, h, w, c), or float32 (n, ...) taken as they are.

    `labels` is int32 (n,) or None, `label_names[label]` its name, `captions` n strings or None. `skipped[i]` says why
    example i cannot be used; `order` replaces it. Raises DataError when the lengths or types do not fit together.
    """

    images: np.ndarray
    labels: np.ndarray | None = None
    label_names: tuple[str, ...] | None = None
    captions: tuple[str, ...] | None = None
    name: str = "arrays"
    skipped: Mapping[int, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_images(self.images, self.name, self.skipped)
        if self.labels is not None:
            _check_labels(self.labels, len(self.images), self.label_names)
        if self.captions is not None and len(self.captions) != len(self.images):
            raise DataError(f"captions must be one per image: got {len(self.captions)} for {len(self.images)} images.")

    def __len__(self) -> int:
        return len(self.images)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one example."""
        return self.images.shape[1:]

    @property
    def num_classes(self) -> int:
        """The number of classes, 0 without labels."""
        if self.labels is None:
            return 0
        return len(self.label_names) if self.label_names else int(self.labels.max()) + 1


def _check_images(images: np.ndarray, name: str, skipped: Mapping[int, str]) -> None:
    if len(images) == 0:
        raise DataError(f"the data set {name!r} is empty. Check its path and its split.")
    if images.dtype == np.uint8 and images.ndim != 4:
        raise DataError(f"uint8 images must have shape (n, height, width, channels), got {images.shape}.")
    if images.dtype not in (np.uint8, np.float32):
        raise DataError(f"images must be uint8 (0 to 255) or float32 (already scaled), got {images.dtype}.")
    if any(i not in skipped for i in not_finite(images)):
        raise DataError(f"the float32 examples of {name!r} hold NaN or infinite values. Remove them first.")


def not_finite(images: np.ndarray) -> list[int]:
    """The examples that hold NaN or infinite values."""
    if images.dtype.kind != "f" or np.isfinite(images).all():
        return []
    return np.flatnonzero(~np.isfinite(images).reshape(len(images), -1).all(1)).tolist()


def _check_labels(labels: np.ndarray, count: int, names: tuple[str, ...] | None) -> None:
    if labels.shape != (count,) or labels.dtype != np.int32:
        raise DataError(f"labels must be int32 of shape ({count},), got {labels.dtype} {labels.shape}.")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or (names is not None and high >= len(names)):
        limit = f" and below {len(names)}" if names is not None else ""
        raise DataError(f"labels must be at least 0{limit}, got values from {low} to {high}.")
