"""Every guidance with every solver: finite, rows apart, off at scale 1, and to where the guided field leads.

Between Gaussians of one variance guidance has a closed form: D of the mean m is affine in m, so that
D_u + w (D_c - D_u) is D of the Gaussian at m_u + w (m_c - m_u).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import guide, sample, schedule, solver
from jaxdiff.types import Solver
from tests.oracles import judge
from tests.oracles.gaussian import Gaussian, Mixture
from tests.oracles.sampling import MEAN, VARIANCE, reference, smooth_grid

USED = schedule.cosine()
SCALE = 2.5
UNCOND, COND = Gaussian(USED, -0.2, VARIANCE), Gaussian(USED, -0.2 + (MEAN + 0.2) / SCALE, VARIANCE)
TWO = Mixture(USED, (0.6, 0.4), ((-0.5, -0.3), (0.6, 0.5)), (0.15, 0.1))


def likely(x, t):
    return -jnp.square(x - 0.5).sum(1)


def guides():
    """name -> guided denoiser. The first two are not guided."""
    cond, uncond = TWO.denoise, UNCOND.denoise

    def of_class(x, t, mean):
        return Gaussian(USED, 0.0, VARIANCE).denoise(x - USED.alpha(t) * mean, t) + mean

    means = jnp.full((3, 2), 0.4), jnp.full((3, 2), -0.3)
    return {
        "none": cond,
        "cfg at 1": guide.cfg(cond, uncond, 1.0),
        "cfg": guide.cfg(cond, uncond, SCALE),
        "cfg per example, rescaled": guide.cfg(cond, uncond, jnp.asarray([1.0, 2.0, 4.0]), phi=0.7),
        "cfg_batched": guide.cfg_batched(of_class, *means, SCALE),
        "autoguidance": guide.autoguidance(cond, lambda x, t: 0.9 * cond(x, t), SCALE),
        "interval": guide.interval(guide.cfg(cond, uncond, SCALE), cond, USED, sigma=(0.2, 2.0)),
        "rescale": guide.rescale(guide.cfg(cond, uncond, SCALE), cond, 0.5),
        "threshold_static": guide.threshold_static(guide.cfg(cond, uncond, SCALE)),
        "threshold_dynamic": guide.threshold_dynamic(guide.cfg(cond, uncond, SCALE), 0.9, 0.5),
        "classifier": guide.classifier(cond, likely, USED, 0.5),
        "all": guide.threshold_dynamic(guide.classifier(guide.cfg(cond, uncond, SCALE, phi=0.3), likely, USED), 0.9),
    }


def test_all_of_the_room_is_tried():
    public = {name for name, value in vars(guide).items() if getattr(value, "__module__", "") == guide.__name__}
    tried = " ".join(guides())
    assert {name for name in public if not name.startswith("_") and name not in tried} == set()


@pytest.mark.parametrize("name", solver.ALL)
def test_every_guidance_is_finite_and_keeps_rows_apart(name):
    def run(k, seeds, x, times, num_steps):
        solve, keys = solver.ALL[name](USED), jax.vmap(jax.random.key)(seeds)
        denoise = lambda x, t: jnp.stack([guided(x, t) for guided in guides().values()])[k]  # noqa: E731

        def body(n, carry):
            own = jax.vmap(jax.random.fold_in, (0, None))(keys, n)
            return solve.step(own, denoise, carry[0], times[n], times[n + 1], carry[1])

        return jax.lax.fori_loop(0, num_steps, body, (x, solve.init(x)))[0]

    over_runs = (None, 0, 0, None, None)
    run = jax.jit(jax.vmap(jax.vmap(run, (0, None, None, None, None)), over_runs))
    x, count = np.random.default_rng(0).standard_normal((3, 2), np.float32), len(guides())
    xs, seeds = np.stack([x, x * np.float32([[1], [5], [-3]])]), np.asarray([[0, 1, 2], [0, 6, 7]])
    for num_steps in (1, 2, 10):
        times = np.zeros(11, np.float32)
        times[: num_steps + 1] = np.linspace(1, 0, num_steps + 1)
        with jax.debug_key_reuse(False):  # as in oracles.product
            one, other = np.asarray(run(np.arange(count), seeds, xs, times, num_steps))
        for title, end in zip(guides(), one, strict=True):
            assert np.isfinite(end).all(), title
        np.testing.assert_array_equal(one[:, 0], other[:, 0])
        np.testing.assert_array_equal(one[0], one[1], err_msg="scale 1 is not off")
    assert (np.abs(one[2:] - one[0]).max((1, 2)) > 1e-3).all()  # in 10 steps each of the others does something


@functools.cache
def fields():
    """(guided denoisers, the exact ends of their flows from the same start) in float64."""
    plain = Gaussian(USED, MEAN, VARIANCE)
    guided = guide.cfg(COND.denoise, UNCOND.denoise, SCALE)
    nonlinear = guide.cfg(TWO.denoise, UNCOND.denoise, SCALE)
    times = smooth_grid(USED, 1, 2.5)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 2)))
    end = jax.jit(lambda x: reference(USED, nonlinear, x, *times, 1000))(x)
    return (plain.denoise, guided, nonlinear), x, (plain.flow(x, *times), end)


@pytest.mark.parametrize("name", solver.ALL)
def test_cfg_leads_where_the_guided_field_leads(name):
    """Between Gaussians to the closed form, draw for draw; on a mixture along the flow, with the solver's own order."""
    stated = judge.stated(name)
    with jax.enable_x64(True):
        denoisers, start, (_, truth) = fields()

        def run(k, x, times, num_steps):
            solve, keys = solver.ALL[name](USED), jax.random.split(jax.random.key(0), 4)
            denoise = lambda x, t: jnp.stack([d(x, t) for d in denoisers])[k]  # noqa: E731

            def body(n, carry):
                own = jax.vmap(jax.random.fold_in, (0, None))(keys, n)
                return solve.step(own, denoise, carry[0], times[n], times[n + 1], carry[1])

            return jax.lax.fori_loop(0, num_steps, body, (x, solve.init(x)))[0]

        run = jax.jit(run)
        grids = {n: (judge.padded(smooth_grid(USED, n, 2.5)), n) for n in (20, 256, 512)}
        np.testing.assert_allclose(run(1, start, *grids[20]), run(0, start, *grids[20]), rtol=1e-9, atol=1e-9)
        if stated.order is None:
            return
        errors = [float(jnp.abs(run(2, start, *grids[n]) - truth).max()) for n in (256, 512)]
    found = np.log2(errors[0] / errors[1])
    assert stated.order - 0.15 <= found <= (stated.most or stated.order) + 0.15


def test_forgetting_the_guidance_in_memory_would_be_caught():
    """A multistep solver whose memory holds the unguided answer has lost its order."""

    def forgetful(used):
        inner = solver.dpmpp_2m(used)

        def step(key, denoise, x, t, s, memory):
            x, (_, *rest) = inner.step(key, denoise, x, t, s, memory)
            return x, (UNCOND.denoise(x, t), *rest)

        return Solver(inner.init, step)

    with jax.enable_x64(True):
        denoisers, start, (_, truth) = fields()
        errors = []
        for num_steps in (64, 128):
            times = smooth_grid(USED, num_steps, 2.5)
            end = sample.sample(jax.random.key(0), denoisers[2], start, times, forgetful(USED))
            errors.append(float(jnp.abs(end - truth).max()))
    assert np.log2(errors[0] / errors[1]) < 1.5
