"""The deterministic solvers beside their papers: each algorithm again in plain NumPy, float64, on one Gaussian problem.

VP with beta(t) = 0.1 + 19.9 t, data N(0.3, 0.25), uneven steps from t = 0.95 to 0. Coefficients are found here in other
ways than there: the linear systems of the paper, integrals by Gauss' rule in 60 points, the printed fractions.
"""

import itertools
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import errors, sample, schedule, solver
from jaxdiff.solver import dpm, multistep
from jaxdiff.solver.polynomial import beyond_first, exponential_moments, phi
from tests.oracles.gaussian import Gaussian

USED = schedule.vp()
TIMES = np.array([0.95, 0.83, 0.76, 0.6, 0.51, 0.37, 0.3, 0.17, 0.08, 0.0])
START = np.array([[-1.4], [0.2], [0.9]])
CASES = {
    "ddim": solver.ddim,
    "midpoint": solver.midpoint,
    "dpm2": solver.dpm2,
    "dpmpp_2s": solver.dpmpp_2s,
    "dpmpp_3m": solver.dpmpp_3m,
    "unipc_2": solver.ALL["unipc_2"],
    "unipc_3": solver.ALL["unipc_3"],
    "unipc_2_bh1": lambda s: solver.unipc(s, variant="bh1"),
    "unipc_3_bh1": lambda s: solver.unipc(s, order=3, variant="bh1"),
    "deis_2": solver.ALL["deis_2"],
    "deis_3": solver.ALL["deis_3"],
    "lms": solver.lms,
    "lms_2": lambda s: solver.lms(s, order=2),
    "plms": solver.plms,
    "pndm": solver.pndm,
    "ipndm": solver.ipndm,
    "ipndm_3": lambda s: solver.ipndm(s, order=3),
}


def alpha_sigma(t):
    log_alpha = -(t**2) * 19.9 / 4 - t * 0.1 / 2
    return np.exp(log_alpha), np.sqrt(-np.expm1(2 * log_alpha))


def half_logsnr(t):
    alpha, sigma = alpha_sigma(t)
    return np.log(alpha / sigma)


def rho(t):
    alpha, sigma = alpha_sigma(t)
    return sigma / alpha


def time_midway(t, s):
    """Where the log-SNR is halfway: by bisection."""
    target, low, high = (half_logsnr(t) + half_logsnr(s)) / 2, s, t
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if half_logsnr(middle) > target else (low, middle)
    return low


def data(x, t):
    alpha, sigma = alpha_sigma(t)
    return 0.3 + 0.25 * alpha / (0.25 * alpha**2 + sigma**2) * (x - 0.3 * alpha)


def noise(x, t):
    alpha, sigma = alpha_sigma(t)
    return (x - alpha * data(x, t)) / sigma


def integral(function, low, high):
    """Gauss' rule in 60 points."""
    points, weights = np.polynomial.legendre.leggauss(60)
    return (high - low) / 2 * np.sum(weights * function((high + low) / 2 + (high - low) / 2 * points))


def lagrange(nodes, j):
    return lambda u: np.prod([(u - node) / (nodes[j] - node) for i, node in enumerate(nodes) if i != j], axis=0)


def transfer(x, eps, t, s):
    """The transfer part of Liu et al. 2022, as they print it, in alpha-bar."""
    bar_t, bar_s = alpha_sigma(t)[0] ** 2, alpha_sigma(s)[0] ** 2
    below = np.sqrt(bar_t) * (np.sqrt((1 - bar_s) * bar_t) + np.sqrt((1 - bar_t) * bar_s))
    return np.sqrt(bar_s / bar_t) * x - (bar_s - bar_t) / below * eps


def every_step(step):
    """The steps of a method over TIMES; the last one, to sigma = 0, is D for all of them."""

    def run():
        xs, past = [START], []
        for t, s in itertools.pairwise(TIMES[:-1]):
            xs.append(step(xs[-1], t, s, past))
        return np.stack([*xs, data(xs[-1], TIMES[-2])])

    return run


def one_step(step):
    return every_step(lambda x, t, s, past: step(x, t, s))


def paper_midpoint(x, t, s):
    middle = (t + s) / 2
    (alpha, sigma), (alpha_m, sigma_m), (alpha_s, sigma_s) = map(alpha_sigma, (t, middle, s))
    x_middle = alpha_m * data(x, t) + sigma_m * noise(x, t)
    return x + (alpha_s - alpha) * data(x_middle, middle) + (sigma_s - sigma) * noise(x_middle, middle)


def paper_dpm2(x, t, s):
    """k-diffusion's sample_dpm_2 in x / alpha, by Karras' sigma = rho."""
    middle = time_midway(t, s)
    x = x / alpha_sigma(t)[0]
    x_middle = x + (rho(middle) - rho(t)) * noise(x * alpha_sigma(t)[0], t)
    x = x + (rho(s) - rho(t)) * noise(x_middle * alpha_sigma(middle)[0], middle)
    return x * alpha_sigma(s)[0]


def paper_2s(x, t, s):
    """Lu et al. 2022 (DPM-Solver++), Algorithm 1 with r = 1/2."""
    middle, h = time_midway(t, s), half_logsnr(s) - half_logsnr(t)
    (_, sigma), (alpha_m, sigma_m), (alpha_s, sigma_s) = map(alpha_sigma, (t, middle, s))
    u = sigma_m / sigma * x - alpha_m * np.expm1(-h / 2) * data(x, t)
    return sigma_s / sigma * x - alpha_s * np.expm1(-h) * data(u, middle)


def exponential(x, t, s, nodes, values):
    """sigma_s / sigma_t x + sigma_s int e^lambda P(lambda) dlambda."""
    (_, sigma), (_, sigma_s) = alpha_sigma(t), alpha_sigma(s)
    ends = half_logsnr(t), half_logsnr(s)
    weights = [
        integral(lambda u, j=j: np.exp(u) * lagrange(nodes, j)(u) * np.ones_like(u), *ends) for j in range(len(nodes))
    ]
    return sigma_s / sigma * x + sigma_s * sum(w * v for w, v in zip(weights, values, strict=True))


def paper_3m(x, t, s, past):
    x0 = data(x, t)
    if len(past) == 1:  # UniC-1 on the first step
        x = x + alpha_sigma(t)[0] * -np.expm1(past[0][0] - half_logsnr(t)) / 2 * (x0 - past[0][1])
    past.insert(0, (half_logsnr(t), x0))
    return exponential(x, t, s, *zip(*past[:3], strict=True))


def paper_unipc(order, variant):
    """Zhao et al. 2023 with data prediction: the systems R rho = b / B(h) of UniP and UniC."""

    def update(x, t, s, past, x0_s, p):
        lam, lam_s = half_logsnr(t), half_logsnr(s)
        h = lam_s - lam
        (_, sigma), (alpha_s, sigma_s) = alpha_sigma(t), alpha_sigma(s)
        b_of_h = -h if variant == "bh1" else np.expm1(-h)
        ratios = [(half_logsnr(time) - lam) / h for time, _ in past[1:p]]
        slopes = [(value - past[0][1]) / r for (_, value), r in zip(past[1:p], ratios, strict=True)]
        if x0_s is not None:
            ratios, slopes = [*ratios, 1.0], [*slopes, x0_s - past[0][1]]
        n = len(ratios)
        phis, value = [], np.expm1(-h) / -h - 1
        for k in range(1, n + 1):
            phis.append(value * math.factorial(k) / b_of_h)
            value = value / -h - 1 / math.factorial(k + 1)
        system = np.array([[r**k for r in ratios] for k in range(n)]).reshape(n, n)
        weights = [0.5] if n == 1 else np.linalg.solve(system, np.array(phis))
        total = sum(w * d for w, d in zip(weights, slopes, strict=True))
        return sigma_s / sigma * x - alpha_s * np.expm1(-h) * past[0][1] - alpha_s * b_of_h * total

    def step(x, t, s, past):
        memory = past[0] if past else {"values": []}
        x0 = data(x, t)
        if memory["values"]:
            x = update(memory["x"], memory["t"], t, memory["values"], x0, min(order, len(memory["values"])))
        values = [(t, x0), *memory["values"]]
        past[:] = [{"x": x, "t": t, "values": values}]
        return update(x, t, s, values, None, min(order, len(values)))

    return every_step(step)


def paper_deis(order):
    """Zhang & Chen 2023, tAB for the VP SDE: C_j = int Psi(s, u) beta(u) / (2 sigma(u)) L_j(u) du."""

    def step(x, t, s, past):
        eps = noise(x, t)
        if len(past) == 1 and order == 3:  # UniC-1 on the first step
            before, _, x0_before = past[0]
            x0 = data(x, t)
            x = x + alpha_sigma(t)[0] * -np.expm1(half_logsnr(before) - half_logsnr(t)) / 2 * (x0 - x0_before)
            eps = (x - alpha_sigma(t)[0] * x0) / alpha_sigma(t)[1]
        past.insert(0, (t, eps, data(x, t)))
        nodes, values, _ = zip(*past[:order], strict=True)

        def kernel(u):
            alpha, sigma = alpha_sigma(u)
            return -alpha_sigma(s)[0] / alpha * (0.1 + 19.9 * u) / (2 * sigma)

        weights = [integral(lambda u, j=j: -kernel(u) * lagrange(nodes, j)(u), t, s) for j in range(len(nodes))]
        return alpha_sigma(s)[0] / alpha_sigma(t)[0] * x + sum(w * v for w, v in zip(weights, values, strict=True))

    return every_step(step)


def paper_lms(order):
    """k-diffusion's sample_lms in x / alpha: Lagrange polynomials in rho, integrated."""

    def step(x, t, s, past):
        past.insert(0, (rho(t), noise(x, t)))
        nodes, values = zip(*past[:order], strict=True)
        weights = [
            integral(lambda u, j=j: lagrange(nodes, j)(u) * np.ones_like(u), rho(t), rho(s)) for j in range(len(nodes))
        ]
        x = x / alpha_sigma(t)[0] + sum(w * v for w, v in zip(weights, values, strict=True))
        return x * alpha_sigma(s)[0]

    return every_step(step)


ADAMS_BASHFORTH = [[1], [3 / 2, -1 / 2], [23 / 12, -16 / 12, 5 / 12], [55 / 24, -59 / 24, 37 / 24, -9 / 24]]


def paper_pndm(order, start):
    def step(x, t, s, past):
        past.insert(0, noise(x, t))
        eps = sum(w * e for w, e in zip(ADAMS_BASHFORTH[min(order, len(past)) - 1], past, strict=False))
        if start == "plms" and len(past) == 1:
            eps = (past[0] + noise(transfer(x, past[0], t, s), s)) / 2
        if start == "pndm" and len(past) <= 3:
            middle = (t + s) / 2
            second = noise(transfer(x, past[0], t, middle), middle)
            third = noise(transfer(x, second, t, middle), middle)
            eps = (past[0] + 2 * second + 2 * third + noise(transfer(x, third, t, s), s)) / 6
        return transfer(x, eps, t, s)

    return every_step(step)


PAPERS = {
    "ddim": one_step(lambda x, t, s: transfer(x, noise(x, t), t, s)),
    "midpoint": one_step(paper_midpoint),
    "dpm2": one_step(paper_dpm2),
    "dpmpp_2s": one_step(paper_2s),
    "dpmpp_3m": every_step(paper_3m),
    "unipc_2": paper_unipc(2, "bh2"),
    "unipc_3": paper_unipc(3, "bh2"),
    "unipc_2_bh1": paper_unipc(2, "bh1"),
    "unipc_3_bh1": paper_unipc(3, "bh1"),
    "deis_2": paper_deis(2),
    "deis_3": paper_deis(3),
    "lms": paper_lms(4),
    "lms_2": paper_lms(2),
    "plms": paper_pndm(4, "plms"),
    "pndm": paper_pndm(4, "pndm"),
    "ipndm": paper_pndm(4, "lower"),
    "ipndm_3": paper_pndm(3, "lower"),
}


@pytest.fixture(scope="module")
def trajectories():
    """All solvers over TIMES, in one compilation."""
    with jax.enable_x64(True):

        @jax.jit
        def run(x, times):
            def one(make):
                key = jax.random.key(0)
                return sample.sample(
                    key, Gaussian(USED, 0.3, 0.25).denoise, x, times, make(USED), return_trajectory=True
                )

            return {name: one(make)[1] for name, make in CASES.items()}

        return jax.tree.map(np.asarray, run(jnp.asarray(START), jnp.asarray(TIMES)))


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_algorithm_of_its_paper(name, trajectories):
    np.testing.assert_allclose(trajectories[name], PAPERS[name](), rtol=1e-9, atol=1e-12)


def test_no_two_names_are_one_solver(trajectories):
    for a, b in itertools.combinations(trajectories, 2):
        assert np.abs(trajectories[a] - trajectories[b]).max() > 1e-6, (a, b)


def test_phi_is_its_series_to_the_last_digit():
    h = np.array([0.0, 1e-9, 1e-3, 0.3, 0.999, 1.0, 1.001, 4.0, 40.0, 80.0])
    truth = [
        [float(sum(Fraction(-float(u)) ** j / math.factorial(j + k) for j in range(300))) for u in h]
        for k in (1, 2, 3, 4)
    ]
    with jax.enable_x64(True):
        np.testing.assert_allclose(jax.jit(lambda h: phi(h, 4))(jnp.asarray(h)), truth, rtol=1e-14)
    np.testing.assert_allclose(jax.jit(lambda h: phi(h, 4))(jnp.asarray(h, jnp.float32)), truth, rtol=2e-6)


def test_a_polynomial_is_integrated_exactly_and_a_missing_node_lowers_the_degree():
    cubic = np.polynomial.Polynomial([0.3, -1.0, 0.5, 2.0])
    places = np.array([0.0, -0.5, -2.0, -2.1])
    moments = [jnp.float32(1 / (k + 1)) for k in range(4)]
    for known, degree in ((4, 3), (3, 2), (2, 1), (1, 0)):
        nodes = [jnp.float32(u) if j < known else jnp.float32(np.inf) for j, u in enumerate(places)]
        values = [jnp.float32(cubic(u)) for u in places]
        fitted = np.polynomial.Polynomial.fit(places[:known], cubic(places[:known]), degree)
        truth = fitted.integ()(1.0) - fitted.integ()(0.0) - cubic(0.0)
        np.testing.assert_allclose(beyond_first(moments, nodes, values), truth, rtol=1e-4, atol=1e-6)


CONSTANT = ("midpoint", "dpm2", "dpmpp_2s", "dpmpp_3m", "unipc_2", "unipc_3", "deis_3", "lms", "plms", "pndm", "ipndm")


@pytest.mark.parametrize(
    "used",
    [schedule.cosine(), schedule.rectified_flow(), schedule.edm(), schedule.zero_terminal_snr(schedule.ddpm_table())],
    ids=lambda s: type(s).__name__,
)
def test_all_are_exact_for_one_point_and_no_worse_than_ddim_in_few_steps(used):
    # From alpha = 0 the first step of log-SNR has no length: no weight of it may spoil the steps after it.
    cloud, point = Gaussian(used, 0.3, 0.25), Gaussian(used, 0.3, 0.0)
    x = used.sigma(jnp.float32(1)) * jnp.linspace(-1.5, 1.5, 4)[:, None]

    @jax.jit
    def run(x, times):
        def end(denoise, name):
            return sample.sample(jax.random.key(0), denoise, x, times, solver.ALL[name](used))

        def each(denoise):
            return {name: end(denoise, name) for name in ("ddim", *CONSTANT)}

        return each(point.denoise), each(cloud.denoise)

    times = sample.uniform_grid(used, 5)
    exact, close = run(x, jnp.asarray(times[:-1], jnp.float32))
    truth = [np.asarray(known.flow(x, times[0], times[-2])) for known in (point, cloud)]
    distance = {name: np.abs(np.asarray(value) - truth[1]).max() for name, value in close.items()}
    for name in CONSTANT:
        np.testing.assert_allclose(exact[name], truth[0], rtol=2e-4, atol=2e-5, err_msg=name)
        assert distance[name] < 1.1 * distance["ddim"], (name, distance)


@pytest.mark.parametrize(
    ("name", "calls"),
    [
        *((name, 6) for name in ("dpmpp_3m", "unipc_2", "unipc_3", "deis_2", "deis_3", "lms", "ipndm")),
        *((name, 11) for name in ("midpoint", "dpm2", "dpmpp_2s")),
        ("plms", 7),
        ("pndm", 15),
    ],
)
def test_the_calls_of_six_steps(name, calls):
    assert sample.nfe(solver.ALL[name](USED), sample.uniform_grid(USED, 6)) == calls


def graded(num_steps):
    """Times from 0.8 to 0.2 in equal steps, of which the first is built from ever shorter ones (by halves, to h^2)."""
    times = np.linspace(0.8, 0.2, num_steps + 1)
    halves = 0.5 ** np.arange(int(np.log2(num_steps)) + 2, 0, -1)
    return np.concatenate([times[:1], times[0] - halves * (times[0] - times[1]), times[1:]])


def even_rho(num_steps):
    ratio = np.linspace(4.0, 0.25, num_steps + 1)
    return ratio / (1 + ratio)


def slope(make, grid, coarse):
    """The order of convergence on straight lines between `coarse` and twice as many steps; one compilation."""
    used, solve = schedule.rectified_flow(), make(schedule.rectified_flow())
    cloud, x = Gaussian(used, 0.3, (0.25, 1.0, 0.04)), jnp.asarray(START * np.ones(3))

    @jax.jit
    def run(x, times, num_steps):
        def body(n, carry):
            return solve.step(keys, cloud.denoise, carry[0], times[n], times[n + 1], carry[1])

        keys = jax.random.split(jax.random.key(0), x.shape[0])
        return jax.lax.fori_loop(0, num_steps, body, (x, solve.init(x)))[0]

    found = []
    for times in (grid(coarse), grid(2 * coarse)):
        room = jnp.asarray(np.append(times, np.zeros(1000 - len(times))))
        found.append(jnp.abs(run(x, room, len(times) - 1) - cloud.flow(x, times[0], times[-1])).max())
    return float(jnp.log2(found[0] / found[1]))


def equal(num_steps):
    return np.linspace(0.8, 0.2, num_steps + 1)


@pytest.mark.parametrize(
    ("make", "grid", "low", "high"),
    [
        (solver.lms, graded, 4, 4),
        (lambda s: solver.lms(s, order=3), graded, 3, 3),
        (solver.ALL["unipc_3"], graded, 4, 4),
        (solver.deis, graded, 3, 3),
        (solver.deis, equal, 3, 3),
        (solver.dpmpp_3m, graded, 3, 3),
        (solver.dpmpp_3m, equal, 3, 3),
        (solver.plms, even_rho, 3, 4),  # the start is of order 3, the rest of order 4
        (solver.pndm, even_rho, 3, 4),
    ],
)
def test_the_order_after_a_start_in_short_steps_and_of_constant_weights_in_equal_steps_of_rho(make, grid, low, high):
    with jax.enable_x64(True):
        assert low - 0.15 < slope(make, grid, 200) < high + 0.15


def halved(h, count):
    moments = exponential_moments(h, count)
    return [*moments[:2], moments[2] / 2]  # as in the published DPM-Solver++(3M), diffusers and k-diffusion


@pytest.mark.parametrize(
    ("make", "where", "name", "broken"),
    [
        (solver.dpmpp_3m, dpm, "exponential_moments", halved),
        (solver.deis, multistep, "_first_step_error", lambda used, t, past: jnp.zeros_like(t)),
        (lambda s: solver.lms(s, order=3), multistep, "_rho", lambda used, t: 1.01 * jnp.exp(-used.logsnr(t) / 2)),
    ],
)
def test_the_order_shows_the_published_coefficient_a_plain_start_and_a_wrong_length(
    make, where, name, broken, monkeypatch
):
    monkeypatch.setattr(where, name, broken)
    with jax.enable_x64(True):
        assert slope(make, equal, 200) < 2.5


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: solver.unipc(USED, order=4), "order=4"),
        (lambda: solver.unipc(USED, variant="b2"), "variant='b2'"),
        (lambda: solver.deis(USED, order=1), "deis has order 2, 3; got 1"),
        (lambda: solver.lms(USED, order=5), "lms has order 1, 2, 3, 4; got 5"),
        (lambda: solver.ipndm(USED, order=0), "got 0"),
    ],
)
def test_unusable_settings_are_refused(call, words):
    with pytest.raises(errors.ConfigError, match=words):
        call()
