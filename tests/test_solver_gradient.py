"""Derivatives of sampling: by the start, a guidance scale and the network's parameters, on every schedule.

Reverse-mode gradients against central differences in float64, from t = 1 (where alpha may be 0) to t = 0 (where sigma
may be 0), under jit, under vmap over the schedules, and with the network rematerialised (`jax.checkpoint`). With fixed
keys a stochastic solver is a function like any other.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from jaxdiff import guide, sample, schedule, solver
from jaxdiff.types import Solver
from tests.oracles import product
from tests.test_solver import EVERY

SCHEDULES = tuple(EVERY.values())
TIMES = np.asarray([1.0, 0.8, 0.45, 0.2, 0.0])


def point():
    """Where derivatives are taken: (the start, the guidance scale, the parameters of the network)."""
    params = {"mean": jnp.asarray([0.3, -0.2]), "log_variance": jnp.asarray([-1.4, -0.8]), "bend": jnp.asarray(0.1)}
    return jnp.asarray(np.random.default_rng(0).normal(size=(3, 2))), jnp.asarray(2.5), params


def guided(used, scale, params):
    """A nonlinear network, guided by itself with another mean."""

    def net(x, t, mean):
        alpha, variance = used.alpha(t), jnp.exp(params["log_variance"])[None]
        shift = x - alpha * mean[None]
        gain = alpha * variance / (alpha**2 * variance + used.sigma(t) ** 2)
        return mean[None] + gain * shift + params["bend"] * jnp.sin(x)

    return guide.cfg(lambda x, t: net(x, t, params["mean"]), lambda x, t: net(x, t, params["mean"] / 2), scale)


def worst(make, remat=True):
    """schedule -> the largest difference between the gradient and central differences, relative to the gradient."""
    with jax.enable_x64(True), jax.debug_key_reuse(False):  # the latter as in oracles.product
        flat, unravel = ravel_pytree(point())
        table, times = product.tables(SCHEDULES, jnp.asarray(TIMES)), jnp.asarray(TIMES)

        def loss(i, flat):
            x, scale, params = unravel(flat)

            def body(carry, n):
                at = [(times[m], jax.tree.map(lambda v, m=m: v[i][..., m], table)) for m in (n, n + 1)]
                used = product.Chosen(SCHEDULES, i, at)
                denoise = guided(used, scale, params)
                keys = jax.vmap(jax.random.fold_in, (0, None))(jax.random.split(jax.random.key(0), 3), n)
                asked = jax.checkpoint(denoise) if remat else denoise
                return make(used).step(keys, asked, carry[0], at[0][0], at[1][0], carry[1]), None

            start = x * table["sigma"][i][0], make(product.Chosen(SCHEDULES, i)).init(x)
            (x, _), _ = jax.lax.scan(body, start, jnp.arange(len(TIMES) - 1))
            return (x * jnp.asarray([[1.0, -0.7], [0.4, 0.3], [-0.2, 0.9]])).sum()

        def both(i):
            steps = 1e-5 * jnp.concatenate([jnp.eye(flat.size), -jnp.eye(flat.size)])
            around = jax.vmap(lambda step: loss(i, flat + step))(steps).reshape(2, -1)
            return jax.grad(loss, 1)(i, flat), (around[0] - around[1]) / 2e-5

        gradient, truth = map(np.asarray, jax.jit(jax.vmap(both))(np.arange(len(SCHEDULES))))
    assert np.isfinite(gradient).all()
    assert (np.abs(gradient).max(1) > 0.01).all()
    return dict(zip(EVERY, np.abs(gradient - truth).max(1) / np.abs(gradient).max(1), strict=True))


@pytest.mark.parametrize("name", solver.ALL)
def test_gradients_are_those_of_finite_differences_on_every_schedule(name):
    assert max(worst(solver.ALL[name]).values()) < 1e-6


def test_without_rematerialisation_they_are_the_same():
    assert max(worst(solver.heun, remat=False).values()) < 1e-6


@pytest.mark.parametrize("name", ["dpmpp_2m", "ddpm"])
def test_the_jacobian_through_sample_itself(name):
    used = schedule.cosine()
    with jax.enable_x64(True):
        x, scale, params = point()
        run = lambda x: sample.sample(  # noqa: E731
            jax.random.key(0), guided(used, scale, params), x, TIMES, solver.ALL[name](used)
        )
        jacobian = np.asarray(jax.jit(jax.jacrev(run))(x)).reshape(6, 6)
        steps = 1e-5 * np.eye(6).reshape(6, 3, 2)
        around = np.stack([np.ravel(jax.jit(run)(x + h) - jax.jit(run)(x - h)) / 2e-5 for h in steps], 1)
    np.testing.assert_allclose(jacobian, around, atol=1e-8)
    blocks = jacobian.reshape(3, 2, 3, 2)
    assert all(not blocks[i, :, j].any() for i in range(3) for j in range(3) if i != j)  # rows do not mix


def test_a_gradient_that_is_cut_or_not_finite_would_be_caught():
    def with_x(change):
        def make(used):
            inner = solver.ddim(used)

            def step(key, denoise, x, t, s, memory):
                return inner.step(key, denoise, change(x), t, s, memory)

            return Solver(inner.init, step)

        return make

    assert max(worst(with_x(lambda x: 0.9 * x + 0.1 * jax.lax.stop_gradient(x))).values()) > 1e-3
    with pytest.raises(AssertionError):
        worst(with_x(lambda x: jnp.where(x > x - 1, x, jnp.sqrt(x - x))))  # the trap of where: 0 times infinity
