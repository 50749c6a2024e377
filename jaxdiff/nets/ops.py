"""The three array operations that decide the speed of a U-Net, as functions of arrays.

    conv            y = x * kernel + bias                              NHWC, HWIO
    group_norm      y = f(u),  u = xhat scale + bias,  xhat = (x - mean_g) r_g,  r_g = 1 / sqrt(var_g + eps)
    upsample_conv   y = conv(nearest2x(x), kernel) + bias

f is the identity or SiLU. `group_norm` has its own derivative: with g = dy f'(u) and means over a group,

    dx = r_g (g scale - mean(g scale) - xhat mean(g scale xhat)),   dscale = sum g xhat,   dbias = sum g
"""

import jax
import jax.numpy as jnp
from jax import lax

from jaxdiff.errors import ConfigError
from jaxdiff.nets import winograd
from jaxdiff.types import Array


def conv(x: Array, kernel: Array, bias: Array | None = None, *, stride: int = 1, padding="SAME") -> Array:
    """Two-dimensional convolution of `x` (b, h, w, c_in) with `kernel` (kh, kw, c_in, c_out); returns x.dtype.

    `padding` is "SAME", "VALID" or ((top, bottom), (left, right)). Kernel and bias are cast to x.dtype. On a CPU
    the float32 3 x 3 convolutions of `winograd.fits` are done by `winograd.conv` (error 3e-6 of the largest output);
    these have no forward mode (jvp), being a custom_vjp.
    """
    kernel = kernel.astype(x.dtype)
    if stride == 1 and padding == "SAME" and jax.default_backend() == "cpu" and winograd.fits(x, kernel):
        y = _conv_3x3(x, kernel)
    else:
        y = _direct(x, kernel, stride, padding)
    return y if bias is None else y + bias.astype(y.dtype).reshape(1, 1, 1, -1)


def _direct(x: Array, kernel: Array, stride: int = 1, padding="SAME") -> Array:
    return lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _direct_vjp(x: Array, kernel: Array, dy: Array) -> tuple[Array, Array]:
    return jax.vjp(_direct, x, kernel)[1](dy)


# Chosen again when lowered, so that what is exported from a CPU for other platforms has their own convolution.
@jax.custom_vjp
def _conv_3x3(x: Array, kernel: Array) -> Array:
    return lax.platform_dependent(x, kernel, cpu=winograd.conv, default=_direct)


def _conv_3x3_backward(saved, dy):
    return lax.platform_dependent(*saved, dy, cpu=winograd.conv_vjp, default=_direct_vjp)


_conv_3x3.defvjp(lambda x, kernel: (_conv_3x3(x, kernel), (x, kernel)), _conv_3x3_backward)


def upsample_conv(x: Array, kernel: Array, bias: Array | None = None) -> Array:
    """Nearest-neighbour up-sampling of `x` (b, h, w, c) by 2, then a 3 x 3 SAME convolution; returns x.dtype."""
    b, h, w, c = x.shape
    doubled = jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)
    return conv(doubled, kernel, bias)


def group_norm(x: Array, scale: Array, bias: Array, groups: int, *, silu: bool = False, eps: float = 1e-6) -> Array:
    """Group normalisation of `x` (b, ..., c) over the axes between and the c / groups channels of a group.

    `scale` and `bias` are (c,), or (b, c) to modulate each example. `silu` applies u sigmoid(u). Statistics are at
    least float32; returns x.dtype. Raises ConfigError where `groups` does not divide c. Reverse mode (grad, vjp)
    works, also twice; forward mode (jvp, jacfwd, hessian) does not: the derivative is a custom_vjp.
    Wu & He 2018, eq. 1, 2 and 7.
    """
    channels = x.shape[-1]
    if groups < 1 or channels % groups:
        raise ConfigError(f"groups must divide the {channels} channels, got {groups}. Use a divisor of {channels}.")
    wide = x.dtype if jnp.finfo(x.dtype).bits >= 32 else jnp.float32
    shape = (x.shape[0], 1, channels)
    scale = jnp.broadcast_to(scale.astype(wide).reshape(-1, 1, channels), shape)
    bias = jnp.broadcast_to(bias.astype(wide).reshape(-1, 1, channels), shape)
    return _norm(x.reshape(x.shape[0], -1, channels), scale, bias, groups, silu, eps).reshape(x.shape)


def _over_groups(per_channel: Array, groups: int) -> Array:
    """Mean over the channels of each group, repeated for each of them: (b, 1, c) -> (b, 1, c)."""
    b, _, c = per_channel.shape
    mean = per_channel.reshape(b, groups, -1).mean(-1, keepdims=True)
    return jnp.broadcast_to(mean, (b, groups, c // groups)).reshape(b, 1, c)


def _statistics(x: Array, groups: int, eps: float) -> tuple[Array, Array]:
    """Mean and 1 / sqrt(var + eps) of each group, as (b, 1, c)."""
    # One pass, whole vectors of channels; deviations from the first position, so that a large mean does not cancel.
    origin = x[:, :1]
    deviation = x - origin
    shift = deviation.mean(1, keepdims=True)
    variance = jnp.square(deviation).mean(1, keepdims=True) - jnp.square(shift)
    channel_mean = origin + shift
    mean = _over_groups(channel_mean, groups)
    between = jnp.square(channel_mean - mean)
    return mean, lax.rsqrt(jnp.maximum(_over_groups(variance + between, groups), 0) + eps)


def _norm_value(x: Array, scale: Array, bias: Array, groups: int, silu: bool, eps: float) -> Array:
    return _norm_forward(x, scale, bias, groups, silu, eps)[0]


def _norm_forward(x, scale, bias, groups, silu, eps):
    wide = x.astype(scale.dtype)
    mean, inverse = _statistics(wide, groups, eps)
    u = (wide - mean) * (inverse * scale) + bias
    y = u * jax.nn.sigmoid(u) if silu else u
    return y.astype(x.dtype), (x, scale, bias, mean, inverse)


def _norm_backward(groups, silu, eps, saved, dy):
    x, scale, bias, mean, inverse = saved
    normed = (x.astype(scale.dtype) - mean) * inverse
    g = dy.astype(scale.dtype)
    if silu:
        u = normed * scale + bias
        s = jax.nn.sigmoid(u)
        g = g * (s * (1 + u * (1 - s)))
    sum_g, sum_gx = g.sum(1, keepdims=True), (g * normed).sum(1, keepdims=True)
    mean_g, mean_gx = (_over_groups(scale * total, groups) / x.shape[1] for total in (sum_g, sum_gx))
    dx = inverse * (g * scale - mean_g - normed * mean_gx)
    return dx.astype(x.dtype), sum_gx, sum_g


_norm = jax.custom_vjp(_norm_value, nondiff_argnums=(3, 4, 5))
_norm.defvjp(_norm_forward, _norm_backward)
