"""The exact law of what a stochastic solver draws on Gaussian data: no draws, no statistical error, float64.

With the denoiser of Gaussian data (affine in x) a whole run is affine in its start and in every normal draw:

    x_end = c + a x_start + sum_k b_k xi_k,    so    mean = c + a E[x_start],  variance = a^2 Var[x_start] + sum b_k^2

A run of one batch reads the coefficients off: row 0 starts at 0 without noise (c), row 1 at 1 (a), and row 2 + k sees 1
in draw k and 0 in the others (b_k). The last row mixes everything at random: were the run not affine, or one row not
independent of the rest, it would not be the sum of the others.

A draw is told by its key: `process.normal`, where all noise of the package comes from, is replaced while a solver is
traced. So draws in loops and branches are seen, and one key used twice is seen as what it is, the same noise twice.
"""

import itertools
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff import process
from tests.oracles.gaussian import Gaussian
from tests.oracles.sampling import MEAN, VARIANCE, smooth_grid


class Law(NamedTuple):
    """The law of x at the end of a run: its mean and variance, and `gain`, the a above: how it depends on the start.

    The gain is what marginal laws cannot see: a solver with another share of noise has the same mean and variance.
    """

    mean: float
    variance: float
    gain: float


def exact_laws(solver, schedule, grids, denoise=None, draws=None):
    """The `Law` of x at the end of each of `grids` (rows of times), by one compilation; call under x64 or not.

    x starts from the true law at times[0]. denoise: if not the posterior mean of N(MEAN, VARIANCE), another that is
    affine in x. draws: how many normal draws the longest grid makes, if more than one a step.
    Raises AssertionError where the run is not affine in x and its noise (e.g. a step size ruled by norms).
    """
    with jax.enable_x64(True):
        data = Gaussian(schedule, MEAN, VARIANCE)
        capacity = draws or max(len(times) - 1 for times in grids)
        basis, start = _basis(capacity)
        seen = {}
        step = _step_of(solver, denoise or data.denoise, basis, seen)
        return [_law(step, solver, data, np.asarray(times, np.float64), start, basis, seen) for times in grids]


def true_law(schedule, start, end):
    """The `Law` of x at time `end` of the exact reverse diffusion (all its noise: eta = 1) from time `start`.

    Mean and variance are those of every eta; the gain is Cov(x_end, x_start) / Var[x_start], and needs alpha(end) > 0.
    """
    with jax.enable_x64(True):
        data, zero = Gaussian(schedule, MEAN, VARIANCE), jnp.zeros((1,), jnp.float64)
        start, end = jnp.asarray(float(start)), jnp.asarray(float(end))
        mean, variance = data.moments(zero, end)
        gain = data.reverse(zero + 1, start, end)[0] - data.reverse(zero, start, end)[0]
    return Law(float(mean[0]), float(variance[0]), float(gain[0]))


def law_errors(solver, schedule, grids, **more):
    """For each grid, the `Law` of absolute errors at its end (that of the gain for eta = 1). Arguments as above."""
    laws = exact_laws(solver, schedule, grids, **more)
    return [
        Law(*np.abs(np.subtract(law, true_law(schedule, *times[[0, -1]]))))
        for law, times in zip(laws, grids, strict=True)
    ]


def weak_order(make_solver, schedule, grid=smooth_grid, num_steps=50, draws_per_step=1):
    """The slope of log error of the variance against log step, between num_steps and twice that.

    The mean tells nothing: at the mean of x_t the denoiser is exact, so every consistent solver keeps it.
    """
    grids = [grid(schedule, n) for n in (num_steps, 2 * num_steps)]
    coarse, fine = law_errors(make_solver(schedule), schedule, grids, draws=2 * num_steps * draws_per_step)
    return float(np.log2(coarse.variance / fine.variance))


def _basis(capacity):
    """(what each row sees of each draw (rows, capacity), where each row starts (rows, 1))."""
    random = np.random.default_rng(0)
    basis = np.concatenate([np.zeros((2, capacity)), np.eye(capacity), random.normal(size=(1, capacity))])
    start = np.zeros((capacity + 3, 1))
    start[1], start[-1] = 1, random.normal()
    return basis, start


def _step_of(solver, denoise, basis, seen):
    """One jitted step, in which every normal draw is a column of `basis`; `seen` numbers the keys in order of use."""

    def number(data):
        return np.int32(seen.setdefault(data.tobytes(), len(seen)))

    def basis_noise(key, shape, dtype=jnp.float32):
        index = jax.pure_callback(number, jax.ShapeDtypeStruct((), jnp.int32), jax.random.key_data(key)[0])
        column = jnp.asarray(basis, dtype)[:, index]
        return jnp.broadcast_to(column.reshape((-1,) + (1,) * (len(shape) - 1)), shape)

    @jax.jit
    def step(n, x, t, s, memory):
        key = jax.random.fold_in(jax.random.key(0), n)
        keys = jax.random.wrap_key_data(jnp.broadcast_to(jax.random.key_data(key)[None], (x.shape[0], 2)))
        with mock.patch.object(process, "normal", basis_noise):
            return solver.step(keys, denoise, x, t, s, memory)

    return step


def _law(step, solver, data, times, start, basis, seen):
    seen.clear()
    x = jnp.asarray(start)
    memory = jax.tree.map(jnp.asarray, solver.init(x))
    for n, (t, s) in enumerate(itertools.pairwise(times)):
        x, memory = step(jnp.int32(n), x, jnp.asarray(t), jnp.asarray(s), memory)
    values = np.asarray(x)[:, 0]
    assert len(seen) <= basis.shape[1], f"the run made {len(seen)} draws: call with draws={len(seen)} or more"
    constant, slopes = values[0], values[1:-1] - values[0]
    mixed = constant + slopes[0] * start[-1, 0] + slopes[1:] @ basis[-1]
    np.testing.assert_allclose(mixed, values[-1], rtol=1e-7, atol=1e-9, err_msg="the run is not affine")
    first = true_law(data.schedule, times[0], times[0])
    variance = slopes[0] ** 2 * first.variance + np.sum(slopes[1:] ** 2)
    return Law(float(constant + slopes[0] * first.mean), float(variance), float(slopes[0]))
