"""conv, group_norm and upsample_conv against their definitions written out in numpy, forward and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.errors import ConfigError
from jaxdiff.nets import ops, winograd

TOLERANCE = {"float64": 1e-10, "float32": 1e-5, "bfloat16": 3e-2}


def naive_conv(x, kernel, bias, stride=1):
    """The sum over taps, with TensorFlow's SAME padding."""
    kh, kw = kernel.shape[:2]
    pads = []
    for size, k in ((x.shape[1], kh), (x.shape[2], kw)):
        total = max((-(-size // stride) - 1) * stride + k - size, 0)
        pads.append((total // 2, total - total // 2))
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    rows, columns = (x.shape[1] - kh) // stride + 1, (x.shape[2] - kw) // stride + 1
    y = jnp.zeros((x.shape[0], rows, columns, kernel.shape[3]), x.dtype)
    for i in range(kh):
        for j in range(kw):
            tap = x[:, i : i + rows * stride : stride, j : j + columns * stride : stride][:, :rows, :columns]
            y = y + jnp.einsum("bhwc,cd->bhwd", tap, kernel[i, j], precision="highest")
    return y + bias.reshape(1, 1, 1, -1)


def naive_group_norm(x, scale, bias, groups, silu, eps=1e-6):
    b, c = x.shape[0], x.shape[-1]
    z = x.reshape(b, -1, groups, c // groups)
    z = (z - z.mean((1, 3), keepdims=True)) / jnp.sqrt(z.var((1, 3), keepdims=True) + eps)
    shape = (-1,) + (1,) * (x.ndim - 2) + (c,)
    u = z.reshape(x.shape) * scale.reshape(shape) + bias.reshape(shape)
    return u / (1 + jnp.exp(-u)) if silu else u


def naive_upsample_conv(x, kernel, bias):
    return naive_conv(jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2), kernel, bias)


def assert_same(fast, naive, args, tolerance):
    """Output and all gradients agree, relative to the largest entry of each."""

    def both(f):
        def run(args, dy):
            y, pull = jax.vjp(f, *args)
            return y, *pull(dy.astype(y.dtype))

        return run

    shape = jax.eval_shape(naive, *args).shape
    dy = jnp.asarray(np.random.default_rng(1).normal(size=shape), args[0].dtype)
    exact = jax.tree.map(lambda a: a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a, args)
    for got, want in zip(jax.jit(both(fast))(args, dy), jax.jit(both(naive))(exact, dy), strict=True):
        got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
        assert np.abs(got - want).max() <= tolerance * max(np.abs(want).max(), 1e-3)


def draw(dtype, *shapes):
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize(
    ("size", "kernel", "stride"), [((8, 12), 3, 1), ((5, 7), 3, 1), ((7, 6), 3, 2), ((8, 8), 3, 2), ((5, 4), 1, 1)]
)
def test_conv_is_the_sum_over_taps(dtype, size, kernel, stride):
    with jax.enable_x64(dtype == "float64"):
        args = draw(dtype, (2, *size, 5), (kernel, kernel, 5, 4), (4,))
        assert_same(
            lambda x, k, b: ops.conv(x, k, b, stride=stride),
            lambda x, k, b: naive_conv(x, k, b, stride),
            args,
            TOLERANCE[dtype],
        )


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("size", [(5, 7), (1,), (2, 3, 2)])
def test_group_norm_is_its_definition(dtype, silu, size):
    with jax.enable_x64(dtype == "float64"):
        args = draw(dtype, (3, *size, 12), (12,), (12,))
        assert_same(
            lambda x, s, b: ops.group_norm(x, s, b, 4, silu=silu),
            lambda x, s, b: naive_group_norm(x, s, b, 4, silu),
            args,
            TOLERANCE[dtype],
        )


def test_group_norm_modulates_each_example():
    args = draw("float32", (3, 4, 5, 12), (3, 12), (3, 12))
    assert_same(
        lambda x, s, b: ops.group_norm(x, s, b, 4, silu=True),
        lambda x, s, b: naive_group_norm(x, s, b, 4, True),
        args,
        TOLERANCE["float32"],
    )


def test_group_norm_keeps_its_precision_far_from_zero():
    (x,) = draw("float32", (2, 8, 8, 8))
    with jax.enable_x64(True):
        wide = jnp.asarray(x, jnp.float64) + 1000.0
        far = wide.astype(jnp.float32)
        want = np.asarray(naive_group_norm(far.astype(jnp.float64), jnp.ones(8), jnp.zeros(8), 2, False))
    got = ops.group_norm(far, jnp.ones(8, jnp.float32), jnp.zeros(8, jnp.float32), 2)
    np.testing.assert_allclose(np.asarray(got), want, atol=1e-3)


def test_group_norm_of_a_constant_is_its_bias():
    bias = jnp.arange(4, dtype=jnp.float32)
    y = ops.group_norm(jnp.full((2, 3, 3, 4), 7.5), jnp.ones(4), bias, 2)
    np.testing.assert_allclose(np.asarray(y), np.broadcast_to(np.asarray(bias), y.shape), atol=1e-6)


def test_group_norm_does_not_mix_examples():
    x, scale, bias = draw("float32", (3, 4, 4, 8), (8,), (8,))
    norm = jax.jit(lambda x: ops.group_norm(x, scale, bias, 4, silu=True))
    np.testing.assert_array_equal(norm(x)[0], norm(x.at[1:].multiply(3.0))[0])


def test_group_norm_refuses_groups_that_do_not_divide():
    with pytest.raises(ConfigError, match="groups must divide the 6 channels, got 4"):
        ops.group_norm(jnp.ones((1, 2, 2, 6)), jnp.ones(6), jnp.ones(6), 4)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("size", [(4, 4), (3, 5)])
def test_upsample_conv_is_repeat_then_conv(dtype, size):
    with jax.enable_x64(dtype == "float64"):
        args = draw(dtype, (2, *size, 5), (3, 3, 5, 4), (4,))
        assert_same(ops.upsample_conv, naive_upsample_conv, args, TOLERANCE[dtype])


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-10), ("float32", 1e-5)])
@pytest.mark.parametrize(("size", "channels"), [((8, 8), (32, 48)), ((12, 8), (40, 32))])
def test_winograd_is_the_sum_over_taps(dtype, tolerance, size, channels):
    def fast(x, kernel):
        y, pull = winograd.conv(x, kernel), lambda dy: winograd.conv_vjp(x, kernel, dy)
        return y, *pull(y)

    def naive(x, kernel):
        y, pull = jax.vjp(lambda x, k: naive_conv(x, k, jnp.zeros(channels[1], x.dtype)), x, kernel)
        return y, *pull(y)

    with jax.enable_x64(dtype == "float64"):
        args = draw(dtype, (2, *size, channels[0]), (3, 3, *channels))
        for got, want in zip(jax.jit(fast)(*args), jax.jit(naive)(*args), strict=True):
            assert got.dtype == args[0].dtype
            assert np.abs(got - want).max() <= tolerance * np.abs(want).max()


def test_conv_takes_winograd_on_a_cpu_and_keeps_its_derivative():
    args = draw("float32", (2, 8, 8, 32), (3, 3, 32, 32), (32,))
    assert winograd.fits(*args[:2])
    assert_same(ops.conv, naive_conv, args, 1e-5)
    if jax.default_backend() == "cpu":
        trace = jax.jit(jax.grad(lambda x, k: ops.conv(x, k).sum(), (0, 1))).trace(*args[:2])
        assert "stablehlo.convolution" not in trace.lower().as_text()
        assert "stablehlo.convolution" in trace.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("x", "kernel", "dtype"),
    [
        ((2, 8, 8, 32), (3, 3, 32, 32), "bfloat16"),
        ((2, 8, 8, 32), (1, 1, 32, 32), "float32"),
        ((2, 8, 10, 32), (3, 3, 32, 32), "float32"),
        ((2, 4, 4, 32), (3, 3, 32, 32), "float32"),
        ((2, 8, 8, 3), (3, 3, 3, 32), "float32"),
    ],
)
def test_winograd_leaves_other_convolutions_alone(x, kernel, dtype):
    assert not winograd.fits(*draw(dtype, x, kernel))


def test_group_norm_has_a_second_derivative_by_reverse_mode():
    x, scale, bias = draw("float32", (2, 3, 3, 8), (8,), (8,))

    def slope(norm):
        value = jax.grad(lambda x: jnp.square(norm(x)).sum())
        return jax.jit(jax.grad(lambda x: jnp.square(value(x)).sum()))(x)

    got = slope(lambda x: ops.group_norm(x, scale, bias, 2, silu=True))
    want = slope(lambda x: naive_group_norm(x, scale, bias, 2, True))
    np.testing.assert_allclose(got, want, atol=1e-4 * float(np.abs(want).max()))
