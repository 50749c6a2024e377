"""The forward process against Bayes' rule done by hand, and noise that belongs to its example."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxdiff as jd
from jaxdiff.errors import ConfigError
from tests.oracles.schedules import ALL, TABLES

keys = jax.random.key


def product_of_gaussians(schedule, x0, x_t, t, s):
    """q(x_s | x0) as prior, q(x_t | x_s) as likelihood: precisions add, means add weighted by precision."""
    (alpha_s, sigma_s), (alpha_t, sigma_t) = (
        (np.asarray(schedule.alpha(jnp.asarray(u))), np.asarray(schedule.sigma(jnp.asarray(u)))) for u in (s, t)
    )
    step = alpha_t / alpha_s
    step_variance = sigma_t**2 - step**2 * sigma_s**2
    precision = 1 / sigma_s**2 + step**2 / step_variance
    mean = (alpha_s * x0 / sigma_s**2 + step * x_t / step_variance) / precision
    return mean, 1 / precision


@pytest.mark.parametrize("name", ALL)
def test_posterior_is_the_product_of_gaussians(name):
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        for t, s in ((0.9, 0.4), (0.5, 0.45), (0.1, 0.02)):
            x0, x_t = rng.standard_normal((2, 4, 1))
            want_mean, want_variance = product_of_gaussians(ALL[name], x0, x_t, t, s)
            mean, variance, log_variance = jd.process.q_posterior(
                ALL[name], jnp.asarray(x0), jnp.asarray(x_t), jnp.full(4, t), jnp.full(4, s)
            )
            np.testing.assert_allclose(mean, want_mean, rtol=1e-9, atol=1e-12)
            np.testing.assert_allclose(variance, np.full((4, 1), want_variance), rtol=1e-9)
            np.testing.assert_allclose(log_variance, np.log(variance), rtol=1e-12)


def test_posterior_is_ddpms():
    """Equations 6 and 7 of DDPM on its own table, step 500."""
    table, betas = TABLES["ddpm_table"]
    alpha_bar, i = np.cumprod(1 - betas), 500
    scale = 1 / (1 - alpha_bar[i])
    c0 = np.sqrt(alpha_bar[i - 1]) * betas[i] * scale
    ct = np.sqrt(1 - betas[i]) * (1 - alpha_bar[i - 1]) * scale
    with jax.enable_x64(True):
        t, s = (jnp.asarray(table.time(j)) for j in (i, i - 1))
        mean, variance, _ = jd.process.q_posterior(table, jnp.array([2.0]), jnp.array([-3.0]), t, s)
    np.testing.assert_allclose(mean, 2 * c0 - 3 * ct, rtol=1e-9)
    np.testing.assert_allclose(variance, (1 - alpha_bar[i - 1]) * scale * betas[i], rtol=1e-9)


@pytest.mark.parametrize("name", ALL)
def test_posterior_is_finite_at_both_ends(name):
    """Also where alpha_t, sigma_s or both t and s are 0; from t to itself it is x_t."""
    t, s = jnp.array([1.0, 1.0, 0.5, 0.0, 1.0]), jnp.array([0.0, 0.5, 0.0, 0.0, 1.0])
    x0, x_t = jnp.full((5, 1), 2.0), jnp.full((5, 1), 3.0)
    function = jax.jit(lambda x0, x_t: jd.process.q_posterior(ALL[name], x0, x_t, t, s))
    mean, variance, log_variance = function(x0, x_t)
    for value in (mean, variance, log_variance):
        assert np.all(np.isfinite(value))
    np.testing.assert_allclose(mean[3:], 3.0, rtol=1e-5)
    np.testing.assert_allclose(variance[3:], 0.0, atol=1e-12)
    if name != "ve":
        np.testing.assert_allclose(mean[jnp.array([0, 2])], 2.0, rtol=1e-5)
    gradient = jax.grad(lambda x0, x_t: sum(jnp.sum(u) for u in function(x0, x_t)), (0, 1))(x0, x_t)
    assert np.all(np.isfinite(gradient))


def test_q_sample():
    x0, eps = jnp.ones((2, 3)), jnp.full((2, 3), 2.0)
    x_t = jd.process.q_sample(jd.schedule.rectified_flow(), x0, eps, jnp.array([0.0, 0.25]))
    np.testing.assert_allclose(x_t, [[1.0] * 3, [1.25] * 3])
    half = jd.process.q_sample(jd.schedule.cosine(), x0.astype(jnp.bfloat16), eps.astype(jnp.bfloat16), 0.5)
    assert half.dtype == jnp.float32


@pytest.mark.parametrize(("name", "std"), [("ve", 50.0), ("edm", 80.0), ("cosine", 1.0)])
def test_prior_is_scaled_by_the_schedule(name, std):
    x = jd.process.prior(keys(0), ALL[name], (4, 2500))
    assert abs(float(jnp.std(x)) / std - 1) < 0.03  # 4 standard errors of 10,000 draws
    assert abs(float(jnp.mean(x))) < 0.04 * std


def test_noise_of_an_example_does_not_depend_on_the_batch():
    whole = jd.process.normal(keys(7), (8, 3, 2), jnp.float32)
    np.testing.assert_array_equal(whole[:3], jd.process.normal(keys(7), (3, 3, 2), jnp.float32))
    own = jax.vmap(jax.random.key)(jnp.arange(4))
    batch = jd.process.normal(own, (4, 5), jnp.float32)
    for i in range(4):
        np.testing.assert_array_equal(batch[i], jax.random.normal(keys(i), (5,)))
    assert len(np.unique(np.asarray(whole))) == whole.size
    # The comparison can fail: one draw for the whole batch does depend on its size.
    assert not np.array_equal(jax.random.normal(keys(7), (8, 3)), jax.random.normal(keys(8), (8, 3)))


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (lambda: jax.random.split(keys(0), 3), "2 keys"),
        (lambda: jnp.zeros(2, jnp.uint32), "typed key"),
        (lambda: 7, "one of int"),
    ],
)
def test_bad_keys_are_refused(key, message):
    with pytest.raises(ConfigError, match=message):
        jd.process.normal(key(), (2, 3))
