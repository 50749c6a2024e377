"""Averages against numpy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.errors import ConfigError
from jaxdiff.train import ema


def run(decay, values):
    """The average of a scalar parameter that starts at values[0]."""

    def body(average, indexed):
        n, value = indexed
        average = ema.update(average, value, decay(n))
        return average, average

    counts = jnp.arange(len(values) - 1, dtype=jnp.float32)
    return jax.jit(lambda v: jax.lax.scan(body, v[0], (counts, v[1:]))[1])(jnp.asarray(values, jnp.float32))


@pytest.mark.parametrize("decay", [ema.constant(0.999), ema.warmed(0.9999), ema.half_life(5e3, batch_size=10)])
def test_constant_parameters_are_reproduced_exactly(decay):
    np.testing.assert_array_equal(run(decay, np.full(1001, 0.1234567)), np.full(1000, 0.1234567, np.float32))


def test_a_thousand_steps_against_numpy():
    values = np.random.default_rng(0).normal(size=1001)
    decays = {
        ema.constant(0.99): lambda n: 0.99,
        ema.warmed(0.999): lambda n: min(0.999, (1 + n) / (10 + n)),
        ema.half_life(4000, batch_size=16): lambda n: 0.5 ** (16 / max(min(4000, 0.05 * 16 * n), 1e-8)),
    }
    for ours, reference in decays.items():
        average, expected = values[0], []
        for n, value in enumerate(values[1:]):
            d = reference(n)
            average = d * average + (1 - d) * value
            expected.append(average)
        np.testing.assert_allclose(run(ours, values), expected, atol=2e-6)


def test_constant_decay_has_the_closed_form():
    out = run(ema.constant(0.9), np.r_[0.0, np.ones(50)])
    np.testing.assert_allclose(out, 1 - 0.9 ** np.arange(1, 51), rtol=1e-5)


def test_warm_up_forgets_the_first_value():
    start_at_100 = np.r_[100.0, np.zeros(200)]
    assert run(ema.warmed(0.9999), start_at_100)[-1] < 1e-3
    assert run(ema.constant(0.9999), start_at_100)[-1] > 90


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_impossible_decay_is_refused(decay):
    for make in (ema.constant, ema.warmed):
        with pytest.raises(ConfigError, match=r"EMA decay must be in \[0, 1\)"):
            make(decay)


def test_impossible_half_life_is_refused():
    with pytest.raises(ConfigError, match="batch_size=0"):
        ema.half_life(100, batch_size=0)
