"""The layers of the networks against formulas written out in NumPy, and the initialisers against their moments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.errors import ConfigError
from jaxdiff.nets import conditioning, init, layers


def normalise(x, axes, eps=1e-6):
    return (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + eps)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def numbers(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def random(module, *args):
    """Parameters of a module, away from zero, as a dict of NumPy arrays."""
    tree = jax.eval_shape(lambda key: module.init(key, *args), jax.random.key(0))
    draw = np.random.default_rng(3)
    return jax.tree.map(lambda leaf: draw.standard_normal(leaf.shape).astype(np.float32), tree)


def test_sinusoid_is_the_table_of_the_papers():
    time = np.asarray([0.0, 1.0, 500.0])
    for endpoint, last in ((True, 1e-4), (False, 1e4 ** -(7 / 8))):
        table = jax.jit(lambda t, e=endpoint: conditioning.sinusoid(t, 16, endpoint=e))(jnp.asarray(time, jnp.float32))
        w = 1e4 ** -(np.arange(8) / (7 if endpoint else 8))
        assert w[-1] == pytest.approx(last)
        wanted = np.concatenate([np.sin(time[:, None] * w), np.cos(time[:, None] * w)], -1)
        np.testing.assert_allclose(table, wanted, atol=3e-5)


@pytest.mark.parametrize("features", [5, 2])
def test_sinusoid_refuses_odd_and_tiny_widths(features):
    with pytest.raises(ConfigError, match="must be even and >= 4"):
        conditioning.sinusoid(jnp.zeros((1,)), features)


@pytest.mark.parametrize("early", [True, False])
def test_embedding_is_its_formula(early):
    net = conditioning.Embedding(6, 8, time_scale=10.0, num_classes=3, vector_dim=2, early=early)
    time, labels, vector = jnp.asarray([0.1, 0.7]), jnp.asarray([2, -1]), jnp.asarray(numbers(0, 2, 2))
    params = random(net, time, labels, vector)
    p = params["params"]
    s = np.asarray(conditioning.sinusoid(time * 10.0, 8))
    extra = np.stack([p["classes"][2], np.zeros_like(p["classes"][2])]) + np.asarray(vector) @ p["vector"]["kernel"]
    h = (s + extra if early else s) @ p["hidden"]["kernel"] + p["hidden"]["bias"]
    h = (h * sigmoid(h)) @ p["out"]["kernel"] + p["out"]["bias"]
    h = h if early else h + extra
    np.testing.assert_allclose(jax.jit(net.apply)(params, time, labels, vector), h * sigmoid(h), rtol=1e-4, atol=1e-5)


def test_layer_norm_is_its_formula_with_float32_statistics():
    x = numbers(1, 2, 3, 8) + 100
    params = random(conditioning.LayerNorm(), jnp.asarray(x))
    p = params["params"]
    wanted = normalise(x.astype(np.float64), -1) * p["scale"] + p["bias"]
    np.testing.assert_allclose(conditioning.LayerNorm().apply(params, jnp.asarray(x)), wanted, rtol=1e-3, atol=1e-3)
    half = jnp.asarray(x, jnp.bfloat16)
    y = conditioning.LayerNorm(affine=False).apply({}, half)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(y, float), normalise(np.asarray(half, np.float64), -1), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("cross", [False, True])
def test_attention_is_its_formula(cross):
    net = layers.MultiHead(heads=2)
    x, context = numbers(0, 2, 5, 8), numbers(1, 2, 3, 6)
    mask = np.asarray([[True, True, False], [True, False, False]])
    args = (jnp.asarray(x), jnp.asarray(context), jnp.asarray(mask)) if cross else (jnp.asarray(x),)
    params = random(net, *args)
    p = params["params"]
    if cross:
        q = x @ p["query"]["kernel"] + p["query"]["bias"]
        k, v = np.split(context @ p["key_value"]["kernel"] + p["key_value"]["bias"], 2, -1)
    else:
        q, k, v = np.split(x @ p["qkv"]["kernel"] + p["qkv"]["bias"], 3, -1)
    q, k, v = (a.reshape(2, -1, 2, 4) for a in (q, k, v))
    scores = np.einsum("bqhd,bkhd->bhqk", q, k) / 2.0
    if cross:
        scores = np.where(mask[:, None, None], scores, -np.inf)
    y = np.einsum("bhqk,bkhd->bqhd", softmax(scores), v).reshape(2, 5, 8)
    wanted = y @ p["out"]["kernel"] + p["out"]["bias"]
    np.testing.assert_allclose(jax.jit(net.apply)(params, *args), wanted, rtol=1e-3, atol=1e-3)


def test_the_norm_before_and_after_a_scale_shift_is_its_formula():
    net = layers.GroupNorm(groups=2, silu=True)
    x, a, b = numbers(0, 3, 4, 4, 6), numbers(1, 3, 6), numbers(2, 3, 6)
    params = random(net, jnp.asarray(x))
    p = params["params"]
    h = normalise(x.reshape(3, 16, 2, 3), (1, 3)).reshape(x.shape) * p["scale"] + p["bias"]
    h = h * (1 + a[:, None, None]) + b[:, None, None]
    y = jax.jit(net.apply)(params, jnp.asarray(x), (jnp.asarray(a), jnp.asarray(b)))
    np.testing.assert_allclose(y, h * sigmoid(h), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("resample", ["none", "down", "up"])
def test_a_block_with_zero_kernels_is_its_skip_path(resample):
    x = jnp.asarray(numbers(0, 1, 4, 4, 8))
    net = layers.Block(8, groups=4, resample=resample, skip_scale=0.5, attention=True)
    args = (x, jnp.ones((1, 3)), None, True)
    params = jax.tree.map(jnp.zeros_like, random(net, *args))
    wanted = {
        "none": np.asarray(x),
        "down": np.asarray(x).reshape(1, 2, 2, 2, 2, 8).mean((2, 4)),
        "up": np.asarray(x).repeat(2, 1).repeat(2, 2),
    }[resample]
    y = jax.jit(net.apply, static_argnums=4)(params, *args)
    np.testing.assert_allclose(y, wanted * 0.25, rtol=1e-6)  # the residual sum and the attention sum, each halved


def test_space_to_depth_has_an_inverse():
    x = jnp.asarray(numbers(0, 2, 6, 4, 3))
    y = layers.space_to_depth(x, 2)
    np.testing.assert_array_equal(y[1, 2, 0], np.asarray(x)[1, 4:6, 0:2].reshape(-1))
    np.testing.assert_array_equal(layers.depth_to_space(y, 2), x)
    with pytest.raises(ConfigError, match="multiples of 4, got 6 x 4"):
        layers.space_to_depth(x, 4)


def test_padding_to_a_multiple():
    x = jnp.asarray(numbers(0, 1, 3, 4, 2))
    y = layers.pad_to_multiple(x, 4)
    assert y.shape == (1, 4, 4, 2)
    np.testing.assert_array_equal(y[:, :3], x)
    np.testing.assert_array_equal(y[:, 3], x[:, 2])
    assert layers.pad_to_multiple(y, 4) is y


def test_context_starts_with_a_null_token_that_is_never_masked():
    tokens, mask = jnp.asarray(numbers(0, 2, 3, 4)), jnp.asarray([[True, False, False]] * 2)
    net = conditioning.Context(4, jnp.float32)
    params = random(net, 2, tokens, mask)
    out, keep = net.apply(params, 2, tokens, mask)
    assert out.shape == (2, 4, 4)
    np.testing.assert_array_equal(keep, [[True, True, False, False]] * 2)
    np.testing.assert_array_equal(out[:, 0], np.broadcast_to(params["params"]["null"][0], (2, 4)))
    assert not net.apply(params, 2, None, None)[1][:, 1:].any()
    assert net.apply(params, 2, tokens, None)[1].all()


@pytest.mark.parametrize("value", [0, -1, 2.0, True, "4"])
def test_positive_integers_only(value):
    with pytest.raises(ConfigError, match="width must be an integer >= 1, got"):
        conditioning.check_positive(width=value)
    conditioning.check_positive(width=None, depth=1)


def test_initial_weights_have_their_moments():
    shape = (3, 3, 40, 80)
    draw = jax.jit(lambda key: (init.uniform(1.0, "fan_avg")(key, shape), init.normal(0.02)(key, shape)))
    u, n = (np.asarray(a, np.float64) for a in draw(jax.random.key(0)))
    variance = 2 / (9 * 120)
    assert u.var() == pytest.approx(variance, rel=0.02)
    assert np.abs(u).max() <= np.sqrt(3 * variance)
    assert np.abs(u.mean()) < 4 * np.sqrt(variance / u.size)
    assert n.std() == pytest.approx(0.02, rel=0.02)
    assert (n**4).mean() / n.var() ** 2 == pytest.approx(3, rel=0.05)
    fan_in = init.uniform(2.0, "fan_in")(jax.random.key(1), (50, 70))
    assert np.asarray(fan_in).var() == pytest.approx(2 / 50, rel=0.08)


def test_the_hash_is_uniform_and_its_keys_are_independent():
    a, b = (np.asarray(init.unit(key, (1 << 16,)), np.float64) for key in jax.random.split(jax.random.key(7)))
    for u in (a, b):
        assert np.abs(u).max() < 1
        histogram = np.histogram(u, 256, (-1, 1))[0]
        chi = ((histogram - 256) ** 2 / 256).sum()
        assert abs(chi - 255) < 5 * np.sqrt(2 * 255)
        assert abs(np.corrcoef(u[1:], u[:-1])[0, 1]) < 5 / 256
    assert abs(np.corrcoef(a, b)[0, 1]) < 5 / 256


def test_the_hash_never_reaches_an_end():
    # The largest and the smallest of the 2^23 cells, as unit() forms them, stay inside (-1, 1): erf_inv is finite.
    for cell in (0, 2**23 - 1):
        u = (np.float32(cell) + np.float32(0.5)) * np.float32(2.0 / 2**23) - np.float32(1)
        assert -1 < u < 1
        assert np.isfinite(jax.lax.erf_inv(jnp.float32(u)))


def test_initial_weights_do_not_depend_on_the_sharding():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    one = jax.jit(lambda key: init.XAVIER(key, (16, 8)))(jax.random.key(0))
    many = jax.jit(lambda key: init.XAVIER(key, (16, 8)), out_shardings=spec)(jax.random.key(0))
    assert len(many.sharding.device_set) == 8
    np.testing.assert_array_equal(one, many)
