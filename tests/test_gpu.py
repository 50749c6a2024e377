"""The same numbers on a GPU as on the CPU: JAX_PLATFORMS=cuda,cpu pytest -n0 -m gpu."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from jaxdiff import loss, nets, sample, schedule, solver, target, train
from tests.oracles.gaussian import Gaussian
from tests.oracles.nets import perturbed

pytestmark = pytest.mark.gpu
X = np.random.default_rng(1).standard_normal((8, 16, 16, 3)).astype(np.float32)
USED = schedule.cosine()


def unet(dtype):
    """A small U-Net, parameters without zeros, and its per-example loss."""
    net = nets.small(channels=32, dtype=dtype)

    def loss_fn(params, key, batch):
        called = lambda x, t: net.apply(params, x, t)  # noqa: E731
        return loss.diffusion_with_aux(key, called, batch["x"], schedule=USED, target=target.v)

    return perturbed(nets.small(channels=32), X, 0.05), loss_fn


def on(platform, function, *args):
    """function(*args), compiled for and run on the first device of a platform, in full float32."""
    device = jax.devices(platform)[0]
    with jax.default_device(device), jax.default_matmul_precision("highest"):
        found = jax.jit(function)(*jax.device_put(args, device))
    assert all(leaf.devices() == {device} for leaf in jax.tree.leaves(found))
    return jax.device_get(found)


def test_a_bfloat16_step_is_finite_and_trains():
    params, loss_fn = unet(jnp.bfloat16)
    optimizer = train.adam(1e-3)
    state = train.create_state(params, optimizer, ema={"ema": 0.9})
    step = train.make_step(loss_fn, optimizer, key=jax.random.key(0), ema={"ema": 0.9})
    with jax.numpy_dtype_promotion("standard"):  # jax's own attention promotes
        new, metrics = step(state, {"x": X[None]})
    assert metrics["loss"].devices().pop().platform == "gpu"
    assert int(new.step) == 1
    assert int(new.bad_steps) == 0
    assert np.isfinite(metrics["loss"]).all()
    before = perturbed(nets.small(channels=32), X, 0.05)  # the state was donated
    moved = jax.tree.map(lambda a, b: bool((np.isfinite(a) & (np.asarray(a) != b)).any()), new.params, before)
    assert all(jax.tree.leaves(moved))


def test_loss_and_gradient_are_those_of_the_cpu():
    params, loss_fn = unet(jnp.float32)

    def mean(params, x):
        return loss_fn(params, jax.random.key(0), {"x": x})[0].mean()

    (value, grads), (wanted, truth) = (on(p, jax.value_and_grad(mean), params, X) for p in ("gpu", "cpu"))
    np.testing.assert_allclose(value, wanted, rtol=1e-3)
    (found, _), (exact, _) = (ravel_pytree(tree) for tree in (grads, truth))
    assert np.linalg.norm(found - exact) < 1e-3 * np.linalg.norm(exact)


def test_ddim_draws_the_samples_of_the_cpu():
    denoise = Gaussian(USED, 0.3, 0.25).denoise
    times, solve = sample.uniform_grid(USED, 10), solver.ddim(USED)
    found, wanted = (
        on(p, lambda x: sample.sample(jax.random.key(0), denoise, x, times, solve), X) for p in ("gpu", "cpu")
    )
    np.testing.assert_allclose(found, wanted, atol=1e-5)
