"""The learning rate and the Adam chain against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.errors import ConfigError
from jaxdiff.train.optimizer import adam, rate


@pytest.mark.parametrize(
    ("options", "formula"),
    [
        ({}, lambda n: 1.0),
        ({"warmup_steps": 10}, lambda n: min(1, (n + 1) / 10)),
        ({"decay": "cosine", "total_steps": 100}, lambda n: 0.5 * (1 + np.cos(np.pi * min(1, n / 100)))),
        ({"decay": "rsqrt", "warmup_steps": 10}, lambda n: min(1, (n + 1) / 10) * np.sqrt(10 / max(n, 10))),
        ({"decay": "rsqrt"}, lambda n: np.sqrt(1 / max(n, 1))),
    ],
)
def test_rate_is_its_formula(options, formula):
    counts = np.arange(0, 150, 7)
    out = jax.jit(jax.vmap(rate(3e-4, **options)))(jnp.asarray(counts, jnp.int32))
    np.testing.assert_allclose(out, [3e-4 * formula(n) for n in counts], rtol=1e-5, atol=1e-10)


def first_update(gradient, **options):
    """Adam's first step is -rate * g / (|g| + eps), before weight decay."""
    params = {"w": jnp.array([1.0, -2.0])}
    optimizer = adam(0.1, **options)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = jax.jit(optimizer.update)({"w": jnp.asarray(gradient)}, optimizer.init(params), params)
    return updates["w"]


def test_first_adam_step_is_the_sign_of_the_gradient():
    np.testing.assert_allclose(first_update([3.0, -4.0]), [-0.1, 0.1], rtol=1e-5)


def test_clipping_acts_before_adam():
    clipped = np.array([3.0, -4.0]) / 5 * 1e-3
    np.testing.assert_allclose(
        first_update([3.0, -4.0], clip_norm=1e-3, eps=1e-3), -0.1 * clipped / (abs(clipped) + 1e-3), rtol=1e-4
    )


def test_weight_decay_is_decoupled():
    np.testing.assert_allclose(
        first_update([3.0, -4.0], weight_decay=0.5), [-0.1 - 0.05 * 1.0, 0.1 + 0.05 * 2.0], rtol=1e-5
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": "cosin", "total_steps": 9}, "Did you mean 'cosine'"),
        ({"decay": "cosine"}, "total_steps >= 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be > 0, got 0.0"),
        ({"learning_rate": float("nan")}, "learning_rate must be > 0, got nan"),
        ({"clip_norm": 0.0}, "clip_norm must be > 0, got 0.0"),
        ({"weight_decay": -1.0}, "weight_decay must be >= 0, got -1.0"),
        ({"b2": 1.0}, "b2=1.0"),
        ({"eps": 0.0}, "eps=0.0"),
    ],
)
def test_bad_settings_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        adam(**{"learning_rate": 1e-3} | options)
