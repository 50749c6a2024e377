"""Settings of solvers: the variances of DDPM, given noise, and which way a solver goes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import errors, guide, sample, schedule, solver
from jaxdiff.denoise import LearnedRange, LearnedVariance
from jaxdiff.types import Solver
from tests.oracles.gaussian import Gaussian
from tests.oracles.moments import exact_laws, true_law
from tests.oracles.sampling import MEAN, VARIANCE

COSINE, EDM = schedule.cosine(), schedule.edm()
VARIANCES = {"fixed_small": None, "fixed_large": None, "learned": LearnedVariance, "learned_range": LearnedRange}


def given(value):
    """Noise of one value everywhere."""
    return lambda key, x, t, s: jnp.full_like(x, value)


@pytest.mark.parametrize("used", [COSINE, schedule.rectified_flow(), EDM], ids=lambda used: type(used).__name__)
def test_a_learned_variance_that_is_the_true_one_is_exact_in_three_steps(used):
    step, data = 0.25, Gaussian(used, MEAN, VARIANCE)

    def denoise(x, t):
        _, exact = data.reverse(x, t, t - step)
        return LearnedVariance(data.denoise(x, t), jnp.log(exact))

    times = np.asarray([0.9, 0.65, 0.4, 0.15])
    law = exact_laws(solver.ddpm(used, variance="learned"), used, [times], denoise=denoise)[0]
    assert law == pytest.approx(true_law(used, times[0], times[-1]), rel=1e-9)
    small = exact_laws(solver.ddpm(used), used, [times], denoise=data.denoise)[0]
    assert small.variance < 0.97 * law.variance  # so the variance matters


def test_a_learned_range_and_the_variance_it_stands_for_take_the_same_step():
    t, s, x, fraction = jnp.float32(0.7), jnp.float32(0.4), jnp.asarray([[0.3, -1.0]]), 0.3
    large = COSINE.sigma(t) ** 2 - (COSINE.alpha(t) / COSINE.alpha(s) * COSINE.sigma(s)) ** 2
    small = large * (COSINE.sigma(s) / COSINE.sigma(t)) ** 2
    log_variance = fraction * jnp.log(large) + (1 - fraction) * jnp.log(small)
    answers = {
        "learned": LearnedVariance(0.5 * x, jnp.broadcast_to(log_variance, x.shape)),
        "learned_range": LearnedRange(0.5 * x, jnp.full_like(x, fraction)),
    }
    ends = [
        solver.ddpm(COSINE, variance=name, noise=given(1.0)).step(None, lambda x, t, a=a: a, x, t, s, ())[0]
        for name, a in answers.items()
    ]
    np.testing.assert_allclose(ends[0], ends[1], rtol=1e-5)


@pytest.mark.parametrize("wanted", VARIANCES)
def test_every_variance_takes_the_answer_that_belongs_to_it_and_no_other(wanted):
    solve, x = solver.ddpm(COSINE, variance=wanted), jnp.ones((2, 3))
    for kind in dict.fromkeys(VARIANCES.values()):
        denoise = lambda x, t, kind=kind: kind(0.5 * x, 0 * x) if kind else 0.5 * x  # noqa: E731
        run = lambda denoise=denoise: sample.sample(jax.random.key(0), denoise, x, [1.0, 0.5, 0.0], solve)  # noqa: E731
        if kind is VARIANCES[wanted]:
            assert np.isfinite(run()).all()
        else:
            with pytest.raises(errors.ConfigError, match=f'variance "{wanted}" needs a denoiser that returns'):
                run()


def test_guidance_moves_the_estimate_and_leaves_a_learned_variance():
    learned = lambda x, t: LearnedVariance(3 * x, 0.1 * x)  # noqa: E731
    x, t = jnp.ones((2, 3)), jnp.float32(0.5)
    for guided, x0 in ((guide.threshold_static(learned), 1.0), (guide.cfg(learned, learned, 2.0), 3.0)):
        answer = guided(x, t)
        np.testing.assert_allclose(answer.x0, x0)
        np.testing.assert_allclose(answer.log_variance, 0.1)


def spans_of(make, times):
    """(t, s) of each draw that a solver asks `noise` for, and where its run ends."""
    spans = []

    def noise(key, x, t, s):
        spans.append((round(float(t), 3), round(float(s), 3)))
        return jnp.ones_like(x)

    x = jnp.zeros((1, 1))
    with jax.disable_jit():
        end = sample.sample(jax.random.key(0), Gaussian(EDM, 0.0, VARIANCE).denoise, x, times, make(noise))
    return spans, float(end[0, 0])


def time_of(sigma):
    return round(float(EDM.inverse(jnp.float32(-2 * np.log(sigma)))), 3)


def test_langevin_moves_follow_the_noise_given():
    # Song & Ermon 2019, Algorithm 1, with z = 1, at alpha = 1: x + (delta / 2) score + sqrt(delta) z.
    times, r, x = [time_of(v) for v in (5.0, 2.0, 0.5)], 0.3, 0.0
    spans, end = spans_of(lambda noise: solver.annealed_langevin(EDM, step_size=r, num_moves=2, noise=noise), times)
    assert spans == [(times[1], times[1])] * 2 + [(times[2], times[2])] * 2
    for t in times[1:]:
        sigma = float(EDM.sigma(jnp.float32(t)))
        for _ in range(2):
            x = x - r * sigma**2 / 2 * x / (VARIANCE + sigma**2) + np.sqrt(r) * sigma
    assert end == pytest.approx(x, rel=1e-5)


def test_the_corrector_follows_the_noise_given_and_the_predictor_its_own():
    times = [time_of(v) for v in (5.0, 2.0, 0.5)]
    make = lambda noise: solver.predictor_corrector(EDM, solver.ddim(EDM, eta=1.0, noise=noise), noise=noise)  # noqa: E731
    spans, _ = spans_of(make, times)
    assert spans == [(times[0], times[1]), (times[1],) * 2, (times[1], times[2]), (times[2],) * 2]
    silent = lambda noise: solver.predictor_corrector(EDM, solver.ddim(EDM), snr=1e-4, noise=given(0.0))  # noqa: E731
    plain = sample.sample(
        jax.random.key(0), Gaussian(EDM, 0.0, VARIANCE).denoise, jnp.zeros((1, 1)), times, solver.ddim(EDM)
    )
    assert spans_of(silent, times)[1] == pytest.approx(float(plain[0, 0]), abs=1e-6)


def test_a_restart_follows_the_noise_given_on_its_way_up():
    times = [time_of(v) for v in (5.0, 2.0, 0.5, 0.2)]
    make = lambda noise: solver.restart(EDM, solver.ddim(EDM), sigma_range=(0.6, 2.0), repeats=3, noise=noise)  # noqa: E731
    spans, _ = spans_of(make, times)
    assert spans == [(times[2], times[1])] * 3


@pytest.mark.parametrize("name", ["predictor_corrector", "annealed_langevin", "restart"])
def test_a_brownian_path_leaves_moves_and_restarts_their_own_noise(name):
    # All the noise is there: with a path the law is the same as without.
    path, times = solver.brownian_path(jax.random.key(5), EDM), sample.karras_grid(EDM, 12, sigma_min=0.05)[:-1]
    make = {
        "predictor_corrector": lambda **noise: solver.predictor_corrector(
            EDM, solver.ddim(EDM, eta=1.0, **noise), snr=0.3, num_moves=3, **noise
        ),
        "annealed_langevin": lambda **noise: solver.annealed_langevin(EDM, step_size=0.5, **noise),
        "restart": lambda **noise: solver.restart(EDM, solver.ddim(EDM), sigma_range=(0.2, 2.0), **noise),
    }[name]
    data, x = Gaussian(EDM, MEAN, VARIANCE), 80.0 * jax.random.normal(jax.random.key(1), (1024, 1))
    ends = [
        jax.jit(lambda key, solve=solve: sample.sample(key, data.denoise, x, times, solve))(jax.random.key(2))
        for solve in (make(), make(noise=path))
    ]
    one, other = (float(np.var(end)) for end in ends)
    assert abs(one / other - 1) < 4 * 2 / np.sqrt(1024)  # four standard errors of the logarithm of the ratio


def asks_above(used):
    """The other inversion: it asks at (x_t, s) in every step, as diffusers' DDIMInverseScheduler."""

    def step(key, denoise, x, t, s, memory):
        eps = (x - used.alpha(s) * denoise(x, s)) / used.sigma(s)
        return used.alpha(s) * (x - used.sigma(t) * eps) / used.alpha(t) + used.sigma(s) * eps, memory

    return Solver(lambda x: (), step, upward=True)


@pytest.mark.parametrize("used", [COSINE, schedule.rectified_flow(), EDM], ids=lambda used: type(used).__name__)
def test_inversion_comes_back_ten_times_nearer_than_one_that_asks_above_with_x_t(used):
    data, x0 = Gaussian(used, MEAN, VARIANCE), jnp.linspace(-1.0, 1.0, 5)[:, None]
    times = sample.karras_grid(used, 100)[1:]

    def error(solve):
        latent = sample.invert(data.denoise, x0, times, solve)
        again = sample.sample(jax.random.key(0), data.denoise, latent, times, solver.ddim(used))
        exact = data.flow(x0, 0.0, times[0])
        return jnp.abs(latent - exact).max() / jnp.abs(exact).max(), jnp.abs(again - x0).max()

    ours, above = jax.jit(lambda: [error(solve) for solve in (solver.ddim_inversion(used), asks_above(used))])()
    assert ours[0] < 0.05
    assert 10 * ours[1] < above[1]


def test_inversion_is_the_fixed_point_iteration_in_numpy():
    # DDIM from x_s to x_t, solved for x_s: x_s = alpha_s (x_t - sigma_t e) / alpha_t + sigma_s e, e = eps(x_s, s).
    times = [0.0, 0.1, 0.3, 0.6]
    alpha, sigma = (np.asarray(f(jnp.float32(times)), np.float64) for f in (COSINE.alpha, COSINE.sigma))
    x, eps = np.array([[0.4], [-1.1]]), 0.0
    for a, b, c, d in zip(alpha[:-1], sigma[:-1], alpha[1:], sigma[1:], strict=True):
        guess = c * (x - b * eps) / a + d * eps
        eps = d * (guess - c * MEAN) / (c**2 * VARIANCE + d**2)  # (x - alpha D) / sigma of a Gaussian
        x = c * (x - b * eps) / a + d * eps
    data = Gaussian(COSINE, MEAN, VARIANCE)
    ours = sample.invert(data.denoise, jnp.asarray([[0.4], [-1.1]]), times[::-1], solver.ddim_inversion(COSINE))
    np.testing.assert_allclose(ours, x, rtol=1e-5)


@pytest.mark.parametrize("name", solver.ALL)
def test_only_an_inversion_goes_up(name):
    with pytest.raises(errors.ConfigError, match="ddim_inversion"):
        sample.invert(lambda x, t: x, jnp.zeros((1, 1)), [1.0, 0.0], solver.ALL[name](COSINE))


def test_and_only_up():
    with pytest.raises(errors.ConfigError, match=r"sample\.invert"):
        sample.sample(jax.random.key(0), lambda x, t: x, jnp.zeros((1, 1)), [1.0, 0.0], solver.ddim_inversion(COSINE))
