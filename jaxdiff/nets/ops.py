"""The three array operations that decide the speed of a U-Net, as functions of arrays.

conv            y = x * kernel + bias                              NHWC, HWIO
group_norm      y = f((x - mean_g) / sqrt(var_g + eps) * scale + bias),  f = identity or SiLU
upsample_conv   y = conv(nearest2x(x), kernel) + bias
"""

import jax
import jax.numpy as jnp
from jax import lax

from jaxdiff.errors import ConfigError
from jaxdiff.types import Array


def _bias(y: Array, bias: Array | None) -> Array:
    return y if bias is None else y + bias.astype(y.dtype).reshape(1, 1, 1, -1)


def conv(x: Array, kernel: Array, bias: Array | None = None, *, stride: int = 1, padding="SAME") -> Array:
    """Two-dimensional convolution of `x` (b, h, w, c_in) with `kernel` (kh, kw, c_in, c_out); returns x.dtype.

    `padding` is "SAME", "VALID" or ((top, bottom), (left, right)). The kernel and the bias are cast to x.dtype.
    """
    y = lax.conv_general_dilated(
        x, kernel.astype(x.dtype), (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return _bias(y, bias)


def group_norm(x: Array, scale: Array, bias: Array, groups: int, *, silu: bool = False, eps: float = 1e-6) -> Array:
    """Group normalisation of `x` (b, ..., c) over the axes between and the c / groups channels of a group.

    `scale` and `bias` are (c,). `silu` applies x * sigmoid(x) afterwards. Statistics are at least float32; returns
    x.dtype. Raises ConfigError where `groups` does not divide c. Wu & He 2018, eq. 1 and 7.
    """
    channels = x.shape[-1]
    if channels % groups:
        raise ConfigError(f"groups must divide the {channels} channels, got {groups}. Use a divisor of {channels}.")
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    grouped = wide.reshape(x.shape[0], -1, groups, channels // groups)
    mean = grouped.mean((1, 3), keepdims=True)
    var = jnp.square(grouped - mean).mean((1, 3), keepdims=True)
    y = ((grouped - mean) * lax.rsqrt(var + eps)).reshape(x.shape)
    shape = (1,) * (x.ndim - 1) + (channels,)
    y = y * scale.astype(y.dtype).reshape(shape) + bias.astype(y.dtype).reshape(shape)
    return (jax.nn.silu(y) if silu else y).astype(x.dtype)


def upsample_conv(x: Array, kernel: Array, bias: Array | None = None) -> Array:
    """Nearest-neighbour up-sampling of `x` (b, h, w, c) by 2, then a 3 x 3 SAME convolution; returns x.dtype."""
    return conv(jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2), kernel, bias)
