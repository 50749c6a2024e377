"""Likelihoods against closed forms: densities, entropies of 8-bit data, and bounds that never fall below them."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxdiff as jd
from jaxdiff import likelihood, sample
from jaxdiff.denoise import LearnedRange, LearnedVariance
from jaxdiff.errors import ConfigError
from tests.oracles.gaussian import Gaussian, Mixture
from tests.oracles.likelihood import Levels, Steps, draw, entropy, few_levels, quantised_normal
from tests.oracles.sampling import smooth_grid
from tests.oracles.schedules import ALL, CONTINUOUS

COSINE, EDM = jd.schedule.cosine(), jd.schedule.edm()
VARIANCE = 0.25
MEANS, VARIANCES = (0.3, -0.5, 0.1), (0.25, 1.0, 0.04)


def key(seed=0):
    return jax.random.key(seed)


@functools.cache
def points():
    """Draws of N(MEANS, VARIANCES), (64, 3)."""
    return np.random.default_rng(0).standard_normal((64, 3)) * np.sqrt(VARIANCES) + np.array(MEANS)


def normal_log_prob(x, std):
    """log N(x; 0, std^2 I), (b,)."""
    return np.sum(-((x / std) ** 2) / 2 - np.log(std) - np.log(2 * np.pi) / 2, axis=1)


def three_modes(schedule):
    """A mixture in three dimensions, whose Jacobian is not diagonal."""
    return Mixture(
        schedule, (0.5, 0.3, 0.2), ((-0.6, 0.2, 0.1), (0.5, 0.5, -0.3), (0.1, -0.7, 0.6)), (0.05, 0.03, 0.08)
    )


# the probability flow


@pytest.mark.parametrize("name", [*CONTINUOUS, "zero_terminal_snr"])
def test_log_prob_of_gaussian_data(name):
    """20 steps in float32, from alpha = 0 and to sigma = 0: within 0.002 nats of the model, 1 % of the data.

    The model is the flow of N(0, sigma_1^2), which differs from the data where alpha_1 is not 0.
    """
    schedule = ALL[name]
    data, x = Gaussian(schedule, MEANS, VARIANCES), jnp.asarray(points(), jnp.float32)
    times = jnp.asarray(sample.log_snr_grid(schedule, 20), jnp.float32)
    got = jax.jit(lambda x, times: likelihood.log_prob(key(), data.denoise, x, times, schedule=schedule))(x, times)
    start, end = jnp.float32(0), jnp.float32(1)
    end_std, (_, v0), (_, v1) = float(schedule.sigma(end)), data.moments(x, start), data.moments(x, end)
    model = normal_log_prob(np.asarray(data.flow(x, start, end)), end_std) + np.sum(np.log(v1 / v0), 1) / 2
    np.testing.assert_allclose(got, model, atol=2e-3)
    np.testing.assert_allclose(np.mean(got), np.mean(data.log_prob(x, start)), rtol=0.01)


@pytest.mark.parametrize("schedule", [COSINE, EDM], ids=["cosine", "edm"])
def test_log_prob_of_a_mixture(schedule):
    data, x = three_modes(schedule), jnp.asarray(points(), jnp.float32)
    times = sample.log_snr_grid(schedule, 40)
    run = jax.jit(
        lambda x: likelihood.log_prob(key(), data.denoise, x, times, schedule=schedule, divergence=likelihood.exact)
    )
    np.testing.assert_allclose(run(x), data.log_prob(x, jnp.float32(0)), rtol=2e-3, atol=5e-3)


@pytest.mark.parametrize("name", ["vp", "ve"])
def test_a_published_mistake(name):
    """swirl-dynamics gives -9.2 (VE) and -18.0 (VP) for data of variance 0.25, where the truth is about -0.7 nats.

    Its prior has the standard deviation (sigma / alpha)^2 in the place of sigma; the same mistake here is as far off.
    """
    schedule = ALL[name]
    data, x = Gaussian(schedule, 0.0, VARIANCE), jnp.asarray(points()[:, :1], jnp.float32)
    times = sample.log_snr_grid(schedule, 40)
    run = jax.jit(lambda x: likelihood.transport(key(), data.denoise, x, times, schedule=schedule))
    got = likelihood.log_prob(key(), data.denoise, x, times, schedule=schedule)
    truth = data.log_prob(x, jnp.float32(0)).mean()
    np.testing.assert_allclose(np.mean(got), truth, rtol=0.01)
    x_1, change = run(x)
    one = jnp.float32(1)
    wrong = normal_log_prob(np.asarray(x_1), float(schedule.sigma(one) / schedule.alpha(one)) ** 2) + np.asarray(change)
    assert np.mean(wrong) < truth - 3


def order(schedule, num_steps=16):
    """The slopes of log error against log step of (x_1, the change of log p), in float64."""
    errors = []
    with jax.enable_x64(True):
        data, x = Gaussian(schedule, MEANS, VARIANCES), jnp.asarray(points())
        run = jax.jit(lambda x, times: likelihood.transport(key(), data.denoise, x, times, schedule=schedule))
        for n in (num_steps, 2 * num_steps):
            times = jnp.asarray(smooth_grid(schedule, n))
            x_1, change = run(x, times)
            (_, v0), (_, v1) = data.moments(x, times[-1]), data.moments(x, times[0])
            truth = data.flow(x, times[-1], times[0]), jnp.sum(jnp.log(v1 / v0), 1) / 2
            errors.append([float(jnp.abs(a - b).max()) for a, b in zip((x_1, change), truth, strict=True)])
    return np.log2(np.array(errors[0]) / np.array(errors[1]))


@pytest.mark.parametrize("name", ["cosine", "edm", "sub_vp"])
def test_order_of_convergence(name):
    np.testing.assert_allclose(order(ALL[name], 64), 4, atol=0.15)


def test_a_lower_order_would_be_seen(monkeypatch):
    def euler(slope, state, start, stop):
        return jax.tree.map(lambda u, du: u + (stop - start) * du, state, slope(jnp.asarray(0), state, start))

    monkeypatch.setattr(likelihood, "_runge_kutta", euler)
    np.testing.assert_allclose(order(COSINE, 64), 1, atol=0.15)


def repeated(divergence, num=8192):
    """log p of one point, `num` times with probes of their own, and the same with the exact divergence."""
    data = three_modes(EDM)
    x, times = jnp.full((num, 3), 0.2), sample.log_snr_grid(EDM, 8)
    run = lambda x, d: likelihood.log_prob(key(0), data.denoise, x, times, schedule=EDM, divergence=d)  # noqa: E731
    return jax.jit(lambda x: (run(x, divergence), run(x[:1], likelihood.exact)))(x)


@pytest.mark.parametrize("probe", [jax.random.rademacher, jax.random.normal], ids=["rademacher", "normal"])
def test_hutchinson_is_unbiased(probe):
    one, truth = repeated(likelihood.hutchinson(probe=probe))
    error = np.std(one) / math.sqrt(len(one))
    assert 0 < error < 0.03
    assert abs(np.mean(one) - truth[0]) < 3 * error


def test_more_probes_vary_less_and_wrong_ones_are_seen():
    one, _ = repeated(likelihood.hutchinson())
    four, truth = repeated(likelihood.hutchinson(4))
    assert np.var(four) / np.var(one) == pytest.approx(1 / 4, rel=0.1)
    wrong, _ = repeated(likelihood.hutchinson(probe=lambda k, shape, dtype: jax.random.uniform(k, shape, dtype, -1, 1)))
    assert abs(np.mean(wrong) - truth[0]) > 3 * np.std(wrong) / math.sqrt(len(wrong))


# 8-bit data


def test_dequantized_data_stay_in_their_bins():
    x0 = jnp.asarray(np.tile(np.arange(256) / 127.5 - 1, (16, 1)), jnp.float32)
    x = np.asarray(likelihood.dequantize(key(), x0))
    moved = (x - x0) * 127.5
    assert np.abs(moved).max() <= 0.5
    assert abs(moved.mean()) < 4 / math.sqrt(12 * moved.size)
    assert abs(moved.var() * 12 - 1) < 0.05


def test_bits_per_dim_of_data_uniform_in_their_bins():
    """Uniform dequantisation of a density that is constant in each bin loses nothing: each example has -log2 P."""
    p = quantised_normal()
    x0, truth = draw(p, 8, 16)
    with jax.enable_x64(True):
        data, times = Steps(EDM, p), jnp.asarray(sample.log_snr_grid(EDM, 20))
        run = jax.jit(lambda x0: likelihood.bits_per_dim_ode(key(1), data.denoise, x0, times, schedule=EDM))
        got = np.asarray(run(jnp.asarray(x0)))
    np.testing.assert_allclose(got, truth, rtol=5e-4)  # 0.004 bits: log2(128) for log2(127.5) would be seen


@functools.cache
def bounds_of(name, d=32):
    """(entropy, bits by the continuous bound, by the discrete one, -log2 P(x0)), (b,) each."""
    p, b = {"quantised_normal": (quantised_normal(), 256), "few_levels": (few_levels(), 1024)}[name]
    x0, truth = draw(p, b, d)
    data, times = Levels(EDM, p), sample.exponential_grid(EDM, 100, sigma_min=0.001)

    @jax.jit
    def run(x0):
        continuous = likelihood.bits_per_dim_continuous(key(1), data.denoise, x0, times, schedule=EDM)
        discrete = likelihood.bits_per_dim_bound(key(2), data.denoise, x0, times, schedule=EDM)
        return continuous.total, discrete.total

    return entropy(p), *(np.asarray(u, np.float64) for u in run(jnp.asarray(x0, jnp.float32))), truth


@pytest.mark.parametrize("name", ["quantised_normal", "few_levels"])
def test_bounds_of_8_bit_data_meet_their_entropy_and_never_fall_below(name):
    bits, continuous, discrete, truth = bounds_of(name)
    for bound in (continuous, discrete):
        gap, error = np.mean(bound - truth), np.std(bound - truth) / math.sqrt(len(truth))
        assert gap > -3 * error
    assert np.mean(discrete) > np.mean(continuous)
    error = np.std(continuous - truth) / math.sqrt(len(truth))
    assert abs(np.mean(continuous - truth)) < 3 * error < 0.01 * bits
    assert np.mean(continuous) == pytest.approx(bits, rel=0.01)


def test_a_bound_below_the_entropy_would_be_seen():
    """As of a denoiser that is told x0."""
    x0, truth = draw(few_levels(), 64, 4)
    x0, times = jnp.asarray(x0, jnp.float32), sample.exponential_grid(EDM, 20, sigma_min=0.001)
    bound = likelihood.bits_per_dim_continuous(key(1), lambda x, t: x0, x0, times, schedule=EDM).total
    assert np.mean(bound - truth) < -3 * np.std(bound - truth) / math.sqrt(len(truth))


# the bound


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_bound_terms_on_gaussian_data(fraction):
    """Each KL with the exact denoiser in closed form: the gap of the means is the weight of x0 times its error."""
    b, d, T, schedule = 1024, 8, 6, COSINE
    x0 = math.sqrt(VARIANCE) * jax.random.normal(key(1), (b, d))
    oracle, times = Gaussian(schedule, 0.0, VARIANCE), np.linspace(1, 0, T + 1)
    run = jax.jit(
        lambda key, x0: likelihood.bits_per_dim_bound(
            key, oracle.denoise, x0, times, schedule=schedule, fraction=fraction
        )
    )
    bound = run(key(2), x0)
    np.testing.assert_allclose(bound.total, bound.prior + jnp.sum(bound.terms, 0), rtol=1e-6)
    np.testing.assert_allclose(bound.prior, 0, atol=1e-6)
    for i in range(1, T):
        t, s = (i + 1) / T, i / T
        (at_, st), (as_, ss) = ((float(schedule.alpha(u)), float(schedule.sigma(u))) for u in (t, s))
        large = st**2 - (at_ / as_) ** 2 * ss**2
        small = large * ss**2 / st**2
        model = large if fraction else small
        error = (as_ * large / st**2) ** 2 * VARIANCE * st**2 / (at_**2 * VARIANCE + st**2)
        want = 0.5 * (np.log(model / small) - 1 + small / model + error / model) / np.log(2)
        got = float(jnp.mean(bound.terms[i]))
        assert abs(got / want - 1) < 5 * math.sqrt(2 / (b * d)), i


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_the_decoder_has_the_small_variance_of_its_neighbour_as_in_ddpm(fraction):
    """DDPM's code, for fixed small and fixed large alike: log variance = log of the second posterior variance."""
    betas = np.linspace(0.01, 0.3, 4)
    bar = np.cumprod(1 - betas)
    std = math.sqrt(betas[1] * (1 - bar[0]) / (1 - bar[1]))
    x0, x0_hat, times = jnp.zeros((1, 1)), 0.02, np.linspace(1, 0, 5)
    denoise = lambda x, t: jnp.full_like(x, x0_hat)  # noqa: E731
    table = jd.schedule.from_betas(betas)
    bound = likelihood.bits_per_dim_bound(key(), denoise, x0, times, schedule=table, fraction=fraction)
    cdf = lambda z: 0.5 * math.erfc(-z / math.sqrt(2))  # noqa: E731
    mass = cdf((1 / 255 - x0_hat) / std) - cdf((-1 / 255 - x0_hat) / std)
    np.testing.assert_allclose(bound.terms[0], -math.log2(mass), rtol=1e-4)


@pytest.mark.parametrize("bound", [likelihood.bits_per_dim_bound, likelihood.bits_per_dim_continuous])
def test_the_prior_belongs_to_the_bound(bound):
    """KL(N(alpha x0, sigma^2) || N(0, sigma^2)) = (alpha x0 / sigma)^2 / 2 at the first time, whatever the denoiser."""
    table, x0 = jd.schedule.from_betas([0.1, 0.3, 0.5]), jnp.full((2, 3), 0.5)
    for times, alpha_bar in (([1.0, 2 / 3, 1 / 3, 0.0], 0.9 * 0.7 * 0.5), ([2 / 3, 1 / 3, 0.0], 0.9 * 0.7)):
        got = bound(key(), lambda x, t: x0, x0, times, schedule=table)
        np.testing.assert_allclose(got.prior, alpha_bar / (1 - alpha_bar) * 0.25 / 2 / math.log(2), rtol=1e-5)
        np.testing.assert_allclose(got.total, got.prior + jnp.sum(got.terms, 0), rtol=1e-5)


@pytest.mark.parametrize("name", ["cosine", "edm", "ve"])
def test_bounds_of_gaussian_data_come_down_to_the_truth(name):
    """Twice the steps, half the gap or less; the continuous bound has none, at any number."""
    schedule, b, d = ALL[name], 512, 32
    data = Gaussian(schedule, 0.0, VARIANCE)
    x0 = data.moments(jnp.zeros((b, d)), jnp.float32(0))[1] ** 0.5 * jax.random.normal(key(1), (b, d))
    truth = -np.asarray(data.log_prob(x0, jnp.float32(0)), np.float64) / d / math.log(2)
    settings = {"schedule": schedule, "decoder": likelihood.density}

    @jax.jit
    def run(x0, times):
        return (
            likelihood.bits_per_dim_bound(key(2), data.denoise, x0, times, **settings).total,
            likelihood.bits_per_dim_continuous(key(3), data.denoise, x0, times, **settings).total,
        )

    gaps = []
    for n in (50, 100, 200):
        discrete, continuous = run(x0, jnp.asarray(sample.exponential_grid(schedule, n, sigma_min=0.001), jnp.float32))
        gaps.append(np.mean(discrete - truth))
        assert abs(np.mean(continuous - truth)) < 3 * np.std(continuous - truth) / math.sqrt(b) < 0.1
    assert gaps[0] > gaps[1] > gaps[2] > 0
    assert gaps[0] / gaps[1] == pytest.approx(2, rel=0.2)
    assert gaps[1] / gaps[2] == pytest.approx(2, rel=0.2)


def test_the_true_variance_makes_the_bound_exact_at_any_number_of_steps():
    """With q(x_s | x_t) itself as the model, mean and variance, three steps of Gaussian data lose nothing."""
    T, b, d = 3, 4096, 16
    data, times = Gaussian(COSINE, 0.0, VARIANCE), np.linspace(1, 0, T + 1)
    x0 = math.sqrt(VARIANCE) * jax.random.normal(key(1), (b, d))

    def log_fresh(t, s):
        """log of the small and of the large variance from t to s."""
        large = COSINE.sigma(t) ** 2 - (COSINE.alpha(t) / COSINE.alpha(s)) ** 2 * COSINE.sigma(s) ** 2
        return jnp.log(large * (COSINE.sigma(s) / COSINE.sigma(t)) ** 2), jnp.log(large)

    def denoise(x, t):
        s = jnp.round(t * T - 1) / T
        large = log_fresh(t, s)[1]
        small = jnp.where(s > 0, log_fresh(t, s)[0], log_fresh(2 * t, t)[0])  # iDDPM's, at the last step
        fraction = (jnp.log(data.reverse(x, t, s)[1]) - small) / (large - small)
        return LearnedRange(data.denoise(x, t), fraction)

    def direct(x, t):
        return LearnedVariance(data.denoise(x, t), jnp.log(data.reverse(x, t, jnp.round(t * T - 1) / T)[1]))

    def run(x0, denoise):
        settings = {"schedule": COSINE, "decoder": likelihood.density}
        return likelihood.bits_per_dim_bound(key(2), denoise, x0, times, **settings).total

    learned, same, fixed = jax.jit(lambda x0: [run(x0, d) for d in (denoise, direct, data.denoise)])(x0)
    np.testing.assert_allclose(same, learned, rtol=1e-4, atol=1e-4)
    truth = -data.log_prob(x0, jnp.float32(0)) / d / math.log(2)
    assert abs(np.mean(learned - truth)) < 3 * np.std(learned - truth) / math.sqrt(b) < 0.02
    assert np.mean(fixed - truth) > 0.1


# as parts of somebody's program


def everything(x0, denoise, keys, schedule=COSINE):
    """All estimates of one batch, (3, b)."""
    times = sample.exponential_grid(schedule, 6)
    settings = {"schedule": schedule}
    return jnp.stack(
        [
            likelihood.bits_per_dim_ode(keys, denoise, x0, times, **settings),
            likelihood.bits_per_dim_bound(jax.random.clone(keys), denoise, x0, times, **settings).total,
            likelihood.bits_per_dim_continuous(jax.random.clone(keys), denoise, x0, times, **settings).total,
        ]
    )


def test_an_example_is_its_own_on_eight_devices_too():
    x0 = jnp.asarray(np.resize(points(), (8, 3)), jnp.float32)
    denoise = three_modes(COSINE).denoise
    run = jax.jit(lambda x0, seed: everything(x0, denoise, jax.vmap(jax.random.key)(seed)))
    seeds = jnp.arange(8)
    whole = run(x0, seeds)
    assert np.isfinite(whole).all()
    np.testing.assert_allclose(run(x0[::-1], seeds[::-1])[:, ::-1], whole, rtol=1e-5)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = run(*jax.device_put((x0, seeds), NamedSharding(mesh, P("data"))))
    assert len(spread.sharding.device_set) == 8
    np.testing.assert_allclose(spread, whole, rtol=1e-5)
    other = run(x0.at[0].set(1.0), seeds)  # one example changed: the others stay
    assert ((other != whole).any(axis=0) == (np.arange(8) == 0)).all()


def test_it_works_without_jit():
    x0, times = jnp.asarray(points()[:2], jnp.float32), sample.exponential_grid(COSINE, 2)
    run = lambda x0: likelihood.bits_per_dim_ode(key(7), lambda x, t: jnp.tanh(x), x0, times, schedule=COSINE)  # noqa: E731
    np.testing.assert_allclose(jax.jit(run)(x0), run(x0), rtol=1e-5)


def test_a_network_in_bfloat16_without_forward_mode():
    """The U-Nets' convolutions and norms have their own reverse mode only."""

    @jax.custom_vjp
    def net(x):
        return jnp.tanh(x).astype(jnp.bfloat16)

    net.defvjp(lambda x: (net(x), x), lambda x, g: ((1 - jnp.tanh(x) ** 2) * g.astype(x.dtype),))
    run = jax.jit(lambda x0: everything(x0, lambda x, t: net(x), key(6)))
    assert np.isfinite(run(jnp.asarray(points()[:4], jnp.float32))).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: likelihood.hutchinson(0), "divergence=exact"),
        (lambda: likelihood.hutchinson(True), "num_probes must be an integer"),
        (lambda: everything(jnp.ones((2, 3), jnp.uint8), lambda x, t: x, key()), r"jaxdiff\.data\.decode"),
        (lambda: likelihood.log_prob(key(), lambda x, t: x, [[1]], [1.0, 0.0], schedule=COSINE), "must be floating"),
        (lambda: everything(jnp.ones(3), lambda x, t: x, key()), r"shape \(b, \.\.\.\)"),
        (lambda: everything(jnp.ones((2, 3)), lambda x, t: x[:1], key()), "shape of x"),
        (lambda: everything(jnp.ones((2, 3)), lambda x, t: x, jax.random.split(key(), 3)), "one key or 2 keys"),
        (
            lambda: likelihood.log_prob(key(), lambda x, t: x, jnp.ones((2, 3)), [0.0, 1.0], schedule=COSINE),
            "strictly decreasing",
        ),
    ],
)
def test_bad_settings_are_refused(call, message):
    with pytest.raises(ConfigError, match=message):
        call()
