"""The seam: a network that outputs the exact value of any target becomes the exact posterior mean."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxdiff as jd
from jaxdiff.errors import ConfigError
from tests.oracles.schedules import ALL

TARGETS = (jd.target.eps, jd.target.x0, jd.target.v, jd.target.score, jd.target.velocity, jd.target.edm())
DATA_VARIANCE = 0.25


def posterior_mean(schedule, x, t):
    """E[x0 | x_t] for x0 ~ N(0, DATA_VARIANCE)."""
    alpha, sigma = (jd.schedule.expand(u, x) for u in (schedule.alpha(t), schedule.sigma(t)))
    return alpha * DATA_VARIANCE * x / (alpha**2 * DATA_VARIANCE + sigma**2)


def exact_net(schedule, target):
    """The ideal network: the target's value at (E[x0 | x], E[eps | x])."""

    def net(x, t):
        x0 = posterior_mean(schedule, x, t)
        alpha, sigma = (jd.schedule.expand(u, x) for u in (schedule.alpha(t), schedule.sigma(t)))
        return jd.target.encode(target, schedule, x0, (x - alpha * x0) / jnp.where(sigma > 0, sigma, 1), t)

    return net


@pytest.mark.parametrize("name", ["linear", "ve", "edm", "cosine", "rectified_flow", "zero_terminal_snr"])
def test_every_target_gives_the_posterior_mean(name):
    schedule = ALL[name]

    @jax.jit
    def all_targets(x, t):
        nets = [(target, exact_net(schedule, target)) for target in TARGETS]
        return [jd.denoise.from_net(net, schedule=schedule, target=target)(x, t) for target, net in nets]

    with jax.enable_x64(True):
        t = jnp.linspace(0, 1, 11)
        x = jnp.asarray(np.random.default_rng(0).standard_normal((11, 3)))
        want = posterior_mean(schedule, x, t)
        for target, x0 in zip(TARGETS, all_targets(x, t), strict=True):
            assert np.all(np.isfinite(x0)), target.name
            np.testing.assert_allclose(x0[1:-1], want[1:-1], rtol=1e-8, atol=1e-12, err_msg=target.name)


def test_edm_preconditioning_is_karras():
    """D(x; sigma) = c_skip x + c_out F(c_in x, c_noise) with the constants of Table 1."""
    schedule, sd = jd.schedule.edm(), 0.5
    denoise = jd.denoise.from_net(
        lambda x, time: jnp.sin(x) + time[:, None],
        schedule=schedule,
        target=jd.target.edm(sd),
        time_input=jd.denoise.c_noise,
        scale_input=jd.denoise.edm_scale(sd),
    )
    sigma, x = np.array([0.002, 0.3, 80.0]), np.array([[1.0], [-2.0], [50.0]])
    with jax.enable_x64(True):
        got = denoise(jnp.asarray(x), schedule.inverse(-2 * jnp.log(jnp.asarray(sigma))))
    sigma = sigma[:, None]
    total = sigma**2 + sd**2
    raw = np.sin(x / np.sqrt(total)) + np.log(sigma) / 4
    np.testing.assert_allclose(got, sd**2 / total * x + sigma * sd / np.sqrt(total) * raw, rtol=1e-9)


def test_time_inputs():
    schedule, t = jd.schedule.rectified_flow(), jnp.array([0.0, 0.25, 1.0])
    np.testing.assert_array_equal(jd.denoise.time_t(schedule, t), t)
    np.testing.assert_allclose(jd.denoise.time_index(4)(schedule, t), [0, 0, 3])
    np.testing.assert_allclose(jd.denoise.time_logsnr(schedule, t), [80, 2 * np.log(3), -80], rtol=1e-6)
    np.testing.assert_allclose(jd.denoise.c_noise(schedule, t), [-10, np.log(1 / 3) / 4, 10], rtol=1e-6)
    table = jd.schedule.ddpm_table()
    index = jd.denoise.time_index()(table, jnp.asarray(table.time(np.arange(1000)), jnp.float32))
    np.testing.assert_allclose(index, np.arange(1000), atol=1e-4)


def test_the_net_sees_float32_and_a_batch_of_times_and_the_dtype_comes_back():
    seen = []

    def net(x, time):
        seen.append((x.dtype, time.shape))
        return x.astype(jnp.bfloat16)

    denoise = jd.denoise.from_net(net, schedule=jd.schedule.cosine(), target=jd.target.v)
    x = jnp.ones((3, 2, 2, 1), jnp.bfloat16)
    for t in (jnp.float32(0.5), jnp.full(3, 0.5)):
        assert denoise(x, t).dtype == jnp.bfloat16
        assert denoise(x.astype(jnp.float32), t).dtype == jnp.float32
    assert set(seen) == {(jnp.dtype("float32"), (3,))}


def test_learned_variances():
    x = jnp.ones((2, 4, 3), jnp.bfloat16)
    make = partial(
        jd.denoise.from_net,
        lambda x, t: jnp.concatenate([2 * x, -x], -1),
        schedule=jd.schedule.cosine(),
        target=jd.target.x0,
    )
    ranged, direct = make(learned_range=True)(x, jnp.float32(0.5)), make(learned=True)(x, jnp.float32(0.5))
    assert isinstance(ranged, jd.denoise.LearnedRange)
    assert isinstance(direct, jd.denoise.LearnedVariance)
    np.testing.assert_allclose(ranged.fraction, 0.0)
    np.testing.assert_allclose(direct.log_variance, -1.0)
    for answer in (ranged, direct):
        np.testing.assert_allclose(answer.x0, 2.0)
        assert {leaf.dtype for leaf in answer} == {x.dtype}
    with pytest.raises(ConfigError, match="got both"):
        make(learned_range=True, learned=True)


@pytest.mark.parametrize("settings", [{}, {"learned_range": True}, {"learned": True}])
def test_a_wrong_output_shape_is_refused(settings):
    denoise = jd.denoise.from_net(
        lambda x, t: x[..., :1], schedule=jd.schedule.cosine(), target=jd.target.x0, **settings
    )
    with pytest.raises(ConfigError, match=r"got \(2, 1\)"):
        denoise(jnp.ones((2, 3)), jnp.float32(0.5))
