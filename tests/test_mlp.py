"""The perceptron for points: its size, its zero start, conditioning, independence, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import nets
from jaxdiff.errors import ConfigError
from tests.oracles.nets import count, perturbed, shapes


@pytest.fixture(scope="module")
def net():
    model = nets.MLP(width=16, depth=2, num_classes=3, vector_dim=2)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 2)), jnp.float32)
    params = perturbed(model, x)
    apply = jax.jit(lambda x, time, **inputs: model.apply(params, x, time, **inputs))
    return model, params, apply, {"x": x, "time": jnp.asarray([0.1, 0.5, 0.9]), "labels": jnp.asarray([0, 1, 2])}


def test_count_and_zero_start():
    model = nets.MLP(width=16, depth=2)
    x = jnp.ones((4, 2))
    layer = 2 * 16 + 2 * (16 * 16 + 16) + 16 * 16
    wanted = 2 * 16 + 16 + 2 * layer + 2 * 16 + 16 * 2 + 2 + 128 * 16 + 16 + 16 * 16 + 16
    assert count(shapes(model, x)) == wanted
    y, _ = jax.jit(lambda: model.init_with_output(jax.random.key(0), x, jnp.ones((4,))))()
    np.testing.assert_array_equal(y, np.zeros((4, 2)))


@pytest.mark.parametrize(("name", "value"), [("x", 3.0), ("time", 0.2), ("labels", 0)])
def test_each_input_changes_its_row_only(net, name, value):
    _, _, apply, inputs = net
    before, after = apply(**inputs), apply(**inputs | {name: inputs[name].at[1].set(value)})
    assert np.abs(after[1] - before[1]).max() > 1e-3
    np.testing.assert_array_equal(after[::2], before[::2])


def test_null_conditions_are_dropped_and_jit_is_eager(net):
    model, params, apply, inputs = net
    null = apply(**inputs | {"labels": jnp.full((3,), -1)})
    eager = model.apply(params, inputs["x"], inputs["time"], vector=jnp.zeros((3, 2)))
    np.testing.assert_allclose(null, eager, rtol=1e-4, atol=1e-4)


def test_float64_stays_float64():
    model = nets.MLP(width=8, depth=1)
    params = perturbed(model, jnp.zeros((1, 2)))
    with jax.enable_x64(True):
        y = model.apply(params, jnp.ones((1, 2), jnp.float64), jnp.ones((1,), jnp.float64))
    assert y.dtype == np.float64


def test_bfloat16_is_close(net):
    model, params, apply, inputs = net
    half = jax.jit(model.clone(dtype=jnp.bfloat16).apply)(params, **inputs)
    full = apply(**inputs)
    assert half.dtype == jnp.float32
    assert 1e-5 < np.sqrt(np.mean(np.square(half - full)) / np.mean(np.square(full))) < 0.05


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"tokens": jnp.zeros((1, 2, 3))}, "tokens were given to a network built without them"),
        ({"labels": jnp.zeros((1,), jnp.int32)}, "without classes"),
        ({"time": jnp.zeros((2,))}, r"time must have shape \(1,\)"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(inputs, words):
    call = {"x": jnp.zeros((1, 2)), "time": jnp.zeros((1,))} | inputs
    with pytest.raises(ConfigError, match=words):
        nets.MLP().init(jax.random.key(0), call.pop("x"), call.pop("time"), **call)
    with pytest.raises(ConfigError, match="depth must be an integer >= 1"):
        nets.MLP(depth=0)
