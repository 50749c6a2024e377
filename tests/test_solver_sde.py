"""Solvers of the reverse SDE: exact laws and their orders, and k-diffusion's own form where it is another one.

That each is the algorithm of its paper is tested in `test_printed`.
"""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import errors, schedule, solver
from jaxdiff.types import Solver
from tests.oracles.gaussian import Gaussian
from tests.oracles.moments import exact_laws, law_errors, true_law, weak_order
from tests.oracles.sampling import smooth_grid

SIGMAS = np.array([80.0, 20.0, 6.0, 1.5, 0.4, 0.1])
DRAWS = np.random.default_rng(0).normal(size=(2 * len(SIGMAS), 2, 1))
START = np.array([[-40.0], [75.0]])


def denoised(x, sigma):
    """E[x0 | x] of N(0.3, 0.25) at alpha = 1."""
    return 0.3 + 0.25 / (0.25 + sigma**2) * (x - 0.3)


def from_list():
    """A `noise` that hands out DRAWS one after the other."""
    draws = iter(DRAWS)
    return lambda key, x, t, s: jnp.asarray(next(draws), x.dtype)


def run(solve, used, times, x, denoise=None):
    """The solver's steps one by one, outside any jit, in float64."""
    denoise = denoise or Gaussian(used, 0.3, 0.25).denoise
    x = jnp.asarray(x, jnp.float64)
    memory = solve.init(x)
    for n, (t, s) in enumerate(itertools.pairwise(times)):
        keys = jax.random.split(jax.random.key(n), x.shape[0])
        x, memory = solve.step(keys, denoise, x, jnp.asarray(t), jnp.asarray(s), memory)
    return np.asarray(x)


def run_edm(make, **settings):
    """`run` on EDM's process at SIGMAS, with noise from DRAWS, without a compilation for conditionals."""
    with jax.enable_x64(True), jax.disable_jit():
        used = schedule.edm()
        times = np.asarray(used.inverse(jnp.asarray(-2 * np.log(SIGMAS))))
        return run(make(used, noise=from_list(), **settings), used, times, START)


def ancestral_step(sigma, following, eta):
    up = min(following, eta * (following**2 * (sigma**2 - following**2) / sigma**2) ** 0.5)
    return (following**2 - up**2) ** 0.5, up


@pytest.mark.parametrize("eta", [0.6, 1.0])
def test_ddim_is_k_diffusions_euler_ancestral_at_every_eta(eta):
    x = START
    for n, (sigma, following) in enumerate(itertools.pairwise(SIGMAS)):
        down, up = ancestral_step(sigma, following, eta)
        x = x + (x - denoised(x, sigma)) / sigma * (down - sigma) + up * DRAWS[n]
    np.testing.assert_allclose(run_edm(solver.ddim, eta=eta), x, rtol=1e-8)


def test_dpmpp_sde_is_the_published_algorithm():
    # k-diffusion's sample_dpmpp_sde at r = 1/2, eta = 1; its two draws are increments of one path over [t, m], [t, s].
    x = START
    for n, (sigma, following) in enumerate(itertools.pairwise(SIGMAS)):
        middle = np.sqrt(sigma * following)
        first, second = DRAWS[2 * n : 2 * n + 2]
        down, up = ancestral_step(sigma, middle, 1.0)
        x_2 = down / sigma * x + (1 - down / sigma) * denoised(x, sigma) + first * up
        down, _ = ancestral_step(sigma, following, 1.0)
        whole = first * up * (following / middle) ** 2  # what is left of it at the lower level
        whole = whole + second * ancestral_step(middle, following, 1.0)[1]
        x = down / sigma * x + (1 - down / sigma) * denoised(x_2, middle) + whole
    np.testing.assert_allclose(run_edm(solver.dpmpp_sde), x, rtol=1e-8)


def integral(degree, eta, times, used):
    """One step from times[0] to times[1] of the exact solution for D = lambda^degree, from x = 0, without noise."""
    start, end = (float(used.logsnr(jnp.asarray(t))) / 2 for t in times)
    nodes, weights = np.polynomial.legendre.leggauss(40)
    lam = (start + end) / 2 + (end - start) / 2 * nodes
    kernel = (1 + eta) * np.exp(-(1 + eta) * (end - lam)) * lam**degree
    return float(used.alpha(jnp.asarray(times[1]))) * (end - start) / 2 * (weights @ kernel)


@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("degree", [0, 1, 2])
def test_dpmpp_3m_sde_is_exact_where_the_denoiser_is_quadratic_in_log_snr(degree, eta):
    with jax.enable_x64(True):
        used = schedule.cosine()
        solve = solver.dpmpp_3m_sde(used, eta=eta, noise=lambda key, x, t, s: jnp.zeros_like(x))
        times = [0.8, 0.7, 0.65, 0.4]
        denoise = lambda x, t: jnp.zeros_like(x) + (used.logsnr(t) / 2) ** degree  # noqa: E731
        before = run(solve, used, times[:-1], np.zeros((1, 1)), denoise)
        t, s = times[-2:]
        h = float(used.logsnr(jnp.asarray(s)) - used.logsnr(jnp.asarray(t))) / 2
        decay = float(used.sigma(jnp.asarray(s)) / used.sigma(jnp.asarray(t))) * np.exp(-eta * h)
        after = run(solve, used, times, np.zeros((1, 1)), denoise)
        truth = decay * before + integral(degree, eta, (t, s), used)
    np.testing.assert_allclose(after, truth, rtol=1e-10)


WEAK = {"ddpm": 1, "ddpm_large": 1, "ddim_eta1": 1, "euler_ancestral_rf": 1, "dpmpp_2m_sde": 2, "dpmpp_sde": 2}


@pytest.mark.parametrize("used", [schedule.cosine(), schedule.edm()], ids=lambda used: type(used).__name__)
@pytest.mark.parametrize("name", WEAK)
def test_variance_converges_with_the_order_of_theory(name, used):
    assert weak_order(solver.ALL[name], used, draws_per_step=2) == pytest.approx(WEAK[name], abs=0.1)


@pytest.mark.parametrize("eta", [0.5, 2.0])
@pytest.mark.parametrize("name", ["dpmpp_2m_sde", "dpmpp_sde"])
def test_the_order_in_law_is_two_at_every_eta(name, eta):
    make = partial(solver.ALL[name], eta=eta)
    assert weak_order(make, schedule.cosine(), draws_per_step=2) == pytest.approx(2, abs=0.15)


def test_three_steps_of_memory_beat_two():
    for used in (schedule.cosine(), schedule.edm()):
        grids = [smooth_grid(used, 50)]
        two, three = (law_errors(solver.ALL[f"dpmpp_{k}m_sde"](used), used, grids)[0].variance for k in (2, 3))
        assert three < 0.7 * two


@pytest.mark.parametrize("name", ["ddpm", "ddim_eta1", "dpmpp_2m_sde", "dpmpp_3m_sde", "dpmpp_sde"])
def test_reverse_diffusion_forgets_its_start_exactly_as_it_should(name):
    # E[D(x_s, s) | x_t] = D(x_t, t): with all its noise, the gain is exact at any number of steps.
    used = schedule.cosine()
    for num_steps in (1, 3, 8):
        errors_of = law_errors(solver.ALL[name](used), used, [smooth_grid(used, num_steps)], draws=2 * num_steps)[0]
        assert max(errors_of.gain, errors_of.mean) < 1e-12


def test_rectified_flow_ancestral_tends_to_the_reverse_diffusion():
    used = schedule.rectified_flow()
    grids = [smooth_grid(used, n) for n in (50, 100)]
    coarse, fine = law_errors(solver.euler_ancestral_rf(used), used, grids)
    assert np.log2(coarse.gain / fine.gain) == pytest.approx(1, abs=0.1)


def test_one_ddpm_step_has_the_law_of_the_true_kernel_but_for_the_uncertainty_of_x0():
    with jax.enable_x64(True):
        used, times = schedule.cosine(), np.array([0.8, 0.3])
        law, truth = exact_laws(solver.ddpm(used), used, [times])[0], true_law(used, *times)
        share = float(used.alpha(jnp.asarray(0.3)) * -jnp.expm1(used.logsnr(jnp.asarray(0.8)) - used.logsnr(0.3)))
        missing = share**2 * float(Gaussian(used, 0.3, 0.25).posterior_variance(jnp.zeros((1,)), 0.8)[0])
    assert law.variance == pytest.approx(truth.variance - missing, rel=1e-6)


def altered(make, change):
    """A solver whose noise is multiplied by `change`, or (a callable) whose denoiser's answers are."""

    def build(used):
        inner = make(used)

        def step(key, denoise, x, t, s, memory):
            return inner.step(key, lambda x, t: change * denoise(x, t), x, t, s, memory)

        return Solver(inner.init, step)

    return build


def test_the_exact_laws_catch_a_broken_coefficient():
    used, grid = schedule.cosine(), [smooth_grid(schedule.cosine(), 200)]
    assert law_errors(solver.dpmpp_2m_sde(used), used, grid)[0].variance < 2e-4
    louder = solver.dpmpp_2m_sde(used, noise=lambda key, x, t, s: 1.01 * solver.fresh(key, x, t, s))
    assert law_errors(louder, used, grid)[0].variance > 2e-3
    assert law_errors(altered(solver.dpmpp_2m_sde, 1.01)(used), used, grid)[0].mean > 2e-3


def test_the_exact_laws_refuse_what_is_not_affine_and_count_draws():
    used, grid = schedule.cosine(), [smooth_grid(schedule.cosine(), 3)]
    with pytest.raises(AssertionError, match="not affine"):
        exact_laws(solver.ddpm(used), used, grid, denoise=lambda x, t: jnp.sin(x))
    with pytest.raises(AssertionError, match="draws=6"):
        exact_laws(solver.dpmpp_sde(used), used, grid)


@pytest.mark.parametrize(
    ("make", "value"),
    [
        (solver.dpmpp_2m_sde, -0.1),
        (solver.dpmpp_3m_sde, float("nan")),
        (solver.dpmpp_sde, float("inf")),
        (solver.euler_ancestral_rf, 1.5),
    ],
)
def test_unusable_eta_is_refused(make, value):
    with pytest.raises(errors.ConfigError, match=f"eta must.*{value}"):
        make(schedule.cosine(), eta=value)
