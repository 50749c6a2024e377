"""Targets: round trips through the 2 x 2 system for all targets x schedules, and the answers at singular ends."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxdiff as jd
from jaxdiff.errors import ConfigError
from tests.oracles.schedules import ALL

TARGETS = {
    t.name: t
    for t in (
        jd.target.eps,
        jd.target.x0,
        jd.target.v,
        jd.target.score,
        jd.target.velocity,
        jd.target.edm(),
        jd.target.edm(1.0),
    )
}


def pair(b=41, seed=0):
    """(x0, eps) in float64, from NumPy."""
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.standard_normal((b, 3))) for _ in range(2))


@pytest.mark.parametrize("schedule_name", ALL)
def test_round_trips(schedule_name):
    """encode -> decode for every target and convert around a ring of them, to 1e-12; finite at both ends too."""
    schedule = ALL[schedule_name]

    @jax.jit
    def everything(x0, eps, t):
        x_t = jd.process.q_sample(schedule, x0, eps, t)
        values = {name: jd.target.encode(target, schedule, x0, eps, t) for name, target in TARGETS.items()}
        decoded = {n: jd.target.decode(TARGETS[n], schedule, x_t, value, t) for n, value in values.items()}
        around = {
            (m, n): jd.target.convert(TARGETS[m], TARGETS[n], schedule, x_t, values[m], t)
            for m in values
            for n in values
        }
        return values, decoded, around

    with jax.enable_x64(True):
        x0, eps = pair()
        t = jnp.linspace(0, 1, 41)
        values, decoded, around = everything(x0, eps, t)
        inner = slice(2, -2)
        for name in TARGETS:
            np.testing.assert_allclose(decoded[name][0][inner], x0[inner], rtol=0, atol=1e-12, err_msg=name)
            np.testing.assert_allclose(decoded[name][1][inner], eps[inner], rtol=0, atol=1e-12, err_msg=name)
            assert np.all(np.isfinite(values[name])), name
            assert np.all(np.isfinite(decoded[name])), name
        for (source, to), got in around.items():
            want = values[to][inner]
            scale = np.max(np.abs(want))  # a score of 1e3 has 1e-12 as its relative precision
            np.testing.assert_allclose(got[inner] / scale, want / scale, rtol=0, atol=1e-12, err_msg=f"{source} {to}")


def test_definitions():
    """Each target as its paper prints it, on alpha = 0.6, sigma = 0.8 (cosine) and on the straight line."""
    with jax.enable_x64(True):
        x0, eps = pair(1)
        schedule = jd.schedule.cosine()
        t = schedule.inverse(jnp.log(jnp.array([0.36 / 0.64])))
        got = {n: np.asarray(jd.target.encode(target, schedule, x0, eps, t)) for n, target in TARGETS.items()}
        x0, eps = np.asarray(x0), np.asarray(eps)
        sigma, data = 0.8 / 0.6, 0.5
        c_skip, c_out = data**2 / (sigma**2 + data**2), sigma * data / np.sqrt(sigma**2 + data**2)
        want = {
            "eps": eps,
            "x0": x0,
            "v": 0.6 * eps - 0.8 * x0,
            "score": -eps / 0.8,
            "edm(0.5)": (x0 - c_skip * (x0 + sigma * eps)) / c_out,
            "edm(1)": -(0.6 * eps - 0.8 * x0),
        }
        for name, value in want.items():
            np.testing.assert_allclose(got[name], value, rtol=1e-12, err_msg=name)
        flow = jd.target.encode(jd.target.velocity, jd.schedule.rectified_flow(), jnp.asarray(x0), jnp.asarray(eps), t)
        np.testing.assert_allclose(flow, eps - x0, rtol=1e-12)


def test_edm_target_has_unit_variance():
    """Var[F] = 1 for data of standard deviation sigma_data: a^2 sd^2 + b^2 = 1 (Karras et al. 2022, appendix B.6)."""
    with jax.enable_x64(True):
        rows = jax.jit(lambda t: [jd.target.edm(0.7).row(schedule, t) for schedule in ALL.values()])
        for name, (a, b) in zip(ALL, rows(jnp.linspace(0, 1, 11)), strict=True):
            np.testing.assert_allclose(0.7**2 * a**2 + b**2, 1, rtol=1e-12, err_msg=name)


def test_score_at_zero_noise_decodes():
    """x0 = (x + sigma^2 score) / alpha where sigma is 0 is x itself, whatever the network says."""
    schedule, x = jd.schedule.rectified_flow(), jnp.array([[0.3, -2.0]])
    x0, eps = jd.target.decode(jd.target.score, schedule, x, 100 * jnp.ones((1, 2)), jnp.zeros(1))
    np.testing.assert_allclose(x0, x, rtol=1e-6)
    assert np.all(np.isfinite(eps))


def test_singular_ends_give_the_least_norm_answer():
    schedule = jd.schedule.cosine()
    x, value, one, zero = jnp.ones((1, 2)), jnp.full((1, 2), 0.5), jnp.ones(1), jnp.zeros(1)
    for target, t, want_x0, want_eps in (
        (jd.target.eps, one, 0.0, 0.5),
        (jd.target.score, one, 0.0, -0.5),
        (jd.target.x0, zero, 0.5, 0.0),
    ):
        x0, eps = jd.target.decode(target, schedule, x, value, t)
        np.testing.assert_allclose(x0, want_x0, atol=1e-7, err_msg=target.name)
        np.testing.assert_allclose(eps, want_eps, atol=1e-7, err_msg=target.name)


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_gradients_are_finite_at_both_ends(target):
    for schedule in (jd.schedule.cosine(), jd.schedule.rectified_flow(), jd.schedule.edm()):

        def total(x, value, t, schedule=schedule):
            x0, eps = jd.target.decode(target, schedule, x, value, t)
            return jnp.sum(jnp.tanh(x0)) + jnp.sum(jnp.tanh(eps))

        for gradient in jax.jit(jax.grad(total, (0, 1)))(jnp.ones((2, 3)), jnp.ones((2, 3)), jnp.array([0.0, 1.0])):
            assert np.all(np.isfinite(gradient))


def test_half_precision_is_computed_in_float32():
    x = jnp.ones((2, 3), jnp.bfloat16)
    x0, _ = jd.target.decode(jd.target.v, jd.schedule.cosine(), x, x, jnp.float32(0.5))
    assert x0.dtype == jnp.float32


def test_bad_sigma_data_is_refused():
    with pytest.raises(ConfigError, match="sigma_data must be positive"):
        jd.target.edm(0.0)
