"""The Inception of the FID and LPIPS, without PyTorch: TensorFlow's resize written out, and what the loaders refuse.

That the features are those of the published network: tests/test_witness_metrics.py.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxdiff.errors import DataError
from jaxdiff.metrics import inception, lpips

RNG = np.random.default_rng(0)


def tensorflow_resize(image, size):
    """resize_bilinear_op.cc of TensorFlow 1 (LegacyScaler), value by value in float32."""
    f = np.float32
    height, width, channels = image.shape
    out = np.empty((size, size, channels), f)

    def weights(n):
        at = [f(i) * (f(n) / f(size)) for i in range(size)]
        return [(int(u), min(int(u) + 1, n - 1), f(u - f(int(u)))) for u in at]

    for i, (top, bottom, dy) in enumerate(weights(height)):
        for j, (left, right, dx) in enumerate(weights(width)):
            for c in range(channels):
                a, b = f(image[top, left, c]), f(image[top, right, c])
                d, e = f(image[bottom, left, c]), f(image[bottom, right, c])
                upper, lower = a + (b - a) * dx, d + (e - d) * dx
                out[i, j, c] = upper + (lower - upper) * dy
    return out


@pytest.mark.parametrize(("shape", "size"), [((8, 6, 2), 29), ((13, 31, 1), 17)])
def test_resize_is_tensorflows_bit_for_bit(shape, size):
    image = RNG.integers(0, 256, shape, dtype=np.uint8)
    np.testing.assert_array_equal(inception.resize(jnp.asarray(image)[None], size)[0], tensorflow_resize(image, size))


def test_resize_keeps_a_picture_of_the_right_size_and_the_first_corner():
    image = RNG.integers(0, 256, (1, 9, 9, 3), dtype=np.uint8)
    np.testing.assert_array_equal(inception.resize(jnp.asarray(image), 9), image)
    np.testing.assert_array_equal(inception.resize(jnp.asarray(image), 27)[:, ::3, ::3], image)


def test_the_network_has_the_published_size():
    shapes = jax.eval_shape(inception.Inception().init, jax.random.key(0), jnp.zeros((1, 299, 299, 3)))
    counts = {leaf.ndim: 0 for leaf in jax.tree.leaves(shapes)}
    for leaf in jax.tree.leaves(shapes):
        counts[leaf.ndim] += leaf.size
    assert len(jax.tree.leaves(shapes)) == 2 * 94
    assert counts[4] == 21_751_136  # summed over the published file
    out = jax.eval_shape(inception.features, shapes, jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.uint8))
    assert out.shape == (2, 2048)


@pytest.mark.parametrize("images", [np.zeros((1, 8, 8, 3), np.float32), np.zeros((1, 8, 8, 1), np.uint8)])
def test_inception_takes_uint8_rgb(images):
    with pytest.raises(DataError, match="uint8"):
        inception.features({}, jnp.asarray(images))


@pytest.mark.parametrize("load", [inception.load, lpips.load])
def test_weights_of_another_kind(load, tmp_path):
    with pytest.raises(DataError, match="cannot read"):
        load(tmp_path / "none.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"PK\x03\x04 not safetensors")
    with pytest.raises(DataError, match="cannot read"):
        load(tmp_path / "bad.safetensors")
    save_file({"weight": np.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(DataError, match="not"):
        load(tmp_path / "other.safetensors")


def test_weights_of_another_shape(tmp_path):
    fields = {"weight": np.zeros((8, 3, 3, 3)), "beta": np.zeros(8), "mean": np.zeros(8), "var": np.ones(8)}
    save_file({f"conv.{name}": value for name, value in fields.items()}, tmp_path / "a.safetensors")
    with pytest.raises(DataError, match="must be"):
        inception.load(tmp_path / "a.safetensors")
    heads = {name: np.zeros(3) for i in range(5) for name in lpips._names(i).values()}
    save_file(heads, tmp_path / "b.safetensors")
    with pytest.raises(DataError, match="wanted"):
        lpips.load(tmp_path / "b.safetensors")


@pytest.fixture(scope="module")
def heads():
    """LPIPS with random weights of the right shapes."""
    params, channels = [], 3
    for features, size, _, _ in lpips.LAYERS:
        kernel = RNG.normal(size=(size, size, channels, features)).astype(np.float32) / size / np.sqrt(channels)
        head = RNG.uniform(size=(1, 1, features, 1)).astype(np.float32)
        params.append({"kernel": kernel, "bias": np.zeros(features, np.float32), "head": head})
        channels = features
    return params


def test_lpips_is_zero_for_equals_symmetric_and_by_row(heads):
    x, y = RNG.uniform(-1, 1, (2, 3, 32, 32, 3)).astype(np.float32)
    measure = jax.jit(lpips.distance)
    there, back = np.asarray(measure(heads, x, y)), np.asarray(measure(heads, y, x))
    assert (there > 0.01).all()
    np.testing.assert_allclose(there, back, rtol=1e-5)
    np.testing.assert_allclose(measure(heads, x, np.stack([x[0], y[1], x[2]])), [0, there[1], 0], rtol=1e-4)


def test_lpips_refuses_what_it_cannot_measure(heads):
    x = jnp.zeros((1, 32, 32, 3))
    for other in (x[:, :, :30], x[..., :1], x[:0]):
        with pytest.raises(DataError, match="LPIPS takes pairs"):
            lpips.distance(heads, x, other)
    with pytest.raises(DataError, match="at least 31"):
        lpips.distance(heads, x[:, :30], x[:, :30])
    with pytest.raises(DataError, match="uint8"):
        lpips.distance(heads, x.astype(jnp.uint8), x.astype(jnp.uint8))


def test_the_weights_at_hand_are_read():
    """Where the shared folder of weights lies beside the checkout."""
    folder = Path(__file__).parents[2] / "shared" / "data" / "weights"
    if not folder.is_dir():
        pytest.skip("needs the folder shared/data/weights beside the checkout")
    params = lpips.load(folder / "lpips_alex.fp16.safetensors")
    assert all((layer["head"] >= 0).all() for layer in params)  # so LPIPS is never negative
    leaves = jax.tree.leaves(inception.load(folder / "inception_v3_2015_fid.fp16.safetensors"))
    assert {leaf.dtype for leaf in leaves} == {np.dtype(np.float32)}
