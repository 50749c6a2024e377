"""Solvers against closed forms: order of convergence, moments, exact ends, independence of rows, every step count."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import errors, process, sample, schedule, solver
from jaxdiff.denoise import LearnedRange
from jaxdiff.types import Solver
from tests.oracles import judge, product
from tests.oracles.gaussian import Gaussian
from tests.oracles.sampling import MEAN, VARIANCE, deviations, draw, order, smooth_grid

SMOOTH = {
    "linear": schedule.linear(),
    "cosine": schedule.cosine(),
    "sigmoid": schedule.sigmoid(),
    "sub_vp": schedule.sub_vp(),
    "ve": schedule.ve(),
    "edm": schedule.edm(),
    "rectified_flow": schedule.rectified_flow(),
}
EVERY = SMOOTH | {
    "vp": schedule.vp(),
    "ddpm_table": schedule.ddpm_table(),
    "scaled_linear": schedule.scaled_linear(),
    "zero_terminal_snr": schedule.zero_terminal_snr(schedule.scaled_linear()),
    "shift": schedule.shift(schedule.rectified_flow(), time=3.0),
}
STOCHASTIC = sorted(set(solver.ALL) - set(solver.ORDER))


def some_keys(num, seed=1):
    return jax.random.split(jax.random.key(seed), num)


def noise(used, shape, seed=0):
    return process.prior(jax.random.key(seed), used, shape)


JUDGED = {**solver.ALL, **judge.SETTINGS}


@pytest.mark.parametrize("name", JUDGED)
def test_the_judge_finds_nothing_wrong(name):
    assert judge.judge(JUDGED[name], judge.stated(name)) == []


def test_facts_are_stated_only_of_solvers_that_there_are():
    assert set(judge.STATED) <= set(JUDGED)
    assert all(judge.stated(name).order == solver.ORDER.get(name) for name in solver.ALL)


@functools.cache
def orders(make):
    """The order of convergence on each of SMOOTH, on Gaussian data of three variances, by one compilation."""
    mean, variance = (0.3, -0.5, 0.1), (0.25, 1.0, 0.06)
    x, errors, schedules = np.random.default_rng(0).normal(size=(4, 3)), {}, tuple(SMOOTH.values())
    with jax.enable_x64(True):
        run = jax.jit(product.walk(make, schedules, lambda used, _: Gaussian(used, mean, variance).denoise))
        for (i, (name, used)), num_steps in itertools.product(enumerate(SMOOTH.items()), (256, 512)):
            times = np.append(smooth_grid(used, num_steps, 2.5), np.zeros(512 - num_steps))
            start = x * float(used.sigma(jnp.asarray(times[0])))
            end = run(i, (), np.arange(4), x, times, product.tables(schedules, times), num_steps)
            exact = Gaussian(used, mean, variance).flow(start, times[0], times[num_steps])
            errors.setdefault(name, []).append(float(jnp.abs(end - exact).max()))
    return {name: np.log2(coarse / fine) for name, (coarse, fine) in errors.items()}


@pytest.mark.parametrize("schedule_name", SMOOTH)
@pytest.mark.parametrize("name", solver.ORDER)
def test_order_of_convergence(name, schedule_name):
    stated = judge.stated(name)
    assert stated.order == solver.ORDER[name]
    found = orders(solver.ALL[name])[schedule_name]
    assert solver.ORDER[name] - 0.15 <= found <= (stated.most or solver.ORDER[name]) + 0.15


@pytest.mark.parametrize("schedule_name", ["cosine", "edm"])
@pytest.mark.parametrize("name", STOCHASTIC)
def test_moments(name, schedule_name):
    used = SMOOTH[schedule_name]
    for num_steps in (500, 1000):
        values = draw(solver.ALL[name](used), used, sample.uniform_grid(used, num_steps))
        assert max(deviations(values)) < 3


def test_moments_of_partial_eta():
    used = schedule.cosine()
    for num_steps in (500, 1000):
        assert max(deviations(draw(solver.ddim(used, eta=0.5), used, sample.uniform_grid(used, num_steps)))) < 3


def exact_range(used):
    """A denoiser whose learned variance is that of q(x_s | x_t): with it DDPM is exact in any number of steps."""
    data = Gaussian(used, MEAN, VARIANCE)

    def make(t, s):
        def denoise(x, _):
            _, exact = data.reverse(x, t, s)
            large = used.sigma(t) ** 2 * -jnp.expm1(used.logsnr(t) - used.logsnr(s))
            small = large * (used.sigma(s) / used.sigma(t)) ** 2
            fraction = jnp.log(exact / small) / jnp.log(large / small)
            return LearnedRange(data.denoise(x, t), jnp.broadcast_to(fraction, x.shape))

        return denoise

    return make


@pytest.mark.parametrize("used", [schedule.cosine(), schedule.rectified_flow(), schedule.edm()], ids=repr)
def test_learned_range_with_the_true_variance_is_exact_in_three_steps(used):
    step = jax.jit(
        lambda key, x, t, s: solver.ddpm(used, variance="learned_range").step(
            key, exact_range(used)(t, s), x, t, s, ()
        )[0]
    )
    x = noise(used, (4096, 1))
    times = jnp.asarray([1.0, 0.6, 0.3, 0.1], jnp.float32)
    for n in range(3):
        x = step(some_keys(4096, n + 1), x, times[n], times[n + 1])
    mean, variance = Gaussian(used, MEAN, VARIANCE).moments(x, times[-1])
    assert max(deviations(np.asarray(x, np.float64)[:, 0], float(mean[0, 0]), float(variance[0, 0]))) < 3


def test_one_ddpm_step_has_the_mean_of_the_true_reverse_kernel():
    used = schedule.cosine()
    data = Gaussian(used, MEAN, VARIANCE)
    x, t, s = jnp.full((4096, 1), 0.7), jnp.float32(0.8), jnp.float32(0.3)
    mean, variance = data.reverse(x, t, s)
    # Fixed small lacks what x0 itself is uncertain by: (d mean / d x0)^2 Var[x0 | x_t].
    slope = used.alpha(s) * -jnp.expm1(used.logsnr(t) - used.logsnr(s))
    variance = variance - slope**2 * data.posterior_variance(x, t)
    values, _ = solver.ddpm(used).step(some_keys(4096), data.denoise, x, t, s, ())
    assert max(deviations(np.asarray(values, np.float64)[:, 0], float(mean[0, 0]), float(variance[0, 0]))) < 3


def test_ddim_at_eta_one_is_ddpm_with_fixed_small():
    used = schedule.cosine()
    x, t, s = noise(used, (8, 3)), jnp.float32(0.8), jnp.float32(0.3)
    a, b = (
        make(used).step(some_keys(8), Gaussian(used).denoise, x, t, s, ())[0]
        for make in (solver.ddpm, solver.ALL["ddim_eta1"])
    )
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_inversion_follows_the_flow_with_order_one_and_comes_back_with_order_two():
    there, back = [], []
    with jax.enable_x64(True):
        used = schedule.cosine()
        data = Gaussian(used, MEAN, VARIANCE)
        x0 = jnp.linspace(-1.0, 1.0, 5)[:, None]
        for num_steps in (100, 200):
            times = np.linspace(0.9, 0.0, num_steps + 1)  # down to clean data itself, where sigma is 0
            latent = sample.invert(data.denoise, x0, times, solver.ddim_inversion(used))
            again = sample.sample(jax.random.key(0), data.denoise, latent, times, solver.ddim(used))
            there.append(float(jnp.abs(latent - data.flow(x0, 0.0, 0.9)).max()))
            back.append(float(jnp.abs(again - x0).max()))
    assert np.log2(there[0] / there[1]) == pytest.approx(1, abs=0.15)
    assert np.log2(back[0] / back[1]) == pytest.approx(2, abs=0.15)


@pytest.mark.parametrize("name", solver.ALL)
def test_finite_and_rows_apart_on_every_schedule_and_target_at_every_step_count(name):
    """In float32, with a network of float32 and with one of bfloat16."""
    ends, cases = product.sweep(solver.ALL[name], tuple(EVERY.values()), (1, 2, 3, 50))
    for one, other in ends:
        for end, (i, k, half) in zip(one, cases, strict=True):
            assert np.isfinite(end).all(), (list(EVERY)[i], product.TARGETS[k].name, "bfloat16" * half)
        np.testing.assert_array_equal(one[:, 0], other[:, 0])


@pytest.mark.parametrize("name", solver.ALL)
@pytest.mark.parametrize(
    "used", [schedule.cosine(), schedule.edm(), schedule.ddpm_table()], ids=lambda s: type(s).__name__
)
def test_the_step_to_clean_data_returns_the_denoised(name, used):
    solve = solver.ALL[name](used)
    asked = []

    def denoise(x, t):
        asked.append(x)
        return jnp.sin(7 * x)  # no formula could undo this by accident

    x = noise(used, (3, 2))
    with jax.disable_jit():
        out, _ = solve.step(some_keys(3), denoise, x, jnp.float32(0.02), jnp.float32(0), solve.init(x))
    assert len(asked) == 1
    np.testing.assert_allclose(out, jnp.sin(7 * asked[0]), atol=2e-7)


def broken_heun(used):
    def step(key, denoise, x, t, s, memory):
        x0, eps = solver.predict(used, denoise, x, t)
        euler = used.alpha(s) * x0 + used.sigma(s) * eps
        x0_s, eps_s = solver.predict(used, denoise, euler, s)
        d_alpha, d_sigma = used.alpha(s) - used.alpha(t), used.sigma(s) - used.sigma(t)
        return x + d_alpha * (0.6 * x0 + 0.4 * x0_s) + d_sigma * (0.6 * eps + 0.4 * eps_s), memory

    return Solver(lambda x: (), step)


def broken_2m(used):
    inner = solver.dpmpp_2m(used)

    def step(key, denoise, x, t, s, memory):
        x0_prev, h_prev = memory
        return inner.step(key, denoise, x, t, s, (x0_prev, 2 * h_prev))  # half of the extrapolation

    return Solver(inner.init, step)


def broken_ddim(used):
    def step(key, denoise, x, t, s, memory):
        x0, eps = solver.predict(used, denoise, x, t)
        return used.alpha(t) * x0 + used.sigma(s) * eps, memory  # alpha at the old time

    return Solver(lambda x: (), step)


@pytest.mark.parametrize(("make", "stated"), [(broken_heun, 2), (broken_2m, 2), (broken_ddim, 1)])
def test_the_order_test_catches_a_broken_coefficient(make, stated):
    assert abs(order(make, schedule.cosine()) - stated) > 0.15


def test_the_moment_test_catches_lost_noise_and_a_wrong_variance():
    used = schedule.cosine()
    times = sample.uniform_grid(used, 500)
    right = solver.ddpm(used)

    def scaled(factor):
        def step(key, denoise, x, t, s, memory):
            mean, _, _ = process.q_posterior(used, denoise(x, t), x, t, s)
            return mean + factor * (right.step(key, denoise, x, t, s, memory)[0] - mean), memory

        return Solver(right.init, step)

    assert max(deviations(draw(scaled(1.0), used, times))) < 3
    for factor in (0.0, 0.9, 1.1):
        assert max(deviations(draw(scaled(factor), used, times))) > 3


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda used: solver.ddpm(used, variance="fixed_larg"), "fixed_large"),
        (lambda used: solver.ddim(used, eta=1.5), "1.5"),
        (lambda used: solver.ddim(used, eta=float("nan")), "nan"),
        (lambda used: solver.heun(used, gamma=-0.1), "gamma=-0.1"),
        (lambda used: solver.heun(used, gamma=float("nan")), "gamma=nan"),
        (lambda used: solver.euler(used, gamma=0.1, noise_scale=float("inf")), "noise_scale=inf"),
        (lambda used: solver.heun(used, gamma=0.1, sigma_range=(2.0, 1.0)), "sigma_range"),
    ],
)
def test_unusable_settings_are_refused(call, words):
    with pytest.raises(errors.ConfigError, match=words):
        call(schedule.cosine())


@pytest.mark.parametrize("variance", ["fixed_small", "learned_range"])
def test_learned_range_and_plain_denoisers_are_not_mixed_up(variance):
    used = schedule.cosine()
    x = jnp.zeros((2, 1))
    denoise = (lambda x, t: x) if variance == "learned_range" else (lambda x, t: LearnedRange(x, x))
    with pytest.raises(errors.ConfigError, match="LearnedRange"):
        sample.sample(jax.random.key(0), denoise, x, [1.0, 0.0], solver.ddpm(used, variance=variance))


@pytest.mark.parametrize("name", ["ddim", "euler", "heun", "dpmpp_2m"])
def test_solvers_without_a_model_variance_take_the_mean_of_a_learned_range(name):
    used = schedule.cosine()
    data, x, times = Gaussian(used, MEAN, VARIANCE), noise(used, (2, 3)), sample.uniform_grid(used, 3)
    learned = lambda x, t: LearnedRange(data.denoise(x, t), 0 * x)  # noqa: E731
    a, b = (sample.sample(jax.random.key(0), d, x, times, solver.ALL[name](used)) for d in (data.denoise, learned))
    np.testing.assert_array_equal(a, b)
