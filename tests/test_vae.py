"""The autoencoders: shapes, padding against a plain writing, tiles without seams, the published tiny weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.errors import ConfigError
from jaxdiff.nets import AutoencoderKL, AutoencoderTiny, vae
from jaxdiff.nets.ldm import AFTER, CENTRED, Resample
from jaxdiff.nets.vae import tiles

SMALL = {"channels": (8, 16), "num_blocks": 1, "groups": 4}


@pytest.fixture(scope="module")
def kl():
    """A small AutoencoderKL with weights that are nowhere 0, and its parameters."""
    net = AutoencoderKL(**SMALL, scale=0.5, shift=0.25)
    params = jax.jit(net.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return net, tree.unflatten([x + 0.1 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)])


def test_shapes_and_the_scale_of_latents(kl):
    net, params = kl
    x = jax.random.uniform(jax.random.key(2), (2, 12, 16, 3))
    latents = jax.jit(lambda p, x: net.apply(p, x, method="encode"))(params, x)
    assert latents.mean.shape == latents.log_variance.shape == (2, 6, 8, 4)
    assert jax.jit(lambda p, z: net.apply(p, z, method="decode"))(params, latents.mean).shape == x.shape
    np.testing.assert_allclose(net.normalize(jnp.full((1,), 2.25)), 1.0)
    np.testing.assert_allclose(net.unnormalize(net.normalize(latents.mean)), latents.mean, atol=1e-6)
    assert AutoencoderKL().factor == AutoencoderTiny().factor == 8


def test_half_precision_computes_in_it_and_answers_in_float32(kl):
    net, params = kl
    x = jax.random.uniform(jax.random.key(2), (1, 8, 8, 3))
    half = AutoencoderKL(**SMALL, dtype=jnp.bfloat16)
    with jax.numpy_dtype_promotion("standard"):  # JAX's own attention needs it in half precision
        a, b = (jax.jit(used.apply)(params, x) for used in (net, half))
    assert b.dtype == jnp.float32
    assert 0 < np.abs(a - b).max() < 0.1 * np.abs(a).max()


@pytest.mark.parametrize(("padding", "before"), [(AFTER, 0), (CENTRED, 1)])
@pytest.mark.parametrize("size", [6, 7])
def test_down_sampling_pads_as_published(padding, before, size):
    """Against the sum written out: output (i, j) is the window that begins at 2 i - before, 2 j - before."""
    x = np.random.default_rng(0).normal(size=(1, size, size, 2)).astype(np.float32)
    net = Resample(3, "down", padding)
    params = net.init(jax.random.key(0), jnp.asarray(x), None)
    kernel = np.asarray(params["params"]["conv"]["kernel"])
    y = np.asarray(net.apply(params, jnp.asarray(x), None))
    wide = np.pad(x, ((0, 0), (before, 1), (before, 1), (0, 0)))
    for i in range(y.shape[1]):
        for j in range(y.shape[2]):
            window = wide[0, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3]
            np.testing.assert_allclose(y[0, i, j], np.einsum("ijc,ijcd->d", window, kernel), atol=1e-5)
    assert y.shape[1] == (size + before - 2) // 2 + 1


def test_wrong_shapes_are_named(kl):
    net, params = kl
    with pytest.raises(ConfigError, match="multiples of 2"):
        net.apply(params, jnp.zeros((1, 7, 8, 3)), method="encode")
    with pytest.raises(ConfigError, match=r"\(b, h, w, 4\)"):
        net.apply(params, jnp.zeros((1, 4, 4, 3)), method="decode")
    with pytest.raises(ConfigError, match="multiples of groups=4"):
        AutoencoderKL(channels=(6,), groups=4)


def test_tiles_cover_all_and_overlap_enough():
    for size in range(8, 60):
        for overlap in (2, 5):
            begin = np.array(tiles.starts(size, 8, overlap))
            assert begin[0] == 0
            assert begin[-1] == size - 8
            assert (np.diff(begin) <= 8 - overlap).all()
            assert len(begin) == 1 or len(begin) - 1 < (size - overlap) / (8 - overlap)  # and no more than needed


@pytest.mark.parametrize("cells", [(1, 2), (2, 1)])
def test_a_network_that_looks_at_one_place_is_the_same_in_tiles(cells):
    enlarge = lambda x: jnp.tanh(jnp.repeat(jnp.repeat(x, 2, 1), 2, 2))  # noqa: E731
    reduce = lambda x: jnp.tanh(x[:, ::2, ::2])  # noqa: E731
    function = enlarge if cells == (1, 2) else reduce
    x = jax.random.normal(jax.random.key(0), (2, 22, 34, 3))
    made = jax.jit(lambda x: vae.tiled(function, x, tile=8, overlap=3, cells=cells))(x)
    np.testing.assert_allclose(made, function(x), atol=1e-6)


def test_a_convolution_is_the_same_in_tiles_where_the_margin_is_its_reach():
    kernel = jax.random.normal(jax.random.key(1), (5, 5, 3, 2))

    def blur(x):  # its reach is 2
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    x = jax.random.normal(jax.random.key(0), (1, 30, 21, 3))
    whole = blur(x)
    exact = vae.tiled(blur, x, tile=12, overlap=6, margin=2, cells=(1, 1))
    np.testing.assert_allclose(exact, whole, atol=1e-4)
    cut = vae.tiled(blur, x, tile=12, overlap=6, margin=0, cells=(1, 1))
    assert np.abs(cut - whole).max() > 0.1  # without the margin, what the padding at inner edges does is seen


def test_tiles_that_disagree_fade_into_one_another():
    """Every tile answers its own constant, the worst case: no two neighbouring pixels differ by a step of it."""
    x = jnp.arange(40.0).reshape(1, 1, 40, 1) * jnp.ones((1, 8, 1, 1))
    made = np.asarray(vae.tiled(lambda x: jnp.zeros_like(x) + x[:, :1, :1] // 16, x, tile=16, overlap=8, cells=(1, 1)))
    row = made[0, 0, :, 0]
    assert row[0] == 0
    assert row[-1] == 1  # 24 // 16
    assert np.abs(np.diff(row)).max() <= 1 / 8 + 1e-6
    np.testing.assert_allclose(made, np.broadcast_to(made[:, :1], made.shape), atol=1e-6)


def test_an_autoencoder_in_tiles_has_no_seam(kl):
    """What tiling changes (norms and attention see less) it changes smoothly: no larger steps at the cuts."""
    net, params = kl
    z = jax.random.normal(jax.random.key(3), (1, 24, 24, 4))
    decode = jax.jit(lambda z: net.apply(params, z, method="decode"))
    settings = {"tile": 12, "overlap": 8, "margin": 2, "cells": (1, 2)}
    change = np.asarray(jax.jit(lambda z: vae.tiled(decode, z, **settings))(z) - decode(z))[0]
    steps = np.abs(np.diff(change, axis=1)).mean((0, 2))
    begins = [2 * b for b in tiles.starts(24, 12, 8)]
    cuts = [b - 1 for b in begins[1:]] + [b + 23 for b in begins[:-1]]
    assert max(steps[cut] for cut in cuts) < 2 * np.median(steps)


def test_a_picture_of_one_tile_is_not_cut_and_settings_are_checked():
    x = jnp.ones((1, 8, 8, 1))
    np.testing.assert_array_equal(vae.tiled(lambda x: x * x.shape[1], x, tile=9, overlap=2, cells=(1, 1)), 8 * x)
    for wrong in ({"tile": 8, "overlap": 8}, {"tile": 8, "overlap": 0}, {"tile": 8, "overlap": 4, "margin": 2}):
        with pytest.raises(ConfigError, match="overlap < tile"):
            vae.tiled(lambda x: x, x, **wrong)
    with pytest.raises(ConfigError, match="multiples of 8"):
        vae.tiled(lambda x: x, jnp.ones((1, 12, 8, 1)), cells=(8, 1))
