"""A 3 x 3 convolution with a quarter of the multiplications, for CPUs: Winograd's F(4 x 4, 3 x 3).

    y_tile = A^T [ sum over c_in of (G k G^T) (B^T x_tile B) ] A          x_tile 6 x 6, y_tile 4 x 4, k 3 x 3

The bracket is 36 matrix products (tiles, c_in) (c_in, c_out), one for each position in the tile. A, B and G are the
Cook-Toom matrices of the points 0, +-sqrt(1/2), +-sqrt(2), infinity: with them the error in float32 is 2e-6 of the
largest output, against 1e-5 with the usual 0, +-1, +-2. The derivative is the transpose of each factor, and both
gradients share the transform of dy:

    dx_tile = B [ (A dy_tile A^T) (G k G^T)^T ] B^T, overlapping tiles added;   dk = G^T [ (B^T x B)^T (A dy A^T) ] G

Lavin & Gray 2016, section 4; Barabasz et al. 2020 for the points.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxdiff.types import Array

TILE = 4


def _cook_toom(points: Sequence[float]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(A^T, G, B^T) of shapes (4, 6), (6, 3), (6, 6) for five finite points and infinity."""
    p = np.array(points)
    gaps = [np.delete(p, i) for i in range(5)]
    powers = p[:, None] ** np.arange(4)
    out = np.vstack([powers, [0, 0, 0, 1]]).T
    kernel = np.vstack([powers[:, :3] / [[np.prod(a - gap)] for a, gap in zip(p, gaps, strict=True)], [0, 0, 1]])
    data = np.vstack([np.append(np.poly(gap)[::-1], 0) for gap in gaps] + [np.poly(p)[::-1]])
    return out, kernel, np.where(np.abs(data) < 1e-12, 0, data)


A_T, G, B_T = _cook_toom((0, -(0.5**0.5), 0.5**0.5, -(2**0.5), 2**0.5))


def fits(x: Array, kernel: Array) -> bool:
    """Whether `conv` takes these shapes and is worth it: measured on a two-core AVX-512 machine."""
    h, w, c = x.shape[1:]
    tiled = h % TILE == 0 and w % TILE == 0 and h * w >= 64
    return kernel.shape[:2] == (3, 3) and tiled and min(c, kernel.shape[3]) >= 32 and x.dtype == jnp.float32


def conv(x: Array, kernel: Array) -> Array:
    """SAME convolution of `x` (b, h, w, c_in) with `kernel` (3, 3, c_in, c_out); h and w are multiples of 4."""
    b, h, w, _ = x.shape
    return _from_tiles(_products(_to_tiles(x), _kernel(kernel), 2, 1), b, h // TILE, w // TILE)


def conv_vjp(x: Array, kernel: Array, dy: Array) -> tuple[Array, Array]:
    """The gradients of `conv` with respect to `x` and `kernel`."""
    b, h, w, _ = x.shape
    tiles = _to_tiles_of_gradient(dy)
    dx = _add_tiles(_products(tiles, _kernel(kernel), 2, 2), b, h // TILE, w // TILE)
    # The tiles are transposed in a pass of their own: a product that has to do it takes up to twice the time.
    columns = lax.optimization_barrier(lax.optimization_barrier(_to_tiles(x)).swapaxes(1, 2))
    spectrum = _products(columns, tiles, 2, 1).reshape(6, 6, *kernel.shape[2:])
    rows = lax.optimization_barrier(jnp.stack(_combine(G.T, list(spectrum))))
    return dx, jnp.stack(_combine(G.T, [rows[:, j] for j in range(6)]), 1)


def _combine(matrix: np.ndarray, parts: Sequence[Array]) -> list[Array]:
    """matrix @ parts, written out, because a product with so small a matrix is slow as a product."""
    rows = []
    for coefficients in matrix:
        terms = [c.astype(p.dtype) * p for c, p in zip(coefficients, parts, strict=True) if c != 0]
        rows.append(sum(terms[1:], terms[0]))
    return rows


def _products(a: Array, b: Array, axis_a: int, axis_b: int) -> Array:
    # The barriers keep the transforms out of the products: fused into them, they would be computed many times over.
    a, b = lax.optimization_barrier((a, b))
    return lax.optimization_barrier(lax.dot_general(a, b, (((axis_a,), (axis_b,)), ((0,), (0,)))))


def _kernel(kernel: Array) -> Array:
    """G k G^T: (3, 3, c_in, c_out) -> (36, c_in, c_out)."""
    rows = lax.optimization_barrier(jnp.stack(_combine(G, list(kernel))))
    return jnp.stack(_combine(G, [rows[:, j] for j in range(3)]), 1).reshape(36, *kernel.shape[2:])


def _to_tiles(x: Array) -> Array:
    """B^T x_tile B for the overlapping 6 x 6 tiles of x: (b, h, w, c) -> (36, tiles, c)."""
    th, tw, c = x.shape[1] // TILE, x.shape[2] // TILE, x.shape[3]
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    rows = [lax.slice_in_dim(x, i, i + TILE * (th - 1) + 1, TILE, 1) for i in range(6)]
    x = lax.optimization_barrier(jnp.stack(_combine(B_T, rows)))
    columns = [lax.slice_in_dim(x, j, j + TILE * (tw - 1) + 1, TILE, 3) for j in range(6)]
    return jnp.stack(_combine(B_T, columns), 1).reshape(36, -1, c)


def _from_tiles(tiles: Array, b: int, th: int, tw: int) -> Array:
    """A^T m A for every tile: (36, tiles, c) -> (b, h, w, c)."""
    m = tiles.reshape(6, 6, b, th, tw, tiles.shape[2])
    columns = lax.optimization_barrier(jnp.stack(_combine(A_T, [m[:, j] for j in range(6)]), 4))
    return jnp.stack(_combine(A_T, list(columns)), 2).reshape(b, TILE * th, TILE * tw, tiles.shape[2])


def _to_tiles_of_gradient(dy: Array) -> Array:
    """A dy_tile A^T: (b, h, w, c) -> (36, tiles, c)."""
    b, h, w, c = dy.shape
    dy = dy.reshape(b, h // TILE, TILE, w // TILE, TILE, c)
    rows = lax.optimization_barrier(jnp.stack(_combine(A_T.T, [dy[:, :, i] for i in range(TILE)])))
    return jnp.stack(_combine(A_T.T, [rows[..., j, :] for j in range(TILE)]), 1).reshape(36, -1, c)


def _add_tiles(tiles: Array, b: int, th: int, tw: int) -> Array:
    """The sum of the overlapping tiles B m B^T: (36, tiles, c) -> (b, h, w, c), the transpose of `_to_tiles`."""
    c = tiles.shape[2]
    m = tiles.reshape(6, 6, b, th, tw, c)
    columns = _overlap(_combine(B_T.T, [m[:, j] for j in range(6)]), 3)
    columns = lax.optimization_barrier(jnp.stack(columns, 4))
    rows = _overlap(_combine(B_T.T, list(columns)), 1)
    return jnp.stack(rows, 2).reshape(b, TILE * th, TILE * tw, c)


def _overlap(parts: list[Array], axis: int) -> list[Array]:
    """The four lines of each tile, to which its neighbours along `axis` add their outer lines."""

    def shift(a: Array, by: int) -> Array:
        n = a.shape[axis]
        widths = [(0, 0)] * a.ndim
        widths[axis] = (max(by, 0), max(-by, 0))
        return jnp.pad(lax.slice_in_dim(a, max(-by, 0), n - max(by, 0), axis=axis), widths)

    first, *middle, last = parts
    return [middle[0] + shift(last, 1), *middle[1:3], middle[3] + shift(first, -1)]
