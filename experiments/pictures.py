"""Samples as pictures: images in a grid, points of the plane as a scatter."""

import numpy as np
from PIL import Image

from jaxdiff import data
from jaxdiff.types import Array


def sheet(x0: Array, columns: int | None = None) -> Image.Image:
    """Samples (n, h, w, c) as a grid, or points (n, 2) as dots, in one picture; data in [-1, 1]."""
    return scatter(np.asarray(x0)) if x0.ndim == 2 else data.grid(data.encode(x0), columns)


def scatter(points: np.ndarray, size: int = 256, limit: float = 2.0) -> Image.Image:
    """Points (n, 2) as dark dots on white over [-limit, limit]^2; those outside or not finite are left out."""
    points = points[np.isfinite(points).all(1)]
    bins, _, _ = np.histogram2d(-points[:, 1], points[:, 0], bins=size, range=[[-limit, limit]] * 2)
    return Image.fromarray(np.where(bins > 0, 0, 255).astype(np.uint8))
