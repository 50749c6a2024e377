"""Time grids against their formulas, on every schedule, from 1 to 1000 steps."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from jaxdiff import errors, sample, schedule
from tests.oracles.schedules import ALL

COSINE, EDM, FLOW, TABLE = schedule.cosine(), schedule.edm(), schedule.rectified_flow(), schedule.ddpm_table()
SHIFTED = {
    "shift_down": schedule.shift(FLOW, time=0.2),
    "shift_cosine": schedule.shift(COSINE, logsnr=3.0),
    "edm_wide": schedule.edm(sigma_max=700.0),
    "vp_steep": schedule.vp(beta_min=0.01, beta_max=40.0),
    "four_betas": schedule.from_betas([0.1, 0.2, 0.5, 0.9]),
}
EVERY = ALL | SHIFTED


def sigmas(used, times):
    """sigma / alpha at the times, in float64."""
    with jax.enable_x64(True):
        t = jnp.asarray(times)
        return np.asarray(used.sigma(t) / used.alpha(t))


def faults(times, num_steps):
    """What is wrong with a grid."""
    found = []
    if times.dtype != np.float64 or times.shape != (num_steps + 1,):
        return [f"{times.dtype}{times.shape}"]
    if (times[0], times[-1]) != (1.0, 0.0):
        found.append("ends")
    if not (np.diff(times.astype(np.float32)) < 0).all():
        found.append("order in float32")
    return found


@pytest.mark.parametrize("schedule_name", EVERY)
@pytest.mark.parametrize("name", sample.GRIDS)
def test_grids_decrease_from_one_to_zero_in_exactly_the_steps_asked_for(name, schedule_name):
    for num_steps in (1, 2, 3, 10, 50, 1000):  # at 50 steps a beta grid rounded to training times has equal ones
        assert faults(sample.GRIDS[name](EVERY[schedule_name], num_steps), num_steps) == [], num_steps


def test_that_check_can_fail():
    assert faults(np.array([1.0, 0.5, 0.0]), 3) == ["float64(3,)"]
    assert faults(np.array([0.9, 0.5, 0.0]), 2) == ["ends"]
    assert faults(np.array([1.0, 0.5, 0.5 - 1e-9, 0.0]), 3) == ["order in float32"]


def test_times_that_float32_cannot_tell_apart_are_refused():
    with pytest.raises(errors.ConfigError, match="in float32"):
        sample.beta_t_grid(FLOW, 1000, alpha=0.2, beta=0.2)
    with pytest.raises(errors.ConfigError, match="in float32"):
        sample.flow_shift_grid(FLOW, 1000, shift=1e8)


def test_karras_grid_is_equation_five():
    n = np.arange(18)
    truth = (80 ** (1 / 7) + n / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    np.testing.assert_allclose(sigmas(EDM, sample.karras_grid(EDM, 18)), np.append(truth, 0), rtol=1e-10)


def test_log_grids_are_uniform_in_log_snr():
    ends = np.log([80, 0.002])
    for used in (EDM, FLOW):
        log_snr, exponential = sample.log_snr_grid(used, 8)[1:-1], sample.exponential_grid(used, 8)[1:-1]
        np.testing.assert_allclose(np.log(sigmas(used, log_snr)), np.linspace(*ends, 9)[1:-1], rtol=1e-9)
        np.testing.assert_allclose(np.log(sigmas(used, exponential)), np.linspace(*ends, 8)[1:], rtol=1e-9)


def test_the_range_is_narrowed_to_what_the_schedule_reaches():
    narrow = schedule.ve(sigma_min=0.1, sigma_max=10.0)  # ends at sigma = 0.1
    np.testing.assert_allclose(sigmas(narrow, sample.exponential_grid(narrow, 4)), 10.0 ** np.linspace(1, -1, 5))
    np.testing.assert_allclose(sigmas(narrow, sample.log_snr_grid(narrow, 4)), 10.0 ** np.linspace(1, -1, 5))
    np.testing.assert_allclose(sigmas(narrow, sample.karras_grid(narrow, 2, rho=1.0)), [10.0, 5.05, 0.1])
    np.testing.assert_allclose(sigmas(narrow, sample.beta_sigma_grid(narrow, 2)), [10.0, 5.05, 0.1])


def test_respacing_visits_the_training_times():
    grid = lambda spacing, n: sample.respaced_grid(TABLE, n, spacing=spacing)  # noqa: E731
    for spacing in ("leading", "linspace", "trailing"):
        np.testing.assert_allclose(grid(spacing, 1000), np.append(TABLE.time(np.arange(999, -1, -1)), 0), rtol=1e-12)
    # The indices that Lin et al. (2024, table 2) and DDPM code give for 10 of 1000.
    np.testing.assert_allclose(grid("leading", 10)[:-1], TABLE.time(np.arange(900, -1, -100)))
    np.testing.assert_allclose(grid("trailing", 10)[:-1], TABLE.time(np.arange(999, 0, -100)))
    np.testing.assert_allclose(grid("linspace", 10)[:-1], TABLE.time(np.arange(999, -1, -111)))
    np.testing.assert_allclose(grid("quadratic", 4), [1.0, 0.5625, 0.25, 0.0625, 0.0])


@pytest.mark.parametrize("shift", [0.3, 1.0, 3.0])
def test_flow_shift_is_a_uniform_grid_on_the_shifted_schedule(shift):
    times = sample.flow_shift_grid(FLOW, 20, shift=shift)
    t = np.linspace(1, 0, 21)
    np.testing.assert_allclose(times, shift * t / (1 + (shift - 1) * t), rtol=1e-14)  # Esser et al., eq. 23
    moved = schedule.shift(FLOW, time=shift)
    np.testing.assert_allclose(sigmas(FLOW, times[1:]), sigmas(moved, sample.uniform_grid(moved, 20))[1:], rtol=1e-12)


def test_dynamic_shift_is_the_exponential_shift_of_flux():
    t = np.linspace(1, 0, 11)[:-1]
    for tokens, mu in ((256, 0.5), (1024, 0.63), (4096, 1.15), (8192, 1.15 + 0.65 * 4096 / 3840)):
        truth = np.exp(mu) / (np.exp(mu) + (1 / t - 1))
        np.testing.assert_allclose(sample.dynamic_shift_grid(FLOW, 10, tokens=tokens)[:-1], truth, rtol=1e-12)
    other = sample.dynamic_shift_grid(FLOW, 4, tokens=30, base_tokens=10, max_tokens=50, base_mu=0.0, max_mu=2.0)
    np.testing.assert_allclose(other, sample.flow_shift_grid(FLOW, 4, shift=float(np.e)), rtol=1e-12)


def test_beta_grids_are_quantiles():
    u = np.linspace(1, 0, 13)
    np.testing.assert_allclose(sample.beta_t_grid(FLOW, 12), scipy.stats.beta.ppf(u, 0.6, 0.6), rtol=1e-9)
    # Closed forms: Beta(1, 1) is uniform, Beta(1/2, 1/2) the arcsine law, Beta(1, b) has F(u) = 1 - (1 - u)^(1/b).
    for (alpha, beta), truth in {
        (1.0, 1.0): u,
        (0.5, 0.5): np.sin(np.pi * u / 2) ** 2,
        (1.0, 3.0): 1 - (1 - u) ** (1 / 3),
    }.items():
        np.testing.assert_allclose(sample.beta_t_grid(FLOW, 12, alpha=alpha, beta=beta), truth, rtol=1e-9, atol=1e-15)
        in_sigma = sample.beta_sigma_grid(EDM, 13, alpha=alpha, beta=beta)
        np.testing.assert_allclose(sigmas(EDM, in_sigma), np.append(0.002 + truth * (80 - 0.002), 0), rtol=1e-9)


@pytest.mark.parametrize(
    ("table", "indices"),
    [
        ("sd1", [999, 850, 736, 645, 545, 455, 343, 233, 124, 24]),
        ("sdxl", [999, 845, 730, 587, 443, 310, 193, 116, 53, 13]),
    ],
)
def test_align_your_steps_visits_the_training_times_that_its_authors_list(table, indices):
    used = schedule.scaled_linear()
    np.testing.assert_allclose(sample.ays_grid(used, 10, table=table)[:-1], used.time(indices), atol=1e-9)


def test_align_your_steps_is_log_linear_between_its_steps():
    used = EVERY["edm_wide"]
    ten, twenty = (sigmas(used, sample.ays_grid(used, n, table="svd")) for n in (10, 20))
    np.testing.assert_allclose(ten, [700, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0], rtol=1e-9)
    np.testing.assert_allclose(twenty[::2], ten, rtol=1e-9)
    np.testing.assert_allclose(twenty[1:-2:2], np.sqrt(ten[:-2] * ten[1:-1]), rtol=1e-9)
    np.testing.assert_allclose(twenty[-2], np.sqrt(0.034 * 0.002), rtol=1e-9)  # the table's own end, before t = 0


def test_align_your_steps_divides_the_part_that_a_schedule_reaches():
    narrow = schedule.ve(sigma_min=0.034, sigma_max=54.5)  # steps 1 to 9 of the table, ends above 0
    got = sigmas(narrow, sample.ays_grid(narrow, 8, table="svd"))
    np.testing.assert_allclose(got, [54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034], rtol=1e-9)


@pytest.mark.parametrize("make", [sample.karras_grid, sample.beta_sigma_grid, sample.ays_grid])
def test_a_grid_may_be_made_inside_jit(make):
    inside = jax.jit(lambda x: x + jnp.asarray(make(COSINE, 3), jnp.float32))(jnp.zeros(4))
    np.testing.assert_allclose(inside, make(COSINE, 3), rtol=1e-6)


@pytest.mark.parametrize("name", sample.GRIDS)
@pytest.mark.parametrize("num_steps", [0, -1, 2.0, True, "3"])
def test_bad_step_counts_are_refused(name, num_steps):
    with pytest.raises(errors.ConfigError, match="num_steps must be an integer >= 1"):
        sample.GRIDS[name](COSINE, num_steps)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: sample.karras_grid(COSINE, 3, rho=0.0), "rho"),
        (lambda: sample.karras_grid(COSINE, 3, sigma_min=3.0, sigma_max=2.0), "sigma_min"),
        (lambda: sample.log_snr_grid(COSINE, 3, sigma_min=0.0), "sigma_min"),
        (lambda: sample.exponential_grid(schedule.ve(), 3, sigma_min=60.0, sigma_max=70.0), "no noise level"),
        (lambda: sample.respaced_grid(COSINE, 3, spacing="leadin"), "leading"),
        (lambda: sample.respaced_grid(COSINE, 1001), "num_train_steps"),
        (lambda: sample.flow_shift_grid(FLOW, 3, shift=0.0), "shift must be"),
        (lambda: sample.flow_shift_grid(FLOW, 3, shift=float("inf")), "shift must be"),
        (lambda: sample.dynamic_shift_grid(FLOW, 3, tokens=0), "tokens"),
        (lambda: sample.dynamic_shift_grid(FLOW, 3, base_tokens=4096), "base_tokens"),
        (lambda: sample.beta_t_grid(FLOW, 3, alpha=0.0), "alpha and beta"),
        (lambda: sample.beta_sigma_grid(FLOW, 3, beta=float("nan")), "alpha and beta"),
        (lambda: sample.beta_sigma_grid(FLOW, 3, sigma_min=-1.0), "sigma_min"),
        (lambda: sample.ays_grid(FLOW, 3, table="sd2"), "sd1, sdxl, svd"),
        (lambda: sample.ays_grid(schedule.ve(sigma_min=20.0), 3), "no noise level"),
    ],
)
def test_bad_grid_settings_are_refused(call, words):
    with pytest.raises(errors.ConfigError, match=words):
        call()


def test_every_grid_is_another():
    grids = [make(FLOW, 10) for make in sample.GRIDS.values()]
    for a, b in itertools.combinations(range(len(grids)), 2):
        same = {list(sample.GRIDS)[a], list(sample.GRIDS)[b]} == {"uniform", "respaced"}  # "trailing", by default
        assert same == np.allclose(grids[a], grids[b])
