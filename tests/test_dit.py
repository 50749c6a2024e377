"""The diffusion transformer: published parameter count, adaLN-Zero, conditioning, independence, precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import nets
from jaxdiff.errors import ConfigError
from jaxdiff.nets import dit
from tests.oracles.nets import count, perturbed, shapes

TINY = {"width": 16, "depth": 2, "heads": 2, "time_scale": 1000.0}


def dense(i, o):
    return i * o + o


def expected(width, depth, patch, channels, out, classes):
    """DiT's parameters from the paper: adaLN-Zero blocks, final layer, time MLP on 256 frequencies, class table."""
    block = dense(width, 6 * width) + dense(width, 3 * width) + dense(width, width) + 2 * 4 * width**2 + 5 * width
    ends = dense(patch**2 * channels, width) + dense(width, 2 * width) + dense(width, patch**2 * out)
    return depth * block + ends + dense(256, width) + dense(width, width) + classes * width


@pytest.mark.parametrize(
    ("settings", "millions"),
    [({}, 33), ({"width": 1152, "depth": 28, "heads": 16}, 675)],
)
def test_the_published_number_of_parameters(settings, millions):
    net = nets.DiT(**settings, num_classes=1000, out_channels=8)
    wanted = expected(net.width, net.depth, 2, 4, 8, 1000)
    assert count(shapes(net, jnp.zeros((1, 32, 32, 4)))) == wanted
    assert round(wanted / 1e6) == millions  # Peebles & Xie 2023, table 1


def test_positions_are_separable_and_distinct():
    table = np.asarray(dit.positions(3, 5, 16))[0].reshape(3, 5, 16)
    w = 1e4 ** -(np.arange(4) / 4)
    np.testing.assert_allclose(table[2, 4, :8], np.concatenate([np.sin(2 * w), np.cos(2 * w)]), atol=1e-5)
    np.testing.assert_allclose(table[2, 4, 8:], np.concatenate([np.sin(4 * w), np.cos(4 * w)]), atol=1e-5)
    assert len(np.unique(table.reshape(15, 16).round(4), axis=0)) == 15


@pytest.fixture(scope="module")
def text_net():
    net = nets.DiT(**TINY, num_classes=4, vector_dim=3, token_dim=6)
    draw = np.random.default_rng(1)
    x = jnp.asarray(draw.standard_normal((3, 4, 6, 3)), jnp.float32)
    inputs = {
        "labels": jnp.asarray([0, 3, -1]),
        "vector": jnp.asarray(draw.standard_normal((3, 3)), jnp.float32),
        "tokens": jnp.asarray(draw.standard_normal((3, 5, 6)), jnp.float32),
        "token_mask": jnp.asarray([[True] * 3 + [False] * 2, [True] * 5, [False] * 5]),
    }
    params = perturbed(net, x)
    apply = jax.jit(lambda x, time, **inputs: net.apply(params, x, time, **inputs))
    return net, params, apply, x, jnp.asarray([0.1, 0.5, 0.9]), inputs


def test_blocks_start_as_the_identity():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 16)), jnp.float32)
    net = dit.DiTBlock(heads=2)
    y, _ = jax.jit(lambda: net.init_with_output(jax.random.key(0), x, jnp.ones((2, 16)), None, True))()
    np.testing.assert_array_equal(y, x)
    out, _ = jax.jit(lambda: nets.DiT(**TINY).init_with_output(jax.random.key(0), x[..., None], jnp.ones((2,))))()
    np.testing.assert_array_equal(out, np.zeros((2, 5, 16, 1)))  # 5 x 16 is padded to 6 x 16 and cropped


@pytest.mark.parametrize("name", ["x", "time", "labels", "vector", "tokens"])
def test_each_input_changes_the_output_of_its_row_only(text_net, name):
    _, _, apply, x, time, inputs = text_net
    every = inputs | {"time": time, "x": x}
    where, value = {"x": ((1, 0, 0, 0), 3.0), "tokens": ((1, 4, 2), 9.0), "labels": (1, 2)}.get(name, (1, 0.2))
    other = every | {name: every[name].at[where].set(value)}
    before, after = apply(**every), apply(**other)
    assert np.abs(after[1] - before[1]).max() > 1e-3
    np.testing.assert_array_equal(after[::2], before[::2])


def test_masked_tokens_do_not_matter_and_null_conditions_are_dropped(text_net):
    _, _, apply, x, time, inputs = text_net
    noisy = jnp.where(inputs["token_mask"][..., None], inputs["tokens"], 1e3)
    np.testing.assert_allclose(apply(x, time, **inputs | {"tokens": noisy}), apply(x, time, **inputs), atol=1e-4)
    nothing = {"labels": jnp.full((3,), -1), "vector": jnp.zeros((3, 3)), "token_mask": jnp.zeros((3, 5), bool)}
    masked = apply(x, time, tokens=inputs["tokens"], **nothing)
    assert np.isfinite(masked).all()
    np.testing.assert_allclose(masked, apply(x, time), rtol=1e-4, atol=1e-4)


def test_bfloat16_remat_and_eager_agree(text_net):
    net, params, apply, x, time, inputs = text_net
    full = apply(x, time, **inputs)
    np.testing.assert_allclose(net.apply(params, x, time, **inputs), full, rtol=1e-3, atol=1e-3)
    with jax.numpy_dtype_promotion("standard"):  # jax.nn.dot_product_attention itself promotes
        half = jax.jit(net.clone(dtype=jnp.bfloat16, remat="full").apply)(params, x, time, **inputs)
    assert half.dtype == jnp.float32
    assert 1e-5 < np.sqrt(np.mean(np.square(half - full)) / np.mean(np.square(full))) < 0.05


def test_remat_policies_give_the_same_gradient_and_compute_again_what_they_say(text_net):
    net, params, _, x, time, inputs = text_net

    def gradient(remat):
        def loss(params):
            return jnp.mean(jnp.square(net.clone(remat=remat).apply(params, x, time, **inputs)))

        return jax.grad(loss)

    products = {r: str(jax.make_jaxpr(gradient(r))(params)).count("dot_general") for r in ("none", "dots", "full")}
    assert products["none"] <= products["dots"] < products["full"]
    whole, *others = (jax.jit(gradient(remat))(params) for remat in products)
    for other in others:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), whole, other)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"remat": "some"}, "remat must be one of none, full, dots, got 'some'"),
        ({"width": 20, "heads": 2}, "of 8, got 20"),
        ({"width": 16, "heads": 3}, r"multiple of heads \(3\)"),
        ({"depth": 0}, "depth must be an integer >= 1, got 0"),
        ({"dropout": -0.1}, "dropout must be in"),
    ],
)
def test_unusable_settings_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        nets.DiT(**TINY | settings)


def test_conditions_it_was_not_built_for_are_refused():
    with pytest.raises(ConfigError, match="Build it with token_dim=6"):
        nets.DiT(**TINY).init(jax.random.key(0), jnp.zeros((1, 4, 4, 3)), jnp.zeros((1,)), tokens=jnp.zeros((1, 2, 6)))
