"""From a network to a denoiser: D(x_t, t) = E[x0 | x_t], the seam that all samplers and guidances share.

    D(x_t, t) = x0 of the 2 x 2 system of `target`, with value = net(scale_input * x_t, time_input(t))

EDM's preconditioning (Karras et al. 2022, eq. 7): target = edm(sd), time_input = c_noise, scale_input = edm_scale(sd).
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp

from jaxdiff import target as targets
from jaxdiff.errors import ConfigError
from jaxdiff.schedule import as_float, expand
from jaxdiff.types import Array, Denoiser, Net, Schedule, Target

TimeInput: TypeAlias = Callable[[Schedule, Array], Array]
"""`time_input(schedule, t) -> (b,)`: what the network is told about the time; also the shape of a `scale_input`."""


class LearnedRange(NamedTuple):
    """A denoiser's answer where the network also learned the variance (Nichol & Dhariwal 2021, eq. 15).

    log variance = fraction log beta_t + (1 - fraction) log beta-tilde_t, with fraction like x0.
    """

    x0: Array
    fraction: Array


class LearnedVariance(NamedTuple):
    """A denoiser's answer where the network predicts the log-variance of q(x_s | x_t) itself, for its own chain's s.

    Nichol & Dhariwal 2021, sec. 3.1, prefer a `LearnedRange`, which also belongs to longer steps.
    """

    x0: Array
    log_variance: Array


def estimate(answer: Any) -> Array:
    """The x0 of a denoiser's answer: an array, a `LearnedRange` or a `LearnedVariance`."""
    return answer.x0 if isinstance(answer, LearnedRange | LearnedVariance) else answer


def map_x0(function: Callable[..., Array], *answers: Any) -> Any:
    """`function` of the x0 of denoisers' answers; a learned variance stays that of the first of them."""
    x0 = function(*map(estimate, answers))
    return answers[0]._replace(x0=x0) if isinstance(answers[0], LearnedRange | LearnedVariance) else x0


def time_t(schedule: Schedule, t: Array) -> Array:
    """t itself, in [0, 1]."""
    return t


def time_index(T: int = 1000) -> TimeInput:
    """The index t T - 1 of a chain of T steps, as a float and at least 0: 0 at t = 1/T, T - 1 at t = 1."""

    def time_input(schedule: Schedule, t: Array) -> Array:
        return jnp.maximum(t * T - 1, 0)

    return time_input


def time_logsnr(schedule: Schedule, t: Array) -> Array:
    """The log-SNR, in [-80, 80]."""
    return schedule.logsnr(t)


def c_noise(schedule: Schedule, t: Array) -> Array:
    """log(sigma / alpha) / 4 (Karras et al. 2022, Table 1)."""
    return -schedule.logsnr(t) / 8


def edm_scale(sigma_data: float = 0.5) -> TimeInput:
    """EDM's c_in for x_t / alpha: 1 / sqrt(sigma^2 + sigma_data^2 alpha^2) for x_t (Karras et al. 2022, Table 1)."""

    def scale_input(schedule: Schedule, t: Array) -> Array:
        return 1 / jnp.sqrt(jnp.square(schedule.sigma(t)) + jnp.square(sigma_data * schedule.alpha(t)))

    return scale_input


def call_net(
    net: Net,
    x_t: Array,
    t: Array,
    *,
    schedule: Schedule,
    time_input: TimeInput = time_t,
    scale_input: TimeInput | None = None,
) -> Array:
    """The raw output of `net` at x_t (b, ...) and t, a scalar or (b,), in at least float32."""
    x_t = as_float(x_t)
    t = jnp.broadcast_to(jnp.asarray(t).astype(x_t.dtype), x_t.shape[:1])
    x = x_t if scale_input is None else x_t * expand(scale_input(schedule, t), x_t)
    return as_float(net(x, time_input(schedule, t)))


def from_net(
    net: Net,
    *,
    schedule: Schedule,
    target: Target,
    time_input: TimeInput = time_t,
    scale_input: TimeInput | None = None,
    learned_range: bool = False,
    learned: bool = False,
) -> Denoiser:
    """The denoiser D(x_t, t) -> x0 of a network that outputs `target`; computes in float32, returns x_t.dtype.

    `time_input` and `scale_input` must be those it was trained with. With `learned_range` or `learned` the network has
    twice the channels: the second half is 2 fraction - 1 of a `LearnedRange`, or the logarithm of a `LearnedVariance`,
    which the denoiser returns. Raises ConfigError for both at once, and if the network's output does not have the shape
    of x_t (or twice its channels).
    """
    if learned_range and learned:
        raise ConfigError("give learned_range=True or learned=True, got both: a network has one variance.")

    def denoise(x_t: Array, t: Array) -> Array | LearnedRange | LearnedVariance:
        raw = call_net(net, x_t, t, schedule=schedule, time_input=time_input, scale_input=scale_input)
        value, variance = split_variance(raw, x_t) if learned_range or learned else (check_output(raw, x_t), None)
        x0 = targets.decode(target, schedule, x_t, value, t)[0].astype(x_t.dtype)
        if variance is None:
            return x0
        variance = variance.astype(x_t.dtype)
        return LearnedVariance(x0, variance) if learned else LearnedRange(x0, (variance + 1) / 2)

    return denoise  # pyright: ignore[reportReturnType]


def check_output(raw: Array, x_t: Array) -> Array:
    """`raw`, if it has the shape of `x_t`; else ConfigError."""
    if raw.shape != x_t.shape:
        raise ConfigError(
            f"the network must return the shape of its input, {x_t.shape}, got {raw.shape}."
            " For a network with a learned variance, use learned_range=True."
        )
    return raw


def split_variance(raw: Array, x_t: Array) -> tuple[Array, Array]:
    """The two halves of a network output with twice the channels of `x_t`; else ConfigError."""
    wanted = (*x_t.shape[:-1], 2 * x_t.shape[-1])
    if raw.shape != wanted:
        raise ConfigError(f"a network with a learned variance must return shape {wanted}, got {raw.shape}.")
    value, variance = jnp.split(raw, 2, axis=-1)
    return value, variance
