"""The deterministic solvers: exact for one point, calls counted, orders after a start in short steps.

That each is the algorithm of its paper is tested in `test_printed`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import errors, sample, schedule, solver
from jaxdiff.solver import dpm, multistep
from jaxdiff.solver.polynomial import beyond_first, exponential_moments
from tests.oracles.gaussian import Gaussian

USED = schedule.vp()
START = np.array([[-1.4], [0.2], [0.9]])


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
