"""Schedules against their papers' formulas, at both ends, and through their inverses."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxdiff as jd
from jaxdiff.errors import ConfigError
from tests.oracles.schedules import ALL, CONTINUOUS, TABLES

DATA_ENDS = {"ve"}  # sigma(0) > 0
NOISE_ENDS = {"cosine", "sigmoid", "rectified_flow", "shift_logsnr", "shift_time", "zero_terminal_snr"}  # alpha(1) = 0


@functools.cache
def jitted(schedule):
    return jax.jit(lambda t: (schedule.alpha(t), schedule.sigma(t), schedule.logsnr(t)))


def evaluate(schedule, t):
    return jitted(schedule)(t)


@pytest.mark.parametrize("name", CONTINUOUS)
def test_values_are_the_papers(name):
    schedule, formula = CONTINUOUS[name]
    t = np.linspace(0.01, 0.99, 99)
    with jax.enable_x64(True):
        alpha, sigma, logsnr = evaluate(schedule, jnp.asarray(t))
    want_alpha, want_sigma = formula(t)
    np.testing.assert_allclose(alpha, want_alpha, rtol=1e-11)
    np.testing.assert_allclose(sigma, want_sigma, rtol=1e-11)
    np.testing.assert_allclose(logsnr, 2 * np.log(want_alpha / want_sigma), atol=1e-10)


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_exact_at_its_knots(name):
    schedule, betas = TABLES[name]
    with jax.enable_x64(True):
        alpha, sigma, _ = evaluate(schedule, jnp.asarray(schedule.time(np.arange(len(betas)))))
    alpha_bar = np.cumprod(1 - betas)
    np.testing.assert_allclose(alpha, np.sqrt(alpha_bar), rtol=1e-11)
    np.testing.assert_allclose(sigma, np.sqrt(1 - alpha_bar), rtol=1e-11)


def test_linear_is_the_limit_of_its_table():
    """The log-SNR of the table with T steps tends to the continuous one as 1 / T (Song et al. 2021, appendix B)."""
    t = np.array([0.25, 0.5, 0.75])
    gaps = []
    with jax.enable_x64(True):
        want = jd.schedule.linear().logsnr(jnp.asarray(t))
        for T in (1000, 2000, 4000):
            table = jd.schedule.ddpm_table(beta_min=0.1 / T, beta_max=20 / T, T=T)
            gaps.append(float(jnp.max(jnp.abs(table.logsnr(jnp.asarray(t)) - want))))
    assert gaps[0] < 0.05
    np.testing.assert_allclose(np.log2(np.array(gaps[:-1]) / np.array(gaps[1:])), 1.0, atol=0.05)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_both_ends_and_dtype(name, dtype):
    with jax.enable_x64(True):
        alpha, sigma, logsnr = evaluate(ALL[name], jnp.array([0, 1], dtype))
        assert {u.dtype for u in (alpha, sigma, logsnr)} == {np.dtype(dtype)}
        assert float(alpha[0]) == 1.0
        assert float(sigma[0]) == (np.asarray(0.01, dtype) if name in DATA_ENDS else 0.0)
        assert (float(alpha[1]) == 0.0) == (name in NOISE_ENDS)
        if name in NOISE_ENDS:
            assert float(sigma[1]) == 1.0
        assert np.all(np.isfinite(logsnr))
        assert np.all(np.abs(logsnr) <= 80)


@pytest.mark.parametrize("name", ALL)
def test_the_curve_and_monotony(name):
    t = np.linspace(0, 1, 301)
    with jax.enable_x64(True):
        alpha, sigma, logsnr = evaluate(ALL[name], jnp.asarray(t))
    assert np.all(np.diff(logsnr) < 0)
    if name in ("ve", "edm"):
        curve = alpha
    elif name in ("rectified_flow", "shift_time"):
        curve = alpha + sigma
    else:
        curve = alpha**2 + (sigma if "sub_vp" in name else sigma**2)
    np.testing.assert_allclose(curve, 1, atol=1e-12)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(("dtype", "atol"), [(np.float32, 1e-6), (np.float64, 1e-13)])
def test_inverse(name, dtype, atol):
    schedule = ALL[name]
    with jax.enable_x64(True):
        t = jnp.linspace(0, 1, 301, dtype=dtype)
        back = jax.jit(lambda t: schedule.inverse(schedule.logsnr(t)))(t)
        assert back.dtype == dtype
        np.testing.assert_allclose(back, t, atol=atol)
        beyond = schedule.inverse(jnp.array([-200.0, -80.0, 80.0, 200.0], dtype))
    np.testing.assert_array_equal(beyond, [1, 1, 0, 0])


@pytest.mark.parametrize("name", ALL)
def test_float32_keeps_relative_precision(name):
    """The small one of alpha and sigma near the ends, against the same schedule in float64."""
    t = np.array([1e-4, 1e-3, 0.5, 0.999, 0.9999])
    with jax.enable_x64(True):
        exact = evaluate(ALL[name], jnp.asarray(t.astype(np.float32), jnp.float64))
    single = evaluate(ALL[name], jnp.asarray(t, jnp.float32))
    # These two compute a time first, and inherit its rounding near 1.
    rtol = 3e-3 if name in ("shift_time", "zero_terminal_snr") else 3e-5
    for got, want in zip(single[:2], exact[:2], strict=True):
        np.testing.assert_allclose(got, want, rtol=rtol)


@pytest.mark.parametrize("name", ALL)
def test_derivative(name):
    """Against central differences, within a knot interval for tables; finite at the ends."""
    schedule, h = ALL[name], 1e-6
    t = np.array([0.1003, 0.4003, 0.9003])
    with jax.enable_x64(True):
        got = jd.schedule.derivative(schedule, jnp.asarray(t))
        plus, minus = evaluate(schedule, jnp.asarray(t + h)), evaluate(schedule, jnp.asarray(t - h))
        for value, high, low in zip(got, plus[:2], minus[:2], strict=True):
            np.testing.assert_allclose(value, (high - low) / (2 * h), rtol=1e-6, atol=1e-8)
    ends = jd.schedule.derivative(schedule, jnp.array([0.0, 1.0]))
    assert np.all(np.isfinite(ends))


def _beta(t):
    return 0.1 + t * (20 - 0.1)


SDES = {
    # Song et al. 2021, appendix B and C; the rest by hand from f = d log alpha/dt, g^2 = d sigma^2/dt - 2 f sigma^2.
    "linear": lambda t: (-_beta(t) / 2, _beta(t)),
    "sub_vp": lambda t: (-_beta(t) / 2, _beta(t) * (1 - np.exp(-(t**2) * (20 - 0.1) - 2 * t * 0.1))),
    "ve": lambda t: (0 * t, 2 * (0.01 * 5000**t) ** 2 * np.log(5000)),
    "edm": lambda t: (0 * t, 2 * CONTINUOUS["edm"][1](t)[1] * _edm_rate(t)),
    "cosine": lambda t: (-_cosine_rate(t), 2 * _cosine_rate(t)),
    "rectified_flow": lambda t: (-1 / (1 - t), 2 * t / (1 - t)),
}


def _edm_rate(t, low=0.002, high=80.0, rho=7):
    k = (1 + high / low) ** (1 / rho) - 1
    return low * rho * k * (1 + k * t) ** (rho - 1)


def _cosine_rate(t, s=0.008):
    return np.pi / 2 / (1 + s) * np.tan(np.pi / 2 * (t + s) / (1 + s))


@pytest.mark.parametrize("name", SDES)
def test_sde_is_the_papers(name):
    t = np.linspace(0.01, 0.99, 99)
    with jax.enable_x64(True):
        f, g2 = jd.schedule.sde(ALL[name], jnp.asarray(t))
    want_f, want_g2 = SDES[name](t)
    np.testing.assert_allclose(f, want_f, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(g2, want_g2, rtol=1e-10)


def moment_errors(schedule, f, g2, t, h=1e-6):
    """How far dx = f x dt + g dw is from moving the mean as alpha and the variance as sigma^2, relative."""
    plus, minus = evaluate(schedule, jnp.asarray(t + h)), evaluate(schedule, jnp.asarray(t - h))
    alpha, sigma, _ = (np.asarray(u) for u in evaluate(schedule, jnp.asarray(t)))
    mean = np.asarray(plus[0] - minus[0]) / (2 * h)
    variance = np.asarray(plus[1] ** 2 - minus[1] ** 2) / (2 * h)
    gap = variance - (2 * f * sigma**2 + g2)
    return np.abs(mean - f * alpha).max(), np.abs(gap / np.maximum(1, variance)).max()


@pytest.mark.parametrize("name", ALL)
def test_sde_has_the_marginals_of_the_schedule(name):
    """d mean/dt = f mean and d variance/dt = 2 f variance + g^2, against finite differences."""
    schedule, t = ALL[name], np.array([0.1003, 0.4003, 0.9003])
    with jax.enable_x64(True):
        f, g2 = (np.asarray(u) for u in jd.schedule.sde(schedule, jnp.asarray(t)))
        assert max(moment_errors(schedule, f, g2, t)) < 1e-6
        assert np.all(g2 > 0)
        assert moment_errors(schedule, f, g2 + 2 * f * schedule.sigma(jnp.asarray(t)) ** 2, t)[1] > 1e-3 or not f.any()


@pytest.mark.parametrize("name", ALL)
def test_sde_is_finite_at_both_ends(name):
    """Infinite only in truth where alpha(1) = 0: there f stands for about -1/(1 - t) at the edge, 1e-6 before."""
    f, g2 = jax.jit(lambda t: jd.schedule.sde(ALL[name], t))(jnp.array([0.0, 1.0]))
    assert np.all(np.isfinite(f))
    assert np.all(np.isfinite(g2))
    assert (float(f[1]) < -1e5) == (name in NOISE_ENDS)
    if name == "linear":
        np.testing.assert_allclose([f[0], g2[0], f[1], g2[1]], [-0.05, 0.1, -10, 20], rtol=1e-3)


@pytest.mark.parametrize("name", ALL)
def test_gradients_are_finite_at_both_ends(name):
    schedule = ALL[name]

    def everything(t):
        logsnr = schedule.logsnr(t)
        return schedule.alpha(t) + schedule.sigma(t) + logsnr + schedule.inverse(logsnr)

    gradient = jax.jit(jax.vmap(jax.grad(everything)))(jnp.array([0.0, 1e-7, 0.5, 1 - 1e-7, 1.0]))
    assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize("name", ALL)
def test_schedules_are_frozen_and_hashable(name):
    schedule = ALL[name]
    assert hash(schedule) == hash(dataclasses.replace(schedule))
    assert schedule == dataclasses.replace(schedule)
    field = dataclasses.fields(schedule)[0].name if dataclasses.fields(schedule) else "alpha"
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(schedule, field, 0)


@pytest.mark.parametrize("s", [0.5, 3.0])
def test_time_and_logsnr_shift_agree_for_rectified_flow(s):
    base, t = jd.schedule.rectified_flow(), np.linspace(0, 1, 101)
    with jax.enable_x64(True):
        by_time = evaluate(jd.schedule.shift(base, time=s), jnp.asarray(t))
        by_logsnr = evaluate(jd.schedule.shift(base, logsnr=-2 * np.log(s)), jnp.asarray(t))
        np.testing.assert_allclose(by_time[0], by_logsnr[0], atol=1e-14)
        np.testing.assert_allclose(by_time[1], by_logsnr[1], atol=1e-14)
        # For a curve other than the straight line they do not: the test above can fail.
        by_time = evaluate(jd.schedule.shift(jd.schedule.cosine(), time=s), jnp.asarray(t))
        by_logsnr = evaluate(jd.schedule.shift(jd.schedule.cosine(), logsnr=-2 * np.log(s)), jnp.asarray(t))
        assert np.max(np.abs(by_time[0] - by_logsnr[0])) > 0.01


def test_logsnr_shift_adds_a_constant():
    t = np.linspace(0.01, 0.99, 50)
    with jax.enable_x64(True):
        for base in (jd.schedule.cosine(), jd.schedule.sub_vp(), jd.schedule.edm(), jd.schedule.ddpm_table()):
            moved = jd.schedule.shift(base, logsnr=2 * np.log(64 / 256))
            np.testing.assert_allclose(
                moved.logsnr(jnp.asarray(t)), base.logsnr(jnp.asarray(t)) - 2.772588722239781, atol=1e-10
            )


def test_zero_terminal_snr_is_lins():
    """Algorithm 1, step by step; the first alpha stays, the last is exactly 0."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    root = np.sqrt(np.cumprod(1 - betas))
    want = (root - root[-1]) * root[0] / (root[0] - root[-1])
    table = jd.schedule.zero_terminal_snr(betas)
    assert table == jd.schedule.zero_terminal_snr(jd.schedule.from_betas(betas))
    assert table.betas[-1] == 1.0
    with jax.enable_x64(True):
        alpha = table.alpha(jnp.asarray(table.time(np.arange(1000))))
    np.testing.assert_allclose(alpha, want, rtol=1e-10, atol=1e-15)
    assert float(alpha[-1]) == 0.0


def test_table_indices_are_checked_on_the_host():
    table = jd.schedule.ddpm_table(T=10)
    np.testing.assert_array_equal(table.time([0, 9]), [0.1, 1.0])
    for index in (-1, 10, 1.5):
        with pytest.raises(ConfigError, match=r"0\.\.9"):
            table.time(index)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: jd.schedule.vp(beta_min=0), "0 < beta_min"),
        (lambda: jd.schedule.edm(sigma_min=80, sigma_max=80), "sigma_min < sigma_max"),
        (lambda: jd.schedule.edm(rho=0), "rho"),
        (lambda: jd.schedule.linear(T=0), "T must be an integer"),
        (lambda: jd.schedule.ddpm_table(T=1000.0), "T must be an integer"),
        (lambda: jd.schedule.cosine(s=-0.1), "s must be in"),
        (lambda: jd.schedule.sigmoid(start=1, end=1), "start must be below end"),
        (lambda: jd.schedule.sigmoid(tau=0), "tau"),
        (lambda: jd.schedule.from_betas([]), "betas must be"),
        (lambda: jd.schedule.from_betas([0.1, 1.0, 0.1]), "betas must be"),
        (lambda: jd.schedule.from_betas([0.1, float("nan")]), "betas must be"),
        (lambda: jd.schedule.zero_terminal_snr([0.5]), "at least 2 betas"),
        (lambda: jd.schedule.shift(jd.schedule.cosine()), "exactly one"),
        (lambda: jd.schedule.shift(jd.schedule.cosine(), logsnr=1.0, time=1.0), "exactly one"),
        (lambda: jd.schedule.shift(jd.schedule.cosine(), time=0), "time must be positive"),
        (lambda: jd.schedule.shift(jd.schedule.cosine(), logsnr=float("nan")), "within"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_expand():
    x = jnp.zeros((2, 3, 4))
    assert jd.schedule.expand(jnp.float32(1), x).shape == (1, 1, 1)
    assert jd.schedule.expand(jnp.ones(2), x).shape == (2, 1, 1)
    assert jd.schedule.expand(jnp.ones(2), x.astype(jnp.bfloat16)).dtype == jnp.float32
    for shape in ((3,), (2, 1)):
        with pytest.raises(ConfigError, match=r"shape \(2,\)"):
            jd.schedule.expand(jnp.ones(shape), x)
