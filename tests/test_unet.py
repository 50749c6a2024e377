"""The U-Net: published parameter counts by a count of its own, shapes, conditioning, independence, precision."""

import flax.errors
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import nets
from jaxdiff.errors import ConfigError
from tests.oracles.nets import count, perturbed, shapes

TINY = {"channels": 8, "multipliers": (1, 2), "num_blocks": 1, "groups": 4, "heads": 2, "time_scale": 1000.0}


def dense(i, o):
    return i * o + o


def conv(i, o):
    return 9 * i * o + o


def norm(c):
    return 2 * c


def attention(c):
    return norm(c) + 4 * dense(c, c)


def residual(i, o, e, scale_shift=False, skip=False):
    shortcut = dense(i, o) if i != o or skip else 0
    return norm(i) + conv(i, o) + dense(e, o * (1 + scale_shift)) + norm(o) + conv(o, o) + shortcut


def expected(c, mults, blocks, levels, *, out=3, scale_shift=False, by_block=False, skip=False, last=False):
    """Parameters of the published networks, added up from the papers' descriptions: input 3 channels, no labels."""
    e = 4 * c
    total = dense(c, e) + dense(e, e) + conv(3, c)
    h, skips = c, [c]
    for i, m in enumerate(mults):
        if i:
            total += residual(h, h, e, scale_shift, skip) if by_block else conv(h, h)
            skips.append(h)
        for _ in range(blocks):
            total += residual(h, m * c, e, scale_shift) + attention(m * c) * (i in levels)
            h = m * c
            skips.append(h)
    total += 2 * residual(h, h, e, scale_shift) + attention(h)
    for i, m in reversed(list(enumerate(mults))):
        if i < len(mults) - 1:
            total += residual(h, h, e, scale_shift, skip) if by_block else conv(h, h)
        for j in range(blocks + 1):
            has_attention = i in levels and (not last or j == blocks)
            total += residual(h + skips.pop(), m * c, e, scale_shift) + attention(m * c) * has_attention
            h = m * c
    assert not skips
    return total + norm(h) + conv(h, out)


def test_ddpm_has_the_published_number_of_parameters():
    found = count(shapes(nets.ddpm_cifar10(), jnp.zeros((1, 32, 32, 3))))
    assert found == 35_746_307  # Ho et al. 2020, appendix B: "35.7 million"
    assert found == expected(128, (1, 2, 2, 2), 2, (1,))


def test_edm_has_the_published_number_of_parameters():
    x = jnp.zeros((1, 32, 32, 3))
    wanted = expected(128, (2, 2, 2), 4, (1,), by_block=True, skip=True, last=True)
    assert round(wanted / 1e6, 1) == 55.7  # Karras et al. 2022, table 7
    assert count(shapes(nets.edm_ddpmpp(), x)) == wanted
    assert count(shapes(nets.edm_ddpmpp(vector_dim=9), x)) == wanted + 9 * 128
    assert count(shapes(nets.edm_ddpmpp(num_classes=10), x)) == wanted + 10 * 128


def test_adm_has_the_published_number_of_parameters():
    wanted = expected(192, (1, 2, 3, 4), 3, (1, 2, 3), out=6, scale_shift=True, by_block=True) + 1000 * 768
    assert round(wanted / 1e6) == 296  # Dhariwal & Nichol 2021, table 4
    assert count(shapes(nets.adm(num_classes=1000, out_channels=6), jnp.zeros((1, 64, 64, 3)))) == wanted


def test_a_count_notices_one_block_more():
    x = jnp.zeros((1, 32, 32, 3))
    assert count(shapes(nets.ddpm_cifar10(num_blocks=3), x)) != expected(128, (1, 2, 2, 2), 2, (1,))


def test_small_is_small():
    net = nets.small(token_dim=128, vector_dim=128)
    assert 1e6 < count(shapes(net, jnp.zeros((1, 32, 32, 3)))) < 4e6


@pytest.fixture(scope="module")
def text_net():
    """A tiny network with every kind of conditioning, parameters away from zero, and its inputs."""
    net = nets.UNet(**TINY, patch_size=2, cross_levels=(0,), token_dim=6, vector_dim=3, num_classes=4, scale_shift=True)
    draw = np.random.default_rng(1)
    x = jnp.asarray(draw.standard_normal((3, 8, 8, 3)), jnp.float32)
    inputs = {
        "labels": jnp.asarray([0, 3, -1]),
        "vector": jnp.asarray(draw.standard_normal((3, 3)), jnp.float32),
        "tokens": jnp.asarray(draw.standard_normal((3, 5, 6)), jnp.float32),
        "token_mask": jnp.asarray([[True] * 3 + [False] * 2, [True] * 5, [False] * 5]),
    }
    params = perturbed(net, x)
    apply = jax.jit(lambda x, time, **inputs: net.apply(params, x, time, **inputs))
    return net, params, apply, x, jnp.asarray([0.1, 0.5, 0.9]), inputs


def test_output_starts_at_zero_and_has_the_input_dtype():
    net = nets.UNet(**TINY)
    x = jnp.ones((1, 8, 8, 3))
    params = jax.jit(net.init)(jax.random.key(0), x, jnp.ones((1,)))
    y = jax.jit(net.apply)(params, x, jnp.ones((1,)))
    assert y.dtype == x.dtype
    np.testing.assert_array_equal(y, np.zeros(x.shape))
    assert not [path for path, _ in jax.tree.leaves_with_path(params) if "." in jax.tree_util.keystr(path, simple=True)]


@pytest.mark.parametrize("size", [(7, 9), (1, 1)])
def test_any_size_is_padded_and_cropped(size):
    net = nets.UNet(**TINY, patch_size=2, out_channels=5)
    assert net.multiple == 4
    x = jnp.zeros((1, *size, 3))
    y = jax.eval_shape(lambda: net.init_with_output(jax.random.key(0), x, jnp.zeros((1,)))[0])
    assert y.shape == (1, *size, 5)


def test_rows_are_independent(text_net):
    _, _, apply, x, time, inputs = text_net
    both = apply(x, time, **inputs)
    other = x.at[0].set(7.0), time.at[0].set(0.3), inputs | {"tokens": inputs["tokens"].at[0].set(2.0)}
    changed = apply(other[0], other[1], **other[2])
    np.testing.assert_array_equal(changed[1:], both[1:])
    assert np.abs(changed[0] - both[0]).max() > 1e-3


@pytest.mark.parametrize("name", ["time", "labels", "vector", "tokens"])
def test_each_condition_changes_the_output_of_its_row_only(text_net, name):
    _, _, apply, x, time, inputs = text_net
    every = inputs | {"time": time}
    value = {"labels": 2, "time": 0.77}.get(name, 0.0)
    other = every | {name: every[name].at[1].set(value)}
    if name == "tokens":
        other[name] = every[name].at[1, 4, 2].set(9.0)
    before, after = (apply(x, e["time"], **{k: v for k, v in e.items() if k != "time"}) for e in (every, other))
    assert np.abs(after[1] - before[1]).max() > 1e-3
    np.testing.assert_array_equal(after[::2], before[::2])


def test_masked_tokens_do_not_matter(text_net):
    _, _, apply, x, time, inputs = text_net
    noisy = jnp.where(inputs["token_mask"][..., None], inputs["tokens"], 1e3)
    np.testing.assert_allclose(
        apply(x, time, **inputs | {"tokens": noisy}), apply(x, time, **inputs), rtol=1e-5, atol=1e-5
    )


def test_null_conditions_are_dropped_conditions(text_net):
    _, _, apply, x, time, inputs = text_net
    dropped = apply(x, time)
    nothing = {"vector": jnp.zeros((3, 3)), "token_mask": jnp.zeros((3, 5), bool), "tokens": inputs["tokens"]}
    for null in (-1, 4):
        masked = apply(x, time, **nothing, labels=jnp.full((3,), null))
        assert np.isfinite(masked).all()
        np.testing.assert_allclose(masked, dropped, rtol=1e-4, atol=1e-4)
    assert np.abs(apply(x, time, **nothing, labels=jnp.asarray([0, 1, 2])) - dropped).max() > 1e-3


def test_bfloat16_is_close_and_returns_float32(text_net):
    net, params, apply, x, time, inputs = text_net
    with jax.numpy_dtype_promotion("standard"):  # jax.nn.dot_product_attention itself promotes
        half = jax.jit(net.clone(dtype=jnp.bfloat16).apply)(params, x, time, **inputs)
    full = apply(x, time, **inputs)
    assert half.dtype == jnp.float32
    error = np.sqrt(np.mean(np.square(half - full)) / np.mean(np.square(full)))
    assert 1e-5 < error < 0.05  # not equal: it did compute in bfloat16


@pytest.fixture(scope="module")
def flat_net():
    """One level only, quick to compile, with text; parameters away from zero."""
    net = nets.UNet(
        channels=8, multipliers=(1,), num_blocks=1, groups=4, attention_levels=(0,), patch_size=2, token_dim=6
    )
    draw = np.random.default_rng(2)
    x = jnp.asarray(draw.standard_normal((2, 6, 4, 3)), jnp.float32)
    inputs = {"tokens": jnp.asarray(draw.standard_normal((2, 3, 6)), jnp.float32)}
    return net, perturbed(net, x), x, jnp.asarray([10.0, 500.0]), inputs


def test_jit_is_eager_and_padding_repeats_the_edge(flat_net):
    net, params, x, time, inputs = flat_net
    padded = jnp.pad(x[:, :5, :3], ((0, 0), (0, 1), (0, 1), (0, 0)), mode="edge")
    eager = net.apply(params, x[:, :5, :3], time, **inputs)
    np.testing.assert_allclose(
        jax.jit(net.apply)(params, padded, time, **inputs)[:, :5, :3], eager, rtol=1e-4, atol=1e-4
    )


def test_remat_has_the_same_gradients_and_every_parameter_has_one(flat_net):
    net, params, x, time, inputs = flat_net

    def gradient(net):
        def loss(params):
            y = net.apply(params, x, time, **inputs, deterministic=False, rngs={"dropout": jax.random.key(5)})
            return jnp.mean(jnp.square(y))

        return jax.jit(jax.grad(loss))

    nets_ = [net.clone(dropout=0.2, remat=remat) for remat in ("none", "full")]
    assert ["remat" in str(jax.make_jaxpr(gradient(n))(params)) for n in nets_] == [False, True]
    a, b = (gradient(n)(params) for n in nets_)
    jax.tree.map(lambda u, v: np.testing.assert_allclose(u, v, rtol=1e-3, atol=1e-4 * np.abs(u).max() + 1e-7), a, b)
    dead = [jax.tree_util.keystr(path) for path, g in jax.tree.leaves_with_path(b) if not np.abs(g).max() > 0]
    assert not dead


def test_dropout_draws_only_when_asked(flat_net):
    net, params, x, time, inputs = flat_net
    apply = jax.jit(net.clone(dropout=0.5).apply, static_argnames="deterministic")
    a, b = (apply(params, x, time, **inputs, deterministic=False, rngs={"dropout": jax.random.key(i)}) for i in (0, 1))
    assert np.abs(a - b).max() > 1e-3
    with pytest.raises(flax.errors.InvalidRngError):
        apply(params, x, time, **inputs, deterministic=False)
    np.testing.assert_allclose(
        apply(params, x, time, **inputs), jax.jit(net.apply)(params, x, time, **inputs), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("preset", [nets.adm, nets.edm_ddpmpp])
def test_presets_run_when_narrow(preset):
    net = preset(
        channels=8, multipliers=(1, 2), num_blocks=1, attention_levels=(1,), groups=4, heads=1, head_channels=8
    )
    x = jnp.ones((2, 6, 6, 3))
    y = jax.jit(net.apply)(perturbed(net, x), x, jnp.asarray([0.0, 999.0]))
    assert y.shape == x.shape
    assert np.isfinite(y).all()
    assert np.abs(y[0] - y[1]).max() > 1e-3


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"channels": 10}, "groups must divide the 10 channels"),
        ({"channels": 0}, "channels must be an integer >= 1, got 0"),
        ({"multipliers": ()}, "at least one level"),
        ({"multipliers": (1, 0)}, r"multipliers\[1\]"),
        ({"attention_levels": (2,)}, "levels 0 to 1, got 2"),
        ({"cross_levels": (1,)}, "needs token_dim"),
        ({"heads": 3}, "heads must divide the 16 channels"),
        ({"head_channels": 7}, "head_channels must divide the 16 channels"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"dropout": "x"}, "dropout must be in"),
        ({"dtype": "float99"}, "dtype must be a floating dtype or None, got 'float99'"),
        ({"dtype": jnp.int32}, "dtype must be a floating"),
        ({"multipliers": [1, 2]}, r"multipliers must be a tuple of integers, got \[1, 2\]"),
        ({"attention_levels": 1}, "attention_levels must be a tuple"),
        ({"resample": "pool"}, "resample must be one of"),
        ({"up_attention": "first"}, "up_attention must be one of"),
    ],
)
def test_unusable_settings_are_refused_when_built(settings, words):
    with pytest.raises(ConfigError, match=words):
        nets.UNet(**TINY | settings)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"labels": jnp.zeros((2,), jnp.int32)}, "without classes. Build it with num_classes"),
        ({"vector": jnp.zeros((2, 7))}, "Build it with vector_dim=7"),
        ({"tokens": jnp.zeros((2, 5, 9))}, "Build it with token_dim=9"),
        ({"token_mask": jnp.zeros((2, 5), bool)}, "token_mask was given without tokens"),
        ({"time": jnp.zeros(())}, r"Use jnp.full\(\(2,\), t\)"),
        ({"x": jnp.zeros((2, 8, 3))}, "4 axes"),
        ({"x": jnp.zeros((2, 8, 8, 3), jnp.int32)}, "floating"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(inputs, words):
    call = {"x": jnp.zeros((2, 8, 8, 3)), "time": jnp.zeros((2,))} | inputs
    with pytest.raises(ConfigError, match=words):
        nets.UNet(**TINY).init(jax.random.key(0), call.pop("x"), call.pop("time"), **call)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"labels": jnp.zeros((2,))}, "labels must be integers"),
        ({"labels": jnp.zeros((1,), jnp.int32)}, r"labels must be integers of shape \(2,\)"),
        ({"vector": jnp.zeros((2, 4))}, "vector_dim=3"),
        ({"tokens": jnp.zeros((2, 4, 5))}, "token_dim=6"),
        ({"tokens": jnp.zeros((2, 4, 6)), "token_mask": jnp.zeros((2, 5), bool)}, "token_mask must have the shape"),
    ],
)
def test_conditions_of_the_wrong_shape_are_refused(inputs, words):
    net = nets.UNet(**TINY, num_classes=3, vector_dim=3, token_dim=6)
    with pytest.raises(ConfigError, match=words):
        net.init(jax.random.key(0), jnp.zeros((2, 8, 8, 3)), jnp.zeros((2,)), **inputs)
