"""The terms of the variational bound, in bits per dimension, and iDDPM's hybrid loss (Ho et al. 2020, eq. 5).

The whole bound is `likelihood.bits_per_dim_bound`:

bound     = L_T + sum_t L_t,       t = 1/T, 2/T, ..., 1,  s = t - 1/T
L_T       = KL(q(x_1 | x0) || N(0, sigma_1^2))
L_t       = KL(q(x_s | x_t, x0) || N(mean(x0_hat), variance))      s > 0
L_{1/T}   = -log N(x0_hat, variance) over the bin of x0, 2/255 wide; the outer bins reach to infinity

log variance = fraction log large + (1 - fraction) log small
large = sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2,   small = variance of q(x_s | x_t, x0)
"""

import math

import jax
import jax.numpy as jnp

from jaxdiff.denoise import TimeInput, call_net, split_variance, time_t
from jaxdiff.errors import ConfigError, check_count
from jaxdiff.loss.times import Times, discrete
from jaxdiff.process import normal, q_posterior, q_sample
from jaxdiff.schedule import as_float, expand
from jaxdiff.target import decode, encode
from jaxdiff.types import Array, Key, Net, Schedule, Target


def prior_term(schedule: Schedule, x0: Array, t: Array | float = 1.0) -> Array:
    """KL(q(x_t | x0) || N(0, sigma_t^2)) (b,), bits per dimension, for the time t at which the chain starts."""
    x0 = as_float(x0)
    t = jnp.asarray(t).astype(x0.dtype)
    return bits(jnp.square(x0 * expand(schedule.alpha(t) / schedule.sigma(t), x0)) / 2)


def term(
    schedule: Schedule, x0: Array, x_t: Array, t: Array, s: Array, x0_hat: Array, *, fraction: Array | float = 0.0
) -> Array:
    """L_t (b,), bits per dimension, of the model's estimate x0_hat at x_t; the decoder's where sigma_s is 0."""
    x0 = as_float(x0)
    kl, model_mean, model_log_variance = posterior_kl(schedule, x0, x_t, t, s, x0_hat, fraction=fraction)
    decoder = decoder_nll(x0, model_mean, model_log_variance / 2)
    return bits(jnp.where(expand(schedule.sigma(s), x0) > 0, kl, decoder))


def posterior_kl(
    schedule: Schedule, x0: Array, x_t: Array, t: Array, s: Array, x0_hat: Array, *, fraction: Array | float = 0.0
) -> tuple[Array, Array, Array]:
    """KL(q(x_s | x_t, x0) || the model's) in nats, elementwise, and the model's mean and log-variance."""
    x0 = as_float(x0)
    x_t, x0_hat = (as_float(u).astype(x0.dtype) for u in (x_t, x0_hat))
    mean, _, log_variance = q_posterior(schedule, x0, x_t, t, s)
    model_mean, _, _ = q_posterior(schedule, x0_hat, x_t, t, s)
    small, large = (expand(u, x0) for u in variance_range(schedule, t, s))
    fraction = as_float(fraction).astype(x0.dtype)
    model_log_variance = small + (fraction if fraction.ndim == x0.ndim else expand(fraction, x0)) * (large - small)
    return gaussian_kl(mean, log_variance, model_mean, model_log_variance), model_mean, model_log_variance


def variance_range(schedule: Schedule, t: Array, s: Array) -> tuple[Array, Array]:
    """(log small, log large), the range of the reverse variance from t to s; at s = 0 small is that of a step before.

    There the posterior variance is 0; like iDDPM we take the neighbour's (Nichol & Dhariwal 2021, section 3.1).
    """
    t, s = as_float(t), as_float(s)
    late = schedule.sigma(s) == 0
    small = _log_fresh(schedule, jnp.where(late, jnp.minimum(2 * t - s, 1), t), jnp.where(late, t, s))
    return small[0], _log_fresh(schedule, t, s)[1]


def gaussian_kl(mean: Array, log_variance: Array, other_mean: Array, other_log_variance: Array) -> Array:
    """KL(N(mean, variance) || N(other)) in nats, elementwise; finite for a log-variance at the floor."""
    gap = jnp.minimum(log_variance - other_log_variance, 40)
    distance = jnp.square(mean - other_mean) * jnp.exp(-jnp.maximum(other_log_variance, -60))
    return (jnp.exp(gap) - 1 - gap + distance) / 2


def decoder_nll(x0: Array, mean: Array, log_std: Array) -> Array:
    """-log of the mass of N(mean, std^2) in the bin of x0, 2/255 wide, in nats; exact in the tails.

    x0 is 8-bit data scaled to [-1, 1]; the bins of -1 and 1 reach to infinity (Ho et al. 2020, eq. 13).
    """
    precision = jnp.exp(-log_std)
    far = 1e4
    low = jnp.where(x0 < -0.999, -far, (x0 - mean - 1 / 255) * precision)
    high = jnp.where(x0 > 0.999, far, (x0 - mean + 1 / 255) * precision)
    # In the lower tail log Phi is precise: mirror the bin if it lies above 0.
    low, high = jnp.where(low + high > 0, -high, low), jnp.where(low + high > 0, -low, high)
    low, high = jnp.maximum(low, -far), jnp.maximum(high, -far)
    log_low, log_high = jax.scipy.special.log_ndtr(low), jax.scipy.special.log_ndtr(high)
    gap = jnp.minimum(log_low - log_high, -1e-6)
    return -(log_high + jnp.log(-jnp.expm1(gap)))


def hybrid(
    key: Key,
    net: Net,
    x0: Array,
    *,
    schedule: Schedule,
    target: Target,
    T: int = 1000,
    bound_weight: float = 0.001,
    times: Times | None = None,
    time_input: TimeInput = time_t,
    scale_input: TimeInput | None = None,
) -> Array:
    """iDDPM's L_simple + bound_weight L_vlb (b,), for a net with twice the channels (Nichol & Dhariwal 2021, eq. 16).

    The second half u in [-1, 1] of the output is the variance, fraction = (u + 1) / 2; L_vlb (T times one term, bits
    per dimension) trains only it: the mean is held fixed. `times` must lie on the chain (default `discrete(T)`).
    Raises ConfigError for T < 2, a schedule with sigma(0) > 0 (no decoder step), or an output of another shape.
    """
    _check_chain(schedule, T)
    x0 = as_data(x0)
    key_t, key_eps = jax.random.split(key)
    t, weight = draw(times or discrete(T), key_t, x0)
    eps = normal(key_eps, x0.shape, x0.dtype)
    x_t = q_sample(schedule, x0, eps, t)
    raw = call_net(net, x_t, t, schedule=schedule, time_input=time_input, scale_input=scale_input)
    value, variance = split_variance(raw, x_t)
    error = batch_mean(jnp.square(value - encode(target, schedule, x0, eps, t)))
    x0_hat = jax.lax.stop_gradient(decode(target, schedule, x_t, value, t)[0])
    s = (jnp.round(t * T) - 1) / T
    bound = term(schedule, x0, x_t, t, s, x0_hat, fraction=(variance + 1) / 2)
    return weight * (error + bound_weight * T * bound)


def as_data(x0: Array) -> Array:
    """`x0` in at least float32. Raises ConfigError for integers: 8-bit pictures would be taken for values to 255."""
    x0 = jnp.asarray(x0)
    if not jnp.issubdtype(x0.dtype, jnp.floating):
        raise ConfigError(
            f"x0 must be floating, scaled to [-1, 1], got {x0.dtype}. For 8-bit pictures use jaxdiff.data.decode(x0)."
        )
    return as_float(x0)


def draw(times: Times, key: Key, x0: Array) -> tuple[Array, Array]:
    """(t, weight), both (b,) in the dtype of `x0`, from a time sampler with or without weights."""
    drawn = times(key, x0.shape[0])
    t, weight = drawn if isinstance(drawn, tuple) else (drawn, jnp.ones_like(drawn))
    return t.astype(x0.dtype), weight.astype(x0.dtype)


def batch_mean(x: Array) -> Array:
    """The mean over all axes but the first."""
    return jnp.mean(x, axis=tuple(range(1, x.ndim)))


def bits(nats: Array) -> Array:
    """Elementwise nats (b, ...) as bits per dimension (b,)."""
    return batch_mean(nats) / math.log(2)


def _log_fresh(schedule: Schedule, t: Array, s: Array) -> tuple[Array, Array]:
    """log of c sigma_s^2 and of c sigma_t^2, c = 1 - SNR_t / SNR_s."""
    floor = float(jnp.finfo(as_float(t).dtype).tiny)
    fresh = -jnp.expm1(jnp.minimum(schedule.logsnr(t) - schedule.logsnr(s), 0))
    small, large = (jnp.log(jnp.maximum(fresh * jnp.square(schedule.sigma(u)), floor)) for u in (s, t))
    return small, large


def _check_chain(schedule: Schedule, T: int) -> None:
    check_count("T", T, "DDPM uses T=1000.", least=2)
    with jax.ensure_compile_time_eval():
        start = float(schedule.sigma(jnp.zeros(())))
    if start > 0:
        raise ConfigError(
            f"the bound needs a schedule with sigma(0) = 0, got sigma(0) = {start:g}. Use schedule.edm()."
        )
