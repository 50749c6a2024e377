"""A network over a large picture in overlapping tiles, so that memory is that of one tile.

    y = sum over tiles of w y_tile / sum over tiles of w,      w = clip((d - margin) / (overlap - 2 margin), tiny, 1)

d is the distance from the edge of the tile. The weights fall linearly to the edges, so that two tiles which disagree
are faded into one another and there is no seam; what is nearer than `margin` to an edge inside the picture is not used.
A convolutional network whose receptive field reaches `margin` far gives what it gives untiled.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.errors import ConfigError
from jaxdiff.types import Array

TINY = 1e-6


def tiled(
    function: Callable[[Array], Array],
    x: Array,
    *,
    tile: int = 64,
    overlap: int = 16,
    margin: int = 0,
    cells: tuple[int, int] = (1, 8),
) -> Array:
    """`function` of `x` (b, h, w, c) by square tiles; what it returns is cells[1] / cells[0] times as high and wide.

    tile, overlap and margin count cells: of cells[0] pixels of x, and cells[1] of the result. (1, 8) decodes the
    latents of a KL-f8 autoencoder, (8, 1) encodes. A picture that fits one tile is not cut; else all tiles are one
    program, one after the other.
    Raises ConfigError unless 0 <= 2 margin < overlap < tile, and the sizes are whole cells.
    """
    if not 0 <= 2 * margin < overlap < tile:
        raise ConfigError(f"need 0 <= 2 margin < overlap < tile, got {margin}, {overlap}, {tile}. Use 0, 16, 64.")
    size_in, size_out = cells
    if x.shape[1] % size_in or x.shape[2] % size_in:
        raise ConfigError(f"height and width must be multiples of {size_in}, got {x.shape[1]} x {x.shape[2]}.")
    rows, columns = (n // size_in for n in x.shape[1:3])
    high, wide = min(tile, rows), min(tile, columns)
    if (high, wide) == (rows, columns):
        return function(x)
    places = [(i, j) for i in starts(rows, high, overlap) for j in starts(columns, wide, overlap)]
    shape = (x.shape[0], high * size_in, wide * size_in, x.shape[3])
    made = jax.eval_shape(function, jax.ShapeDtypeStruct(shape, x.dtype))
    weight = _weights(high, overlap, margin, size_out)[:, None] * _weights(wide, overlap, margin, size_out)[None, :]
    weight = jnp.asarray(weight[None, :, :, None], made.dtype)

    def add(total: tuple[Array, Array], place: Array) -> tuple[tuple[Array, Array], None]:
        part = jax.lax.dynamic_slice(x, (0, place[0] * size_in, place[1] * size_in, 0), shape)
        corner = (0, place[0] * size_out, place[1] * size_out, 0)
        return (_add_at(total[0], function(part) * weight, corner), _add_at(total[1], weight, corner)), None

    whole = (rows * size_out, columns * size_out)
    empty = jnp.zeros((x.shape[0], *whole, made.shape[3]), made.dtype), jnp.zeros((1, *whole, 1), made.dtype)
    (y, weights), _ = jax.lax.scan(add, empty, jnp.asarray(places, jnp.int32))
    return y / weights


def starts(size: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin: the fewest that overlap by at least `overlap`, spread evenly from 0 to size - tile."""
    count = max(1, math.ceil((size - overlap) / max(tile - overlap, 1)))
    return np.linspace(0, size - tile, count).round().astype(int).tolist()


def _weights(tile: int, overlap: int, margin: int, cell: int) -> np.ndarray:
    """The weight of each pixel along one side of a tile."""
    place = np.arange(tile * cell) + 0.5
    distance = np.minimum(place, tile * cell - place)
    return np.clip((distance - margin * cell) / ((overlap - 2 * margin) * cell), TINY, 1.0)


def _add_at(total: Array, part: Array, corner: tuple) -> Array:
    there = jax.lax.dynamic_slice(total, corner, part.shape)
    return jax.lax.dynamic_update_slice(total, there + part, corner)
