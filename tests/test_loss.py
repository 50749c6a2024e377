"""Losses against closed forms: the floor on Gaussian data, the weightings as printed, the bound term by term."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxdiff as jd
from jaxdiff.errors import ConfigError
from tests.oracles.gaussian import Gaussian

L = jd.loss
VARIANCE = 0.25
TARGETS = (jd.target.eps, jd.target.x0, jd.target.v, jd.target.score, jd.target.velocity, jd.target.edm())
WEIGHTINGS = {
    "snr": L.snr,
    "min_snr": L.min_snr(),
    "p2": L.p2(),
    "edm": L.edm(),
    "sigmoid": L.sigmoid(),
    "likelihood": L.likelihood,
}


def key(seed=0):
    return jax.random.key(seed)


def at(*times):
    """A time sampler that goes round these times."""
    return lambda key, b: jnp.asarray(np.resize(np.array(times, np.float32), b))


def net_of(schedule, target, denoise):
    """The network whose denoiser is `denoise`."""

    def net(x, t):
        alpha, sigma = (jd.schedule.expand(u, x) for u in (schedule.alpha(t), schedule.sigma(t)))
        x0 = denoise(x, t)
        return jd.target.encode(target, schedule, x0, (x - alpha * x0) / jnp.where(sigma > 0, sigma, 1), t)

    return net


@pytest.mark.parametrize("schedule", [jd.schedule.cosine(), jd.schedule.ve()], ids=["cosine", "ve"])
def test_the_loss_floor_on_gaussian_data(schedule):
    """With the exact denoiser, E[loss] = (a - b alpha / sigma)^2 Var[x0 | x_t], for every target."""
    b, d, t = 2048, 8, 0.4
    x0 = math.sqrt(VARIANCE) * jax.random.normal(key(1), (b, d))
    oracle = Gaussian(schedule, 0.0, VARIANCE)

    @jax.jit
    def means(key, scale):
        return [
            jnp.mean(
                L.diffusion(
                    jax.random.clone(key),
                    net_of(schedule, target, lambda x, t: scale * oracle.denoise(x, t)),
                    x0,
                    schedule=schedule,
                    target=target,
                    times=at(t),
                )
            )
            for target in TARGETS
        ]

    alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
    posterior = VARIANCE * sigma**2 / (alpha**2 * VARIANCE + sigma**2)
    worse = means(key(3), 0.8)
    for target, got, more in zip(TARGETS, means(key(2), 1.0), worse, strict=True):
        a, row_b = (float(u) for u in target.row(schedule, jnp.float32(t)))
        floor = (a - row_b * alpha / sigma) ** 2 * posterior
        assert abs(float(got) / floor - 1) < 5 * math.sqrt(2 / (b * d)), target.name  # 5 standard errors
        assert float(more) > 1.02 * float(got), target.name  # any other denoiser is above the floor


@pytest.mark.parametrize("weighting", WEIGHTINGS.values(), ids=WEIGHTINGS)
def test_a_weighting_means_the_same_for_every_target(weighting):
    """The same estimate of x0 has the same loss in each target space, for each example."""
    for schedule in (jd.schedule.cosine(), jd.schedule.edm()):
        with jax.enable_x64(True):
            x0 = jnp.asarray(np.random.default_rng(0).standard_normal((6, 4)))

            @jax.jit
            def losses(x0, schedule=schedule):
                settings = {"schedule": schedule, "weighting": weighting, "times": at(0.05, 0.3, 0.5, 0.7, 0.9, 0.95)}
                nets = [(target, net_of(schedule, target, lambda x, t: jnp.tanh(x))) for target in TARGETS]
                return [L.diffusion(key(), net, x0, target=target, **settings) for target, net in nets]

            first, *others = losses(x0)
            assert np.all(first > 0)
            for target, other in zip(TARGETS[1:], others, strict=True):
                np.testing.assert_allclose(other, first, rtol=1e-8, err_msg=target.name)


def test_weightings_are_as_printed():
    """On the straight line, where SNR = ((1 - t) / t)^2 and d logsnr / dt = -2 / (t (1 - t))."""
    schedule, t = jd.schedule.rectified_flow(), np.array([0.1, 0.3, 0.5, 0.8])
    snr, rate, sigma = ((1 - t) / t) ** 2, 2 / (t * (1 - t)), t / (1 - t)
    logistic = 1 / (1 + snr * np.exp(-2.0))  # sigmoid(2 - logsnr)
    sd = 0.5
    want = {
        ("snr", "eps"): np.ones(4),
        ("snr", "x0"): snr,
        ("min_snr", "x0"): np.minimum(snr, 5),
        ("min_snr", "eps"): np.minimum(snr, 5) / snr,
        ("p2", "eps"): 1 / (1 + snr),
        ("edm", "x0"): (sigma**2 + sd**2) / (sigma * sd) ** 2,
        ("edm", "edm(0.5)"): np.ones(4),
        ("sigmoid", "eps"): logistic * rate / 2,
        ("sigmoid", "x0"): np.exp(2) * (1 - logistic) * rate / 2,
        ("likelihood", "eps"): rate / 2,
        ("likelihood", "x0"): snr * rate / 2,
    }
    named = {target.name: target for target in TARGETS}
    with jax.enable_x64(True):
        for (weighting, target), value in want.items():
            got = WEIGHTINGS[weighting](schedule, named[target], jnp.asarray(t))
            np.testing.assert_allclose(got, value, rtol=1e-10, err_msg=f"{weighting} on {target}")
        np.testing.assert_allclose(L.p2(0.5, 2.0)(schedule, jd.target.eps, jnp.asarray(t)), (2 + snr) ** -0.5)
        cosine = jd.schedule.cosine()
        snr = np.exp(cosine.logsnr(jnp.asarray(t)))
        got = L.min_snr()(cosine, jd.target.v, jnp.asarray(t))
        np.testing.assert_allclose(got, np.minimum(snr, 5) / (snr + 1), rtol=1e-10)


@pytest.mark.parametrize("schedule", [jd.schedule.cosine(), jd.schedule.vp()], ids=["cosine", "vp"])
def test_likelihood_weighting_integrates_to_the_bound(schedule):
    """1/2 int SNR' Var[x0 | x_t] dt = 1/2 log((1 + c SNR_0) / (1 + c SNR_1)), the same for all schedules."""
    nodes, node_weights = np.polynomial.legendre.leggauss(60)
    low, high = 0.05, 0.9
    with jax.enable_x64(True):
        t = jnp.asarray(low + (high - low) * (nodes + 1) / 2)
        variance = Gaussian(schedule, 0.0, VARIANCE).posterior_variance(jnp.zeros((60, 1)), t)[:, 0]
        integrand = L.likelihood(schedule, jd.target.x0, t) * variance
        ends = np.exp(schedule.logsnr(jnp.array([low, high])))
    integral = np.sum(node_weights * np.asarray(integrand)) * (high - low) / 2
    want = 0.5 * np.log((1 + VARIANCE * ends[0]) / (1 + VARIANCE * ends[1]))
    np.testing.assert_allclose(integral, want, rtol=1e-8)


@pytest.mark.parametrize("target", TARGETS, ids=[t.name for t in TARGETS])
def test_losses_and_gradients_are_finite_at_both_ends(target):
    x0 = jax.random.normal(key(1), (2, 4))

    @jax.jit
    def gradients(w):
        def loss(w, weighting, schedule):
            settings = {"schedule": schedule, "weighting": weighting, "times": at(0.0, 1.0)}
            return jnp.sum(L.diffusion(key(), lambda x, t: w * x + t[:, None], x0, target=target, **settings))

        schedules = (jd.schedule.cosine(), jd.schedule.edm())
        return [jax.value_and_grad(loss)(w, v, s) for v in (L.simple, *WEIGHTINGS.values()) for s in schedules]

    assert np.all(np.isfinite(gradients(jnp.float32(0.5))))


def test_the_loss_of_an_example_is_its_own():
    x0 = jnp.zeros((4, 3))
    loss = functools.partial(
        L.diffusion, net=lambda x, t: 0.5 * x, schedule=jd.schedule.cosine(), target=jd.target.v, times=at(0.5)
    )
    before, after = loss(key(), x0=x0), loss(key(), x0=x0.at[2].set(1.0))
    np.testing.assert_array_equal(before != after, [False, False, True, False])
    assert len(np.unique(before)) == 4


def test_aux_holds_what_was_drawn():
    settings = {
        "schedule": jd.schedule.cosine(),
        "target": jd.target.v,
        "times": at(0.2, 0.7),
        "weighting": L.min_snr(),
    }
    loss, aux = L.diffusion_with_aux(key(), lambda x, t: 0 * x, jnp.ones((2, 3)), **settings)
    np.testing.assert_allclose(aux["t"], [0.2, 0.7])
    np.testing.assert_allclose(aux["logsnr"], jd.schedule.cosine().logsnr(jnp.array([0.2, 0.7])))
    np.testing.assert_allclose(aux["mse"] * L.min_snr()(settings["schedule"], jd.target.v, aux["t"]), loss)


@pytest.mark.parametrize("offset", [0.0, 0.5])
def test_offset_noise_moves_each_channel_as_a_whole(offset):
    """The mean of n pixels of one channel of the noise has variance 1 / n + offset^2, a single pixel 1 + offset^2."""
    seen = []

    def net(x, t):
        seen.append(x)
        return x

    settings = {"schedule": jd.schedule.rectified_flow(), "target": jd.target.eps, "times": at(1.0), "offset": offset}
    loss = L.diffusion(key(), net, jnp.ones((512, 4, 4, 3)), **settings)
    np.testing.assert_allclose(loss, 0, atol=1e-9)  # at t = 1 the noise is all there is, and it is the target
    means = seen[0].mean((1, 2))
    np.testing.assert_allclose(means.var(), 1 / 16 + offset**2, rtol=0.15)
    np.testing.assert_allclose(seen[0].var(), 1 + offset**2, rtol=0.1)
    correlation = np.corrcoef(np.asarray(means), rowvar=False)  # each channel has a number of its own
    assert np.abs(correlation - np.eye(3)).max() < 0.15


def test_prior_preservation_adds_the_class_to_the_subject():
    losses = jnp.float32([1, 2, 10, 20])
    np.testing.assert_allclose(L.prior_preservation(losses, 0.5), [6, 12])
    gradient = jax.grad(lambda x: L.prior_preservation(x, 0.5).mean())(losses)
    np.testing.assert_allclose(gradient, [0.5, 0.5, 0.25, 0.25])


def test_a_wrong_output_shape_is_refused():
    with pytest.raises(ConfigError, match=r"\(2, 3\), got \(2, 1\)"):
        L.diffusion(key(), lambda x, t: x[:, :1], jnp.ones((2, 3)), schedule=jd.schedule.cosine(), target=jd.target.v)


# time samplers


def test_uniform_stratified_and_antithetic():
    b = 64
    t = {f.__name__: np.asarray(f(key(5), b)) for f in (L.uniform, L.stratified, L.antithetic)}
    for name, value in t.items():
        assert np.all((value > 0) & (value <= 1)), name
    # strata are open below and closed above: t = 1 - (i + u) / b
    np.testing.assert_array_equal(np.sort(np.floor((1 - t["stratified"]) * b)), np.arange(b))
    np.testing.assert_allclose(np.diff(np.sort(t["antithetic"])), 1 / b, atol=1e-6)
    assert not np.array_equal(np.sort(np.floor((1 - t["uniform"]) * b)), np.arange(b))


def test_discrete_visits_the_whole_chain_and_nothing_else():
    t = np.asarray(L.discrete(10)(key(), 1000))
    np.testing.assert_allclose(np.unique(t), np.arange(1, 11) / 10, rtol=1e-6)


def test_logit_normal_and_log_normal():
    n = 20_000
    t = np.asarray(L.logit_normal(0.5, 0.8)(key(1), n), np.float64)
    logit = np.log(t / (1 - t))
    assert abs(logit.mean() - 0.5) < 0.03
    assert abs(logit.std() - 0.8) < 0.03
    edm = jd.schedule.edm()
    log_sigma = np.log(np.asarray(edm.sigma(L.log_normal(edm)(key(2), n)), np.float64))
    assert abs(log_sigma.mean() + 1.2) < 0.04
    assert abs(log_sigma.std() - 1.2) < 0.04


def test_importance_is_uniform_first_then_follows_the_loss_and_stays_unbiased():
    T, per_step = 5, np.array([1.0, 2.0, 3.0, 4.0, 10.0])
    chain = jnp.arange(1, T + 1) / T
    record = jax.jit(L.record)
    history = record(L.loss_history(T, size=2), chain, jnp.full(T, 1e6))
    _, weight = L.importance(history)(key(), 8)
    np.testing.assert_allclose(weight, 1.0)
    history = record(history, jnp.tile(chain, 2), jnp.tile(jnp.asarray(per_step, jnp.float32), 2))  # replaces the 1e6
    t, weight = L.importance(history, uniform_share=0.1)(key(1), 50_000)
    index = np.round(np.asarray(t) * T).astype(int) - 1
    want = 0.9 * per_step / per_step.sum() + 0.1 / T
    np.testing.assert_allclose(np.bincount(index) / 50_000, want, atol=0.01)
    np.testing.assert_allclose(weight, 1 / (T * want[index]), rtol=1e-5)
    np.testing.assert_allclose(np.mean(np.asarray(weight) * per_step[index]), per_step.mean(), rtol=0.01)


def test_importance_weights_reach_the_loss():
    t_and_weight = lambda key, b: (jnp.full(b, 0.5), jnp.arange(1.0, b + 1))  # noqa: E731
    settings = {"net": lambda x, t: 0 * x, "x0": jnp.ones((3, 2)), "schedule": jd.schedule.cosine()}
    plain = L.diffusion(key(), target=jd.target.x0, times=at(0.5), **settings)
    weighted, aux = L.diffusion_with_aux(key(), target=jd.target.x0, times=t_and_weight, **settings)
    np.testing.assert_allclose(weighted, plain * jnp.arange(1.0, 4.0))
    np.testing.assert_allclose(aux["loss"], plain)


def test_integer_data_are_refused():
    """8-bit pictures would be trained on as values from 0 to 255."""
    settings = {"schedule": jd.schedule.cosine(), "target": jd.target.v}
    for call in (L.diffusion, L.hybrid):
        with pytest.raises(ConfigError, match=r"got uint8\. For 8-bit pictures use jaxdiff\.data\.decode"):
            call(key(), lambda x, t: x, jnp.ones((2, 3), jnp.uint8), **settings)


# the terms of the variational bound


def test_prior_term():
    """KL(N(alpha x0, sigma^2) || N(0, sigma^2)) = (alpha x0 / sigma)^2 / 2."""
    table, betas = jd.schedule.ddpm_table(T=10, beta_max=0.3), np.linspace(1e-4, 0.3, 10)
    alpha_bar, x0 = np.prod(1 - betas), np.array([[1.0, -0.5]])
    want = np.mean(alpha_bar * x0**2 / (1 - alpha_bar) / 2, axis=1) / np.log(2)
    np.testing.assert_allclose(L.bound.prior_term(table, jnp.asarray(x0, jnp.float32)), want, rtol=1e-5)


@pytest.mark.parametrize("std", [1e-3, 0.05, 1.0])
def test_decoder_is_a_distribution_over_256_values(std):
    """Against the normal distribution function in float64; the masses sum to 1; finite far in the tails."""
    values, mean = np.arange(256) / 127.5 - 1, 0.3
    nll = np.asarray(L.bound.decoder_nll(jnp.asarray(values, jnp.float32), mean, jnp.float32(np.log(std))))
    assert np.all(np.isfinite(nll))
    cdf = lambda z: 0.5 * math.erfc(-z / math.sqrt(2))  # noqa: E731
    edges = [-math.inf, *((values[:-1] + values[1:]) / 2), math.inf]
    mass = np.diff([cdf((edge - mean) / std) for edge in edges])
    kept = mass > 1e-6
    np.testing.assert_allclose(np.exp(-nll[kept]), mass[kept], rtol=2e-3)
    np.testing.assert_allclose(np.exp(-nll).sum(), 1, rtol=1e-4)


def test_variance_range_at_the_last_step_is_the_neighbours():
    """iDDPM's clipped log-variance: at the first index the posterior variance of the second."""
    table, betas = jd.schedule.ddpm_table(), np.linspace(1e-4, 0.02, 1000)
    bar = np.cumprod(1 - betas)
    posterior = betas[1:] * (1 - bar[:-1]) / (1 - bar[1:])
    with jax.enable_x64(True):
        small, large = L.bound.variance_range(table, jnp.array([0.001, 0.5]), jnp.array([0.0, 0.499]))
    np.testing.assert_allclose(small, np.log([posterior[0], posterior[498]]), rtol=1e-8)
    np.testing.assert_allclose(large, np.log([betas[0], betas[499]]), rtol=1e-8)


def test_hybrid_trains_the_mean_by_the_simple_loss_alone():
    schedule, T, x0 = jd.schedule.ddpm_table(T=20, beta_max=0.4), 20, jnp.full((3, 4), 0.4)
    settings = {"schedule": schedule, "target": jd.target.eps, "times": at(0.05, 0.5, 1.0)}

    @functools.partial(jax.jit, static_argnums=2)
    def hybrid(mean, variance, weight=0.001):
        net = lambda x, t: jnp.concatenate([mean * x, variance + 0 * x], -1)  # noqa: E731
        return jnp.sum(L.hybrid(key(), net, x0, T=T, bound_weight=weight, **settings))

    @jax.jit
    def simple(mean):
        return jnp.sum(L.diffusion(key(), lambda x, t: mean * x, x0, **settings))

    grad_mean, grad_variance = jax.grad(hybrid, (0, 1))(0.3, 0.2)
    np.testing.assert_allclose(grad_mean, jax.grad(simple)(0.3), rtol=1e-5)
    assert np.isfinite(grad_variance)
    assert abs(grad_variance) > 1e-6
    bound = (float(hybrid(0.3, 0.2)) - float(simple(0.3))) / (0.001 * T)
    np.testing.assert_allclose(float(hybrid(0.3, 0.2, 0.5)), float(simple(0.3)) + 0.5 * T * bound, rtol=1e-4)


def hybrid_of(schedule, **settings):
    return L.hybrid(key(), lambda x, t: x, jnp.ones((1, 2)), schedule=schedule, target=jd.target.eps, **settings)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: L.min_snr(0), "gamma must be positive"),
        (lambda: L.p2(k=-1), "k must be positive"),
        (lambda: L.edm(0), "sigma_data must be positive"),
        (lambda: L.discrete(0), "T must be an integer"),
        (lambda: L.logit_normal(std=0), "std must be positive"),
        (lambda: L.loss_history(4, size=0), "size must be an integer"),
        (lambda: L.importance(L.loss_history(4), uniform_share=0), "uniform_share"),
        (lambda: hybrid_of(jd.schedule.ve()), r"sigma\(0\) = 0"),
        (lambda: hybrid_of(jd.schedule.cosine(), T=1), "T must be an integer >= 2"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
