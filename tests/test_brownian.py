"""The Brownian path: its exact law by a basis of its normal draws, and images that stay as steps are added."""

import itertools
from functools import partial
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import process, schedule, solver
from tests.oracles.gaussian import Gaussian
from tests.oracles.sampling import smooth_grid

USED = schedule.cosine()


def coefficients(steps, rows=400):
    """The noise of each step (t, s) as a vector of coefficients over the path's normal draws, told by their keys."""
    seen = {}

    def number(data):
        return np.int32(seen.setdefault(data.tobytes(), len(seen)))

    def basis_noise(key, shape, dtype):
        index = jax.pure_callback(number, jax.ShapeDtypeStruct((), jnp.int32), jax.random.key_data(key)[0])
        return jnp.zeros(shape, dtype).at[index].set(1.0)

    with jax.enable_x64(True), mock.patch.object(process, "normal", basis_noise):
        one = jax.random.key_data(jax.random.key(0))
        path = solver.brownian_path(jax.random.wrap_key_data(jnp.broadcast_to(one[None], (rows, 2))), USED)
        noise = jax.jit(lambda t, s: path(jax.random.key(0), jnp.zeros((rows, 1), jnp.float64), t, s))
        out = [noise(jnp.float64(t), jnp.float64(s)) for t, s in steps]
    assert len(seen) <= rows
    return np.stack([np.asarray(row)[:, 0] for row in out])


def test_increments_are_standard_and_independent_and_whole_steps_are_sums_of_parts():
    times = [1.0, 0.9, 0.7, 0.69, 0.3, 0.001, 0.0]
    rows = coefficients([*itertools.pairwise(times), (0.9, 0.69)])
    np.testing.assert_allclose(rows[:-1] @ rows[:-1].T, np.eye(6), atol=2e-3)
    # The whole over (0.9, 0.69) in the clock of the SNR: sqrt(SNR_s - SNR_t) times each draw adds up.
    with jax.enable_x64(True):
        snr = np.exp(np.asarray(USED.logsnr(jnp.asarray([0.9, 0.7, 0.69], jnp.float64))))
    parts = np.sqrt(np.diff(snr)) @ rows[1:3]
    np.testing.assert_allclose(np.sqrt(snr[2] - snr[0]) * rows[-1], parts, atol=1e-12)


def test_draws_are_normal_in_float32_where_steps_are_short():
    times = jnp.linspace(0.7, 0.69, 11)
    noise = solver.brownian_path(jax.random.key(1), USED)
    x = jnp.zeros((512, 4), jnp.float32)
    draws = jax.jit(lambda t: jax.lax.map(lambda p: noise(jax.random.key(0), x, *p), (t[:-1], t[1:])))(times)
    rows = np.asarray(draws, np.float64).reshape(10, -1)
    np.testing.assert_allclose(rows @ rows.T / rows.shape[1], np.eye(10), atol=5 / rows.shape[1] ** 0.5)


def test_an_example_has_its_own_path_at_any_place_of_any_batch():
    keys, times = jax.random.split(jax.random.key(2), 3), (jnp.float32(0.6), jnp.float32(0.5))
    of_steps = lambda count: jax.random.split(jax.random.key(9), count)  # noqa: E731
    draw = lambda keys: np.asarray(  # noqa: E731
        solver.brownian_path(keys, USED)(of_steps(len(keys)), jnp.zeros((len(keys), 2)), *times)
    )
    three, one = draw(keys), draw(keys[1:2])
    np.testing.assert_array_equal(three[1:2], one)
    assert len(np.unique(three)) == 6
    single = solver.brownian_path(jax.random.key(2), USED)
    assert single(of_steps(3), jnp.zeros((3, 2)), *times).shape == (3, 2)


@pytest.mark.parametrize("s", [0.6, 0.7])
def test_noise_that_is_not_for_a_step_down_is_fresh(s):
    path, x = solver.brownian_path(jax.random.key(2), USED), jnp.zeros((3, 2))
    of_step, again = (jax.random.split(jax.random.key(9), 3) for _ in range(2))
    out = path(of_step, x, jnp.float32(0.6), jnp.float32(s))
    np.testing.assert_array_equal(out, solver.fresh(again, x, jnp.float32(0.6), jnp.float32(s)))


def ends(make, noise, counts, denoise):
    """Where the same start ends after so many steps, in float64; one compilation serves all."""
    with jax.enable_x64(True):
        solve = make(USED, noise=noise)

        @jax.jit
        def step(n, x, t, s, memory):
            return solve.step(process.example_keys(jax.random.key(n), x.shape[0]), denoise, x, t, s, memory)

        out = []
        for count in counts:
            x = jax.random.normal(jax.random.key(3), (64, 2), jnp.float64)
            memory, times = solve.init(x), jnp.asarray(smooth_grid(USED, count))
            for n in range(count):
                x, memory = step(jnp.uint32(n + 10 * count), x, times[n], times[n + 1], memory)
            out.append(np.asarray(x))
        return out


def distance(a, b):
    return np.sqrt(np.mean((a - b) ** 2))


SDE = {
    "ddim_eta1": partial(solver.ddim, eta=1.0),
    "euler_ancestral_rf": solver.euler_ancestral_rf,
    "dpmpp_2m_sde": solver.dpmpp_2m_sde,
    "dpmpp_sde": solver.dpmpp_sde,
}


@pytest.mark.parametrize("name", SDE)
def test_the_image_stays_as_steps_are_added_with_strong_order_one_at_least(name):
    data = Gaussian(USED, (0.3, -0.2), (0.25, 0.04))
    one, two, four = ends(SDE[name], solver.brownian_path(jax.random.key(5), USED), (40, 80, 160), data.denoise)
    assert np.log2(distance(one, two) / distance(two, four)) > 0.75  # in few steps the second order shows: up to 1.4
    assert distance(two, four) < 0.02


def test_with_fresh_noise_the_image_does_not_stay():
    data = Gaussian(USED, (0.3, -0.2), (0.25, 0.04))
    one, two, four = ends(solver.dpmpp_2m_sde, solver.fresh, (40, 80, 160), data.denoise)
    assert distance(two, four) > 0.8 * distance(one, two) > 0.2


@pytest.mark.parametrize("name", ["ddim_eta1", "dpmpp_2m_sde", "dpmpp_sde"])
def test_where_the_data_are_one_point_the_number_of_steps_changes_nothing(name):
    path, point = solver.brownian_path(jax.random.key(6), USED), lambda x, t: jnp.full_like(x, 0.4)
    few, many = ends(SDE[name], path, (2, 6), point)
    np.testing.assert_allclose(few, many, atol=1e-9)
