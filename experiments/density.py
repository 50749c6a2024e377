"""Bits per dimension of a trained model: the variational bound and the probability flow, as mean and standard error.

Both on the same real pictures, with their own conditions, from the averaged parameters. The floor beside them is a
normal distribution with the mean and covariance of the training pictures (with the variance of a bin's uniform noise).

The bound holds wherever its decoder takes over. 'bound' decodes noise as wide as a bin, 2/255; 'bound_fine' starts at
sigma = 0.001, where only a network that knows the values of 8 bits apart is not charged for what it cannot see.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import trained
from jaxdiff import data, likelihood, sample, train
from jaxdiff.types import Array


def model(
    run: trained.Trained, images: np.ndarray, cond: dict[str, Array], *, mesh: Any, batch: int, seed: int = 0
) -> dict[str, dict[str, float]]:
    """{'bound', 'bound_fine', 'flow'}: mean and error over uint8 `images` (n, h, w, c), conditions (n, ...)."""
    schedule, place, count = run.model.schedule, train.mesh.batch_sharding(mesh), len(images)
    params = jax.device_put(run.params, train.mesh.replicated(mesh))

    def bound(params: Any, keys: Array, x0: Array, cond: dict[str, Array], times: Array) -> Array:
        denoise = run.model.denoiser(params, cond, run.model.null(len(x0)))
        return likelihood.bits_per_dim_continuous(keys, denoise, x0, times, schedule=schedule).total

    def flow(params: Any, keys: Array, x0: Array, cond: dict[str, Array], times: Array) -> Array:
        denoise = run.model.denoiser(params, cond, run.model.null(len(x0)))
        return likelihood.bits_per_dim_ode(keys, denoise, x0, times, schedule=schedule)

    def over_images(bits: Callable[..., Array], grid: np.ndarray) -> dict[str, float]:
        parts = []
        for start in range(0, count, batch):
            rows = np.minimum(np.arange(start, start + batch), count - 1)
            keys = jax.vmap(jax.random.key)(jnp.asarray(seed * 2**20 + rows, jnp.uint32))
            given = jax.device_put((keys, data.decode(images[rows]), {k: v[rows] for k, v in cond.items()}), place)
            parts.append(np.asarray(bits(params, *given, jnp.asarray(grid, jnp.float32)))[: count - start])
        return mean_and_error(np.concatenate(parts))

    bound, flow = jax.jit(bound), jax.jit(flow)
    return {
        "bound": over_images(bound, sample.exponential_grid(schedule, 100, sigma_min=2 / 255)),
        "bound_fine": over_images(bound, sample.exponential_grid(schedule, 100, sigma_min=0.001)),
        "flow": over_images(flow, sample.log_snr_grid(schedule, 20)),
    }


def mean_and_error(values: np.ndarray) -> dict[str, float]:
    """{'mean', 'se', 'n'}: the standard error is that over examples."""
    values = np.asarray(values, np.float64)
    error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else math.nan
    return {"mean": float(values.mean()), "se": float(error), "n": len(values)}


def gaussian(training: np.ndarray, images: np.ndarray, *, seed: int = 0) -> dict[str, float]:
    """Bits/dim of uint8 `images`, uniformly dequantised, under the normal distribution fitted to `training`."""
    fit, x = (a.reshape(len(a), -1).astype(np.float64) for a in (training, images))
    dim, mean = x.shape[1], fit.mean(axis=0)
    root = np.linalg.cholesky(np.cov(fit.T) + np.eye(dim) / 12)  # a bin is 1 wide here, its uniform noise has 1/12
    noise = np.random.default_rng(seed).uniform(-0.5, 0.5, x.shape)
    white = np.linalg.solve(root, (x + noise - mean).T)
    nats = np.square(white).sum(0) / 2 + np.log(np.diag(root)).sum() + dim * math.log(2 * math.pi) / 2
    return mean_and_error(nats / (dim * math.log(2)))
