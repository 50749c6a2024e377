"""Samples as pictures: images in a grid, points of the plane as a scatter; and pictures from files."""

import itertools
import os
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from jaxdiff import data
from jaxdiff.data import folders, image
from jaxdiff.errors import DataError
from jaxdiff.types import Array


def read(path: str | os.PathLike, size: tuple[int, int] | None = None) -> np.ndarray:
    """The picture in a file, (1, h, w, 3) in [-1, 1], stretched to `size` (h, w) where given. Raises DataError."""
    try:
        with Image.open(path, formats=folders.FORMATS) as picture:
            upright = folders.plain(picture)
            if size is not None:
                upright = upright.resize((size[1], size[0]), Image.Resampling.LANCZOS)
    except image.UNREADABLE as error:
        raise DataError(f"{path} cannot be read as a picture: {error!s:.300}") from error
    return np.asarray(upright, np.float32)[None] / 127.5 - 1


def sheet(x0: Array | np.ndarray, names: Sequence[str | int] = ()) -> Image.Image:
    """Samples (n, h, w, c) as a grid, or points (n, 2) as dots, in one picture; data in [-1, 1].

    Where the names of the samples come in equal runs, each run is a row with its name beside it. Several small
    pictures are enlarged so that they can be seen; a single one keeps its pixels.
    """
    if x0.ndim == 2:
        return scatter(np.asarray(x0))
    run = _run_length(names)
    grid = data.grid(data.encode(x0), run)
    factor = max(1, 64 // x0.shape[1]) if len(x0) > 1 else 1
    grid = grid.resize((grid.width * factor, grid.height * factor), Image.Resampling.NEAREST)
    return grid if run is None else _beside(grid, [str(name) for name in names[::run]])


def _run_length(names: Sequence[str | int]) -> int | None:
    """The length of the runs of equal names, or None where they differ or there is only one."""
    lengths = {len(list(run)) for _, run in itertools.groupby(names)}
    return lengths.pop() if len(lengths) == 1 and len(set(names)) > 1 else None


def _beside(grid: Image.Image, names: Sequence[str]) -> Image.Image:
    """`grid` with a line of text at the left of each row."""
    font = ImageFont.load_default(14)
    margin = 12 + int(max(font.getlength(name) for name in names))
    picture = Image.new("RGB", (margin + grid.width, grid.height), "white")
    picture.paste(grid, (margin, 0))
    draw, height = ImageDraw.Draw(picture), grid.height / len(names)
    for i, name in enumerate(names):
        draw.text((6, (i + 0.5) * height), name, fill="black", font=font, anchor="lm")
    return picture


def scatter(points: np.ndarray, size: int = 256, limit: float = 2.0) -> Image.Image:
    """Points (n, 2) as dark dots on white over [-limit, limit]^2; those outside or not finite are left out."""
    points = points[np.isfinite(points).all(1)]
    bins, _, _ = np.histogram2d(-points[:, 1], points[:, 0], bins=size, range=[[-limit, limit]] * 2)
    return Image.fromarray(np.where(bins > 0, 0, 255).astype(np.uint8))
