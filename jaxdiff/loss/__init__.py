"""Per-example training losses (b,); the caller takes the mean.

    t ~ times,  eps ~ N(0, 1),  x_t = alpha x0 + sigma eps
    loss = w(schedule, target, t) mean[(net(x_t, t) - (a x0 + b eps))^2]      the mean over all but the batch
    eps + offset N(0, 1), one number for each example and channel             with an offset

`weighting` holds the factors w, `times` the distributions of t, `bound` the hybrid loss and the bound's terms.
"""

import jax
import jax.numpy as jnp

from jaxdiff.denoise import TimeInput, call_net, check_output, time_t
from jaxdiff.loss import bound, times, weighting
from jaxdiff.loss.bound import as_data, batch_mean, draw, hybrid
from jaxdiff.loss.times import (
    LossHistory,
    Times,
    antithetic,
    discrete,
    importance,
    log_normal,
    logit_normal,
    loss_history,
    record,
    stratified,
    uniform,
)
from jaxdiff.loss.weighting import Weighting, edm, likelihood, min_snr, on_x0, p2, sigmoid, simple, snr
from jaxdiff.process import normal, q_sample
from jaxdiff.target import encode
from jaxdiff.types import Array, Key, Net, Schedule, Target

__all__ = [
    "LossHistory",
    "Times",
    "Weighting",
    "antithetic",
    "bound",
    "diffusion",
    "diffusion_with_aux",
    "discrete",
    "edm",
    "hybrid",
    "importance",
    "likelihood",
    "log_normal",
    "logit_normal",
    "loss_history",
    "min_snr",
    "on_x0",
    "p2",
    "prior_preservation",
    "record",
    "sigmoid",
    "simple",
    "snr",
    "stratified",
    "times",
    "uniform",
    "weighting",
]


def diffusion(
    key: Key,
    net: Net,
    x0: Array,
    *,
    schedule: Schedule,
    target: Target,
    weighting: Weighting = simple,
    times: Times = uniform,
    time_input: TimeInput = time_t,
    scale_input: TimeInput | None = None,
    offset: float = 0.0,
) -> Array:
    """The weighted denoising loss (b,) of `net` on data x0 (b, ...) (Ho et al. 2020, eq. 14, for any target).

    `weighting` is the factor on the squared error of the target, `times` draws t; `time_input` and `scale_input` as in
    `denoise.from_net`. `offset` moves the noise of each channel as a whole, so that the network learns to change the
    mean of a picture (Guttenberg 2023, "Diffusion with offset noise", with 0.1).
    Raises ConfigError if the network's output does not have the shape of x0, or x0 is integers.
    """
    return diffusion_with_aux(
        key,
        net,
        x0,
        schedule=schedule,
        target=target,
        weighting=weighting,
        times=times,
        time_input=time_input,
        scale_input=scale_input,
        offset=offset,
    )[0]


def diffusion_with_aux(
    key: Key,
    net: Net,
    x0: Array,
    *,
    schedule: Schedule,
    target: Target,
    weighting: Weighting = simple,
    times: Times = uniform,
    time_input: TimeInput = time_t,
    scale_input: TimeInput | None = None,
    offset: float = 0.0,
) -> tuple[Array, dict[str, Array]]:
    """`diffusion`, and what was drawn, each (b,): t, logsnr, mse (unweighted), loss (without importance weights)."""
    x0 = as_data(x0)
    key_t, key_eps = jax.random.split(key)
    t, importance_weight = draw(times, key_t, x0)
    eps = _noise(key_eps, x0, offset)
    x_t = q_sample(schedule, x0, eps, t)
    raw = call_net(net, x_t, t, schedule=schedule, time_input=time_input, scale_input=scale_input)
    error = check_output(raw, x_t) - encode(target, schedule, x0, eps, t)
    mse = batch_mean(jnp.square(error))
    loss = weighting(schedule, target, t) * mse
    return importance_weight * loss, {"t": t, "logsnr": schedule.logsnr(t), "mse": mse, "loss": loss}


def prior_preservation(losses: Array, weight: float = 1.0) -> Array:
    """Losses (2 b,), the first half of a subject, the second of other pictures of its class -> instance + weight prior.

    (b,); what keeps a model from forgetting the class while it learns the subject (Ruiz et al. 2023, eq. 2).
    """
    instance, prior = jnp.split(losses, 2)
    return instance + weight * prior


def _noise(key: Key, x0: Array, offset: float) -> Array:
    if not offset:
        return normal(key, x0.shape, x0.dtype)
    key_eps, key_offset = jax.random.split(key)
    shared = normal(key_offset, (x0.shape[0], *[1] * (x0.ndim - 2), x0.shape[-1]), x0.dtype)
    return normal(key_eps, x0.shape, x0.dtype) + offset * shared
