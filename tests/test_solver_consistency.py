"""Samplers of distilled networks by the exact flow of Gaussian data, and the adaptive solver by its tolerance."""

import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import errors, process, sample, schedule, solver
from tests.oracles.gaussian import Gaussian
from tests.oracles.moments import exact_laws, true_law
from tests.oracles.sampling import MEAN, VARIANCE, smooth_grid

USED = {"cosine": schedule.cosine(), "edm": schedule.edm(), "rectified_flow": schedule.rectified_flow()}


def trajectory(used, t, landing):
    """D of a trajectory function: the x0 by which a DDIM step from t lands on the flow at `landing`, exactly."""
    data = Gaussian(used, MEAN, VARIANCE)

    def denoise(x, _):
        ratio = used.sigma(landing) / used.sigma(t)
        return (data.flow(x, t, landing) - ratio * x) / (used.alpha(landing) - ratio * used.alpha(t))

    return denoise


def law_of(make, used, times, landing_of):
    """Mean and variance at the end: x stays Gaussian, so a step's law follows from two rows and one normal draw."""
    with jax.enable_x64(True):
        mean, variance, _ = true_law(used, times[0], times[0])
        for t, s in zip(jnp.asarray(times[:-1]), jnp.asarray(times[1:]), strict=True):
            rows = []
            for start, draw in ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0)):
                noise = lambda key, x, t, s, draw=draw: jnp.full_like(x, draw)  # noqa: E731
                x = jnp.full((1, 1), start, jnp.float64)
                denoise = trajectory(used, t, jnp.asarray(landing_of(float(s))))
                keys = jax.random.split(jax.random.key(0), 1)
                rows.append(float(make(used, noise=noise).step(keys, denoise, x, t, s, ())[0][0, 0]))
            mean, variance = rows[0] + (rows[1] - rows[0]) * mean, (rows[1] - rows[0]) ** 2 * variance
            variance += (rows[2] - rows[0]) ** 2
    return mean, variance


@pytest.mark.parametrize("name", USED)
@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_consistency_sampling_is_exact_with_the_consistency_function(num_steps, name):
    used, times = USED[name], np.linspace(1, 0, num_steps + 1)
    law = law_of(solver.consistency, used, times, lambda s: 0.0)
    np.testing.assert_allclose(law, (MEAN, VARIANCE), rtol=1e-9)


@pytest.mark.parametrize("name", USED)
@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_tcd_is_exact_with_the_trajectory_function(gamma, name):
    used, times = USED[name], np.linspace(1, 0, 5)
    law = law_of(lambda used, noise: solver.tcd(used, gamma=gamma, noise=noise), used, times, lambda s: (1 - gamma) * s)
    np.testing.assert_allclose(law, (MEAN, VARIANCE), rtol=1e-9)


def test_a_posterior_mean_is_not_enough_for_consistency_sampling():
    used, times = schedule.cosine(), np.linspace(1, 0, 5)
    with jax.enable_x64(True):
        law = exact_laws(solver.consistency(used), used, [times])[0]
    assert law.variance < 0.5 * VARIANCE  # so it must not be in ALL
    assert not set(solver.DISTILLED) & set(solver.ALL)


@pytest.mark.parametrize("name", solver.DISTILLED)
def test_distilled_samplers_are_finite_from_pure_noise_and_end_at_the_answer(name):
    for used in (USED["cosine"], schedule.zero_terminal_snr(schedule.ddpm_table()), schedule.ve()):
        x = process.prior(jax.random.key(0), used, (3, 2))
        run = jax.jit(lambda x, used=used: sample.sample(
            jax.random.key(1), lambda x, t: jnp.tanh(x), x, [1.0, 0.6, 0.2, 0.0], solver.DISTILLED[name](used)
        ))  # fmt: skip
        a, b = (np.asarray(run(v)) for v in (x, x * jnp.asarray([[1.0], [5.0], [-3.0]])))
        assert np.isfinite(a).all()
        np.testing.assert_array_equal(a[0], b[0])
        if float(used.sigma(jnp.float32(0))) == 0:
            assert np.abs(a).max() <= 1


def solve_adaptively(used, tolerance, x, times=(1.0, 0.0), denoise=None):
    solve = solver.adaptive(used, rtol=tolerance, atol=tolerance)
    denoise = denoise or Gaussian(used, (0.3, -0.5), (0.25, 0.04)).denoise
    return jax.jit(lambda x: sample.sample(jax.random.key(0), denoise, x, list(times), solve))(x)


@pytest.mark.parametrize("name", ["cosine", "edm"])
def test_the_error_of_the_adaptive_solver_follows_the_tolerance(name):
    with jax.enable_x64(True):
        used = USED[name]
        x = process.prior(jax.random.key(0), used, (4, 2), jnp.float64)
        truth = Gaussian(used, (0.3, -0.5), (0.25, 0.04)).flow(x, 1.0, 0.0)
        errs = [float(jnp.abs(solve_adaptively(used, tol, x) - truth).max()) for tol in (1e-4, 1e-7)]
    assert errs[0] < 3e-3
    assert errs[1] < 3e-6


def test_a_finer_grid_and_an_end_above_zero_serve_the_adaptive_solver_too():
    used = schedule.cosine()
    x = process.prior(jax.random.key(0), used, (2, 2))
    data = Gaussian(used, (0.3, -0.5), (0.25, 0.04))
    for times in ((1.0, 0.5, 0.0), smooth_grid(used, 1)):
        truth = data.flow(x, jnp.float32(times[0]), jnp.float32(times[-1]))
        np.testing.assert_allclose(solve_adaptively(used, 1e-5, x, times), truth, atol=2e-3)


def test_adaptive_rows_are_apart_and_the_denoiser_may_be_bound_to_its_batch():
    used = schedule.cosine()
    x = process.prior(jax.random.key(0), used, (3, 2))
    solve, data = solver.adaptive(used), Gaussian(used, 0.0, 0.25)

    @jax.jit
    def run(x, shift):  # `shift` is a tracer of one value per example, as classes or prompts are
        denoise = lambda x, t: data.denoise(x - used.alpha(t).reshape(-1, 1) * shift, t) + shift  # noqa: E731
        return sample.sample(jax.random.key(0), denoise, x, [1.0, 0.0], solve)

    shift = jnp.asarray([[0.1], [-0.2], [0.3]])
    one, other = run(x, shift), run(x * jnp.asarray([[1.0], [9.0], [-5.0]]), shift)
    np.testing.assert_array_equal(one[0], other[0])
    np.testing.assert_allclose(one, shift + 0.5 * x, atol=3e-3)  # the flow of N(shift, 0.25) from N(0, 1)


def test_without_diffrax_the_error_says_what_to_type():
    with mock.patch.dict(sys.modules, {"diffrax": None}), pytest.raises(errors.ConfigError, match=r"jaxdiff\[ode\]"):
        solver.adaptive(schedule.cosine())


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda used: solver.tcd(used, gamma=1.2), "gamma must.*1.2"),
        (lambda used: solver.adaptive(used, rtol=0.0), "rtol and atol.*0.0"),
        (lambda used: solver.adaptive(used, atol=float("nan")), "rtol and atol.*nan"),
    ],
)
def test_unusable_settings_are_refused(call, words):
    with pytest.raises(errors.ConfigError, match=words):
        call(schedule.cosine())
