"""The Inception-v3 of 2015 whose 2048 features define the published FID, with the resize of the TensorFlow of its time.

    pixels 0 .. 255 -> bilinear resize to 299 x 299 -> (x - 128) / 128 -> network -> mean over the last 8 x 8 map

    resize   output i lies at i size / 299 (no half pixels, corners not aligned, no antialiasing):
             lower = floor, x = lower + (upper - lower) fraction, first along the width, then along the height

The network is not torchvision's: average pools leave the padding out of their count, the last block pools by maximum,
and batch norms have no scale (eps 1e-3); they are folded into the convolutions when the weights are read.

Weights: a safetensors file of NAME.weight (OIHW), NAME.beta, NAME.mean, NAME.var; Szegedy et al. 2015, Apache-2.0.
"""

import os
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxdiff.errors import DataError
from jaxdiff.types import Array, PyTree

SIZE = 299
FEATURES = 2048
EPS = 1e-3
CONTRACT = {
    "features": "Inception-v3 of 2015-12-05, pool3, 2048",
    "input": "uint8 RGB",
    "resize": "bilinear to 299 x 299 as TensorFlow 1, in float32, not rounded",
    "range": "(x - 128) / 128",
}
"""What a statistic of these features is of; see `metrics.stats`."""


Layers: TypeAlias = tuple[tuple[int, tuple[int, int], int], ...]


def resize(x: Array, size: int = SIZE) -> Array:
    """Pixels (b, h, w, c) to (b, size, size, c) as `tf.compat.v1.image.resize_bilinear` does by default; float32."""
    x = x.astype(jnp.float32)
    for axis in (2, 1):
        count = x.shape[axis]
        at = np.arange(size, dtype=np.float32) * (np.float32(count) / np.float32(size))
        lower = at.astype(np.int32)
        fraction = jnp.asarray((at - lower).reshape([-1 if i == axis else 1 for i in range(4)]))
        low, high = (jnp.take(x, i, axis=axis) for i in (lower, np.minimum(lower + 1, count - 1)))
        x = low + (high - low) * fraction
    return x


class Tower(nn.Module):
    """Convolutions conv, conv_1, ... in a row, each (features, kernel, stride); one alone pools its input first."""

    layers: Layers

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = average(x) if len(self.layers) == 1 else x
        for i, (features, kernel, stride) in enumerate(self.layers):
            x = conv(x, f"conv_{i}" if i else "conv", features, kernel, stride)
        return x


def conv(x: Array, name: str, features: int, kernel: tuple[int, int], stride: int = 1, padding: str = "") -> Array:
    """Convolution, folded batch norm and ReLU; a stride of 2 comes without padding. Inside a compact module only."""
    padding = padding or ("SAME" if stride == 1 else "VALID")
    return nn.relu(nn.Conv(features, kernel, stride, padding, name=name)(x))


def average(x: Array) -> Array:
    """The mean over 3 x 3, padding not counted."""
    return nn.avg_pool(x, (3, 3), padding="SAME", count_include_pad=False)


def halve(x: Array) -> Array:
    """The maximum over 3 x 3, every other one."""
    return nn.max_pool(x, (3, 3), (2, 2))


class Mixed(nn.Module):
    """One block: a convolution where there is one, the towers, and a pool of the input where it halves; joined."""

    features: int
    stride: int
    towers: tuple[Layers, ...]

    @nn.compact
    def __call__(self, x: Array) -> Array:
        parts = []
        if self.features:
            parts.append(conv(x, "conv", self.features, (1, 1) if self.stride == 1 else (3, 3), self.stride))
        for i, tower in enumerate(self.towers):
            parts.append(Tower(tower, name=f"tower_{i}" if i else "tower")(x))
        return jnp.concatenate([*parts, halve(x)] if self.stride == 2 else parts, axis=-1)


class Fork(nn.Module):
    """A block of the last map, whose towers end in two convolutions side by side."""

    pool: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        parts = [conv(x, "conv", 320, (1, 1))]
        single = conv(x, "tower_conv", 384, (1, 1))
        double = conv(conv(x, "tower_1_conv", 448, (1, 1)), "tower_1_conv_1", 384, (3, 3))
        for name, y in (("tower", single), ("tower_1", double)):
            parts += [conv(y, f"{name}_mixed_conv", 384, (1, 3)), conv(y, f"{name}_mixed_conv_1", 384, (3, 1))]
        return jnp.concatenate([*parts, conv(self.pool(x), "tower_2_conv", 192, (1, 1))], axis=-1)


def _map_35(pooled: int) -> tuple[int, int, tuple[Layers, ...]]:
    double, triple = ((48, (1, 1), 1), (64, (5, 5), 1)), ((64, (1, 1), 1), (96, (3, 3), 1), (96, (3, 3), 1))
    return 64, 1, (double, triple, ((pooled, (1, 1), 1),))


def _map_17(c: int) -> tuple[int, int, tuple[Layers, ...]]:
    one, wide, tall = (1, 1), (1, 7), (7, 1)
    short = ((c, one, 1), (c, wide, 1), (192, tall, 1))
    long = ((c, one, 1), (c, tall, 1), (c, wide, 1), (c, tall, 1), (192, wide, 1))
    return 192, 1, (short, long, ((192, one, 1),))


_TO_17 = 384, 2, (((64, (1, 1), 1), (96, (3, 3), 1), (96, (3, 3), 2)),)
_TO_8 = 0, 2, (
    ((192, (1, 1), 1), (320, (3, 3), 2)),
    ((192, (1, 1), 1), (192, (1, 7), 1), (192, (7, 1), 1), (192, (3, 3), 2)),
)  # fmt: skip
BLOCKS = (*map(_map_35, (32, 64, 64)), _TO_17, *map(_map_17, (128, 160, 160, 192)), _TO_8)
"""mixed, mixed_1, ..., mixed_8: the fields of each."""


class Inception(nn.Module):
    """Pictures in [-1, 1], float32 (b, h, w, 3) of at least 75 x 75 -> features (b, 2048). See `features`."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = conv(x, "conv", 32, (3, 3), 2)
        x = conv(x, "conv_1", 32, (3, 3), padding="VALID")
        x = halve(conv(x, "conv_2", 64, (3, 3)))
        x = halve(conv(conv(x, "conv_3", 80, (1, 1)), "conv_4", 192, (3, 3), padding="VALID"))
        for i, fields in enumerate(BLOCKS):
            x = Mixed(*fields, name=f"mixed_{i}" if i else "mixed")(x)
        x = Fork(average, name="mixed_9")(x)
        x = Fork(lambda y: nn.max_pool(y, (3, 3), padding="SAME"), name="mixed_10")(x)
        return x.mean(axis=(1, 2))


def features(params: PyTree, images: Array) -> Array:
    """The features (b, 2048) of uint8 pictures (b, h, w, 3) by their published preprocessing; jit it.

    Raises DataError for another type: turn pictures in [-1, 1] into uint8 first, `metrics.checks.pixels`.
    """
    if images.dtype != jnp.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise DataError(f"Inception takes uint8 (b, h, w, 3), got {images.dtype} {images.shape}. See checks.pixels.")
    return jnp.asarray(Inception().apply(params, (resize(images) - 128) / 128))


def load(path: str | os.PathLike) -> PyTree:
    """The parameters in a safetensors file, float32 (whatever they are stored in), batch norms folded in.

    Raises DataError for a file that is missing, damaged, or not of this network.
    """
    from safetensors import SafetensorError, safe_open

    shapes = jax.eval_shape(Inception().init, jax.random.key(0), jnp.zeros((1, SIZE, SIZE, 3)))
    try:
        with safe_open(path, "np") as file:
            keys = set(file.keys())
            return jax.tree_util.tree_map_with_path(
                lambda where, leaf: _read(file, keys, [p.key for p in where[1:]], leaf.shape), shapes
            )
    except (OSError, SafetensorError) as error:
        raise DataError(f"cannot read the Inception weights in {path}: {error}.") from error


def _read(file: Any, keys: set[str], where: list[str], shape: tuple[int, ...]) -> np.ndarray:
    """One leaf: kernel = weight / sqrt(var + eps), bias = beta - mean / sqrt(var + eps)."""
    *names, leaf = where
    prefix = ".".join(names)
    needed = {f"{prefix}.{part}" for part in ("weight", "beta", "mean", "var")}
    if not needed <= keys:
        raise DataError(f"these are not the Inception weights of 2015: no {min(needed - keys)} in the file.")
    scale = 1 / np.sqrt(file.get_tensor(f"{prefix}.var").astype(np.float64) + EPS)
    if leaf == "kernel":
        value = file.get_tensor(f"{prefix}.weight").astype(np.float64).transpose(2, 3, 1, 0) * scale
    else:
        value = file.get_tensor(f"{prefix}.beta") - file.get_tensor(f"{prefix}.mean") * scale
    if value.shape != shape:
        raise DataError(f"{prefix} of these Inception weights is {value.shape}, and must be {shape}.")
    return value.astype(np.float32)
