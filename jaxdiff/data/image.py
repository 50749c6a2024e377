"""Pixels and pictures: uint8 <-> [-1, 1], grids, and PNG files that carry their settings.

    decode(u) = u / 127.5 - 1          encode(x) = round(127.5 (x + 1)), clipped to 0 .. 255

`encode(decode(u)) == u` for all 256 values.
"""

import math
import os
import struct
import zlib
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from PIL import Image, PngImagePlugin

from jaxdiff.atomic import replacing
from jaxdiff.errors import ConfigError, DataError
from jaxdiff.types import Array

# What Pillow and its decoders may raise for damaged pictures, by format and kind of damage.
UNREADABLE = (
    OSError, ValueError, SyntaxError, TypeError, LookupError, ArithmeticError, AttributeError, RuntimeError, EOFError,
    MemoryError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip


def decode(images: Array | np.ndarray) -> Array:
    """uint8 0 .. 255 -> float32 in [-1, 1], the same shape; float examples are returned as float32 unchanged."""
    x = jnp.asarray(images).astype(jnp.float32)
    return x if jnp.issubdtype(images.dtype, jnp.floating) else x / 127.5 - 1.0


def encode(x: Array | np.ndarray) -> Array:
    """Float in [-1, 1] -> uint8 0 .. 255, rounded to the nearest; values outside are clipped, NaN becomes 0."""
    scaled = jnp.round((jnp.asarray(x).astype(jnp.float32) + 1.0) * 127.5)
    return jnp.nan_to_num(jnp.clip(scaled, 0.0, 255.0), nan=0.0).astype(jnp.uint8)


def grid(images: Array | np.ndarray, columns: int | None = None, *, gap: int = 2) -> Image.Image:
    """Lay uint8 images (n, h, w, 1, 3 or 4) row by row on white, `columns` a row (default: nearly square).

    Raises DataError for another shape or type, ConfigError for `columns` below 1.
    """
    tiles = np.asarray(images)
    if tiles.dtype != np.uint8 or tiles.ndim != 4 or tiles.shape[3] not in (1, 3, 4) or len(tiles) == 0:
        raise DataError(
            f"grid takes uint8 (n, h, w, 1, 3 or 4), got {tiles.dtype} {tiles.shape}. Call encode(x) first."
        )
    count, height, width, channels = tiles.shape
    wanted = math.ceil(math.sqrt(count)) if columns is None else columns
    if wanted < 1:
        raise ConfigError(f"columns must be an integer >= 1, got {columns}.")
    across = min(count, wanted)
    rows = -(-count // across)
    sheet = np.full((rows * (height + gap) - gap, across * (width + gap) - gap, channels), 255, np.uint8)
    for i, tile in enumerate(tiles):
        top, left = i // across * (height + gap), i % across * (width + gap)
        sheet[top : top + height, left : left + width] = tile
    return Image.fromarray(sheet[..., 0] if channels == 1 else sheet)


def save_png(path: str | os.PathLike, picture: Image.Image, metadata: Mapping[str, object] | None = None) -> None:
    """Write `picture` as PNG with `metadata` as text entries; the file appears whole or not at all.

    Raises OSError as the file system does (no space, read-only), leaving what was there before.
    """
    info = PngImagePlugin.PngInfo()
    for name, value in (metadata or {}).items():
        info.add_itxt(name, str(value))
    with replacing(path) as temporary:
        picture.save(temporary, "PNG", pnginfo=info)


def read_metadata(path: str | os.PathLike) -> dict[str, str]:
    """The text entries of a PNG file. Raises DataError for a file that is none, or damaged."""
    try:
        with Image.open(path, formats=("PNG",)) as picture:
            return {str(name): str(value) for name, value in picture.info.items() if isinstance(value, str)}
    except UNREADABLE as error:
        raise DataError(f"{path} cannot be read as a PNG file: {error!s:.300}") from error
