"""What metrics take, checked before anything is computed: nothing is guessed, rescaled or dropped.

Pictures   (n, height, width, channels), uint8 0 .. 255 or floating point in [-1, 1]
Features   (n, d), one row an example, finite
"""

from typing import Any

import numpy as np

from jaxdiff.errors import DataError, NonFiniteError


def check_features(name: str, features: Any, *, least: int = 2) -> np.ndarray:
    """`features` as float64 (n, d).

    Raises DataError for another rank, fewer than `least` rows, or rows that are all the same; NonFiniteError for NaN
    or infinity.
    """
    x = np.asarray(features)
    if x.ndim != 2 or x.shape[1] == 0 or x.dtype.kind not in "fiu":
        raise DataError(f"{name} must be features (n, d), got {x.dtype} {x.shape}. Flatten with x.reshape(len(x), -1).")
    if len(x) < least:
        raise DataError(f"{name} must have at least {least} rows, got {len(x)}. Give more samples.")
    x = x.astype(np.float64)
    _check_finite(name, x)
    if len(x) > 1 and (x == x[0]).all():
        raise DataError(f"{name} has {len(x)} rows that are all the same: a constant has no distribution to compare.")
    return x


def check_images(name: str, images: Any, *, channels: int | None = None) -> np.ndarray:
    """`images` as they are: uint8 or floating point in [-1, 1], (n, h, w, c).

    Raises DataError for another type, shape, number of channels or range, or when every picture is of one colour;
    NonFiniteError for NaN or infinity.
    """
    x = np.asarray(images)
    if x.ndim != 4 or 0 in x.shape or channels not in (None, x.shape[-1]):
        wanted = "channels" if channels is None else f"{channels}"
        raise DataError(f"{name} must be pictures (n, height, width, {wanted}), got shape {x.shape}.")
    if x.dtype.kind == "f":
        _check_finite(name, x)
        low, high = float(x.min()), float(x.max())
        if low < -1 or high > 1:
            raise DataError(
                f"{name} of {x.dtype} must lie in [-1, 1], got {low:g} to {high:g}. Clip them, or give uint8 0 .. 255."
            )
    elif x.dtype != np.uint8:
        raise DataError(f"{name} must be uint8 (0 .. 255) or floating point in [-1, 1], got {x.dtype}.")
    if (x == x[:, :1, :1]).all():
        raise DataError(f"{name}: each of the {len(x)} pictures is of one colour. Check how they were made or read.")
    return x


def pixels(name: str, images: Any, *, channels: int | None = None) -> np.ndarray:
    """Pictures as uint8: those in [-1, 1] are rounded, 127.5 (x + 1). Errors as `check_images`."""
    x = check_images(name, images, channels=channels)
    return x if x.dtype == np.uint8 else np.rint((x.astype(np.float32) + 1) * 127.5).astype(np.uint8)


def unit_range(name: str, images: Any, *, channels: int | None = None) -> np.ndarray:
    """Pictures as float64 in [-1, 1]: uint8 u becomes u / 127.5 - 1. Errors as `check_images`."""
    x = check_images(name, images, channels=channels)
    return x / 127.5 - 1.0 if x.dtype == np.uint8 else x.astype(np.float64)


def check_labels(name: str, labels: Any, count: int) -> np.ndarray:
    """`labels` as int64 (count,). Raises DataError for other shapes, types or negative values."""
    y = np.asarray(labels)
    if y.shape != (count,) or y.dtype.kind not in "iu" or (count and y.min() < 0):
        raise DataError(f"{name} must be {count} integers >= 0, one an example, got {y.dtype} {y.shape}.")
    return y.astype(np.int64)


def check_pair(names: str, x: np.ndarray, y: np.ndarray) -> None:
    """Raise DataError unless the examples of both have one shape."""
    if x.shape[1:] != y.shape[1:]:
        raise DataError(f"{names} must have examples of one shape, got {x.shape[1:]} and {y.shape[1:]}.")


def _check_finite(name: str, x: np.ndarray) -> None:
    bad = ~np.isfinite(x).all(axis=tuple(range(1, x.ndim)))
    if bad.any():
        raise NonFiniteError(
            f"{name} holds NaN or infinite values in {bad.sum()} of {len(x)} examples, the first at {bad.argmax()}. "
            "Leave none of them out: a model that makes them has failed."
        )
