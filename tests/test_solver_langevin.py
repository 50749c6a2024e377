"""Langevin moves, predictor-corrector, restarts and SA-Solver: printed algorithms in NumPy, exact laws, refusals."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import errors, sample, schedule, solver
from jaxdiff.solver.langevin import langevin
from jaxdiff.types import Solver
from tests.oracles.gaussian import Gaussian
from tests.oracles.moments import exact_laws, law_errors, true_law, weak_order
from tests.oracles.sampling import MEAN, VARIANCE, smooth_grid


def levels(used, times):
    """(alpha, sigma) at `times`, float64."""
    with jax.enable_x64(True):
        return np.asarray(used.alpha(jnp.asarray(times))), np.asarray(used.sigma(jnp.asarray(times)))


@pytest.mark.parametrize("used", [schedule.edm(), schedule.cosine()], ids=["edm", "cosine"])
def test_annealed_langevin_has_the_variance_of_algorithm_1(used):
    # Song & Ermon 2019, Algorithm 1, alpha_i = e sigma_i^2 / sigma_L^2, in the variance of N(0.3, 0.25); then denoised.
    r, moves, times = 0.3, 4, sample.uniform_grid(used, 12)
    alpha, sigma = levels(used, times)
    variance = alpha[0] ** 2 * VARIANCE + sigma[0] ** 2
    for n in range(1, len(times) - 1):
        variance *= (alpha[n] / alpha[n - 1] if alpha[n - 1] > 0 else sigma[n] / sigma[n - 1]) ** 2
        total = alpha[n] ** 2 * VARIANCE + sigma[n] ** 2
        delta = r * sigma[n] ** 2
        for _ in range(moves):
            variance = (1 - delta / (2 * total)) ** 2 * variance + delta
    variance *= (alpha[-2] * VARIANCE / (alpha[-2] ** 2 * VARIANCE + sigma[-2] ** 2)) ** 2
    law = exact_laws(solver.annealed_langevin(used, step_size=r, num_moves=moves), used, [times], draws=12 * moves)[0]
    assert law.variance == pytest.approx(variance, rel=1e-9)


@pytest.mark.parametrize("name", ["cosine", "edm"])
def test_denser_levels_bring_annealed_langevin_to_the_truth(name):
    used = getattr(schedule, name)()
    grids = [sample.log_snr_grid(used, n) for n in (20, 40, 80)]
    make = partial(solver.annealed_langevin, step_size=0.5)
    errs = [law.variance for law in law_errors(make(used), used, grids, draws=400)]
    assert errs[0] > 1.6 * errs[1] > 2.5 * errs[2]
    assert errs[2] < 0.15 * VARIANCE


def test_a_langevin_move_is_euler_maruyama_on_the_score():
    used, r = schedule.cosine(), 0.1
    data = Gaussian(used, MEAN, VARIANCE)
    keys, x, t = jax.random.split(jax.random.key(0), 4096), jnp.full((4096, 1), 0.9), jnp.float32(0.4)
    moved = np.asarray(langevin(keys, used, data.denoise, x, t, r, 1), np.float64)[:, 0]
    delta = r * float(used.sigma(t)) ** 2
    mean = 0.9 + delta / 2 * float(data.score(x[:1], t)[0, 0])
    assert abs(moved.mean() - mean) < 4 * np.sqrt(delta / 4096)
    assert moved.var() == pytest.approx(delta, rel=0.1)


def test_predictor_corrector_is_the_predictor_and_then_moves():
    # Variances by hand: DDIM is linear, a move too. Song et al., Algorithm 4: x + e score + sqrt(2 e) z.
    used, snr, moves = schedule.edm(), 0.3, 2
    times = np.asarray(smooth_grid(used, 6))
    alpha, sigma = levels(used, times)
    variance = alpha[0] ** 2 * VARIANCE + sigma[0] ** 2
    for a, b in itertools.pairwise(sigma):
        variance *= (VARIANCE / (VARIANCE + a**2) * (1 - b / a) + b / a) ** 2
        for _ in range(moves):
            e = 2 * (snr * b) ** 2
            variance = (1 - e / (VARIANCE + b**2)) ** 2 * variance + 2 * e
    make = solver.predictor_corrector(used, solver.ddim(used), snr=snr, num_moves=moves)
    assert exact_laws(make, used, [times], draws=12)[0].variance == pytest.approx(variance, rel=1e-9)


def test_the_corrector_repairs_a_coarse_predictor():
    used, grid = schedule.cosine(), [smooth_grid(schedule.cosine(), 30)]
    alone = law_errors(solver.ddim(used), used, grid)[0].variance
    with_moves = solver.predictor_corrector(used, solver.ddim(used), snr=0.2, num_moves=4)
    assert law_errors(with_moves, used, grid, draws=120)[0].variance < 0.6 * alone


def flow_solver(used):
    """The exact flow of the Gaussian as a solver: what is left is the wrapper."""
    data = Gaussian(used, MEAN, VARIANCE)
    return Solver(lambda x: (), lambda key, denoise, x, t, s, memory: (data.flow(x, t, s), memory))


@pytest.mark.parametrize("name", ["cosine", "edm", "rectified_flow"])
def test_restarts_around_the_exact_flow_keep_the_exact_law_and_do_forget(name):
    used = getattr(schedule, name)()
    times = np.linspace(0.9, 0.05, 6)
    without = exact_laws(flow_solver(used), used, [times])[0]
    law = exact_laws(solver.restart(used, flow_solver(used), sigma_range=(0.3, 2.0), repeats=3), used, [times])[0]
    truth = true_law(used, times[0], times[-1])
    assert (law.mean, law.variance) == pytest.approx((truth.mean, truth.variance), rel=1e-9)
    # One turn keeps Cov(x_max, x_min) / Var[x_min] of the start, and the flow carries the rest: less each time.
    assert law.gain < 0.2 * without.gain


def test_a_restart_happens_once_where_the_level_is_passed_and_not_at_clean_data():
    used = schedule.edm()
    make = solver.restart(used, solver.heun(used), sigma_range=(0.5, 2.0), repeats=2, num_steps=3)
    # 4 steps of Heun (the last asks once), and 2 turns of 3 steps of 2 calls.
    times = [float(used.inverse(jnp.float32(-2 * np.log(v)))) for v in (5.0, 1.0, 0.4, 0.1)]
    assert sample.nfe(make, [*times, 0.0]) == 7 + 12
    assert sample.nfe(make, [times[0], 0.0]) == 1


@pytest.mark.parametrize(("tau", "num_steps"), [(0.0, 400), (1.0, 200)])
def test_sa_solver_is_of_order_two_in_law_at_least(tau, num_steps):
    used = schedule.edm()
    assert weak_order(partial(solver.sa_solver, tau=tau), used, num_steps=num_steps) > 1.85
    if tau == 1:
        assert law_errors(solver.sa_solver(used), used, [smooth_grid(used, 8)])[0].gain < 1e-12


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda used: solver.annealed_langevin(used, step_size=0.0), "step_size must.*0.0"),
        (lambda used: solver.annealed_langevin(used, step_size=2.5), "step_size must.*2.5"),
        (lambda used: solver.annealed_langevin(used, num_moves=0), "num_moves must.*0"),
        (lambda used: solver.predictor_corrector(used, solver.ddim(used), snr=1.0), "snr"),
        (lambda used: solver.predictor_corrector(used, solver.ddim(used), snr=-0.1), "snr"),
        (lambda used: solver.restart(used, solver.heun(used), sigma_range=(1.0, 0.5)), "low < high"),
        (lambda used: solver.restart(used, solver.heun(used), sigma_range=(1.0, np.inf)), "low < high < inf"),
        (lambda used: solver.restart(used, solver.heun(used), repeats=0), "repeats must be an integer >= 1, got 0"),
        (lambda used: solver.sa_solver(used, tau=-1.0), "tau must.*-1"),
    ],
)
def test_unusable_settings_are_refused(call, words):
    with pytest.raises(errors.ConfigError, match=words):
        call(schedule.cosine())
