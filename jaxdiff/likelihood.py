"""Likelihood, in nats and in bits per dimension: by the probability flow, and from above by the variational bound.

Written on the circle, where all schedules are one curve and the flow is finite at both ends:

    y = x_t / r,   r^2 = alpha^2 + sigma^2,   tan(theta) = sigma / alpha,   y = cos(theta) x0 + sin(theta) eps
    dy/dtheta = v = (cos y - D) / sin                     the probability flow (Song et al. 2021, eq. 13)
    d log p(y)/dtheta = -div v                            (Chen et al. 2018, eq. 8)
    log p(x_0) = log N(x_1; 0, sigma_1^2) + int div v dtheta + d log(r_1 / r_0)

    bound      L = KL(q(x_1 | x0) || N(0, sigma_1^2)) + diffusion - log p(x0 | x_t of the last step)
    discrete   diffusion = sum of KL(q(x_s | x_t, x0) || p(x_s | x_t))            (Ho et al. 2020, eq. 5)
    continuous diffusion = -1/2 int SNR'(t) |x0 - D|^2 dt = int |x0 - D|^2 cos / sin^3 dtheta   (Kingma et al. 2021)

All of it over a grid of times as for `sample`, from 1 (noise) to 0. The flow may end at sigma = 0: v and div v are
taken as 0 there, their limit for any density with a finite score; and start at alpha = 0. The last step of a bound is
its decoder, so the grid sets the cap: `sample.exponential_grid(schedule, 100, sigma_min=0.001)` decodes x_t of
sigma / alpha = 0.001. In float32 choose no less than 0.0003: the factor 1 / sigma^2 meets rounding errors.

Pixels u of 8 bits are x0 = u / 127.5 - 1, bins 2/255 wide:  bits/dim of a density = -log2 p(x0) / d + log2(127.5).

    >>> import jaxdiff as jd
    >>> flow, x0 = jd.schedule.rectified_flow(), jnp.zeros((1, 2))
    >>> denoise = lambda x, t: (1 - t) * x / ((1 - t) ** 2 + t**2)  # data of N(0, 1)
    >>> nats = log_prob(jax.random.key(0), denoise, x0, jd.sample.log_snr_grid(flow, 20), schedule=flow)
    >>> round(nats.item(), 3)  # -log(2 pi)
    -1.838
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from jaxdiff.denoise import LearnedRange, LearnedVariance, estimate
from jaxdiff.errors import ConfigError, check_count
from jaxdiff.loss.bound import as_data, bits, decoder_nll, posterior_kl, prior_term, variance_range
from jaxdiff.process import example_keys, fold_keys, normal, q_sample, split_keys
from jaxdiff.sample import checked
from jaxdiff.schedule import expand
from jaxdiff.schedule.base import check_times
from jaxdiff.types import Array, Denoiser, Key, PyTree, Schedule

Divergence: TypeAlias = Callable[[Key, Callable[[Array], Array], Array], tuple[Array, Array]]
"""`divergence(keys, field, y) -> (field(y), div field (b,))`; keys are (b,), one per example."""

Probe: TypeAlias = Callable[..., Array]
"""`probe(key, shape, dtype)` of mean 0 and covariance 1, as `jax.random.rademacher` and `jax.random.normal`."""

BIN_BITS = math.log2(127.5)
"""-log2 of the width of an 8-bit bin in [-1, 1]."""


class Decoder(NamedTuple):
    """-log p(x0 | x_t) in the last step of a bound: a normal around the estimate, and what is asked of it."""

    nll: Callable[[Array, Array, Array], Array]
    """(x0, mean, log_std) -> nats, elementwise."""
    fraction: float
    """Where its log variance lies between DDPM's small (0) and large, sigma_t^2 (1)."""


class Bound(NamedTuple):
    """A variational bound and its parts, in bits per dimension."""

    total: Array
    """(b,) prior + the sum of terms."""
    prior: Array
    """(b,) KL(q(x_1 | x0) || N(0, sigma_1^2))."""
    terms: Array
    """(num_steps, b) in the order of rising t, row 0 the decoder."""


def _normal_nll(x0: Array, mean: Array, log_std: Array) -> Array:
    return jnp.square((x0 - mean) * jnp.exp(-log_std)) / 2 + log_std + math.log(2 * math.pi) / 2


eight_bit = Decoder(decoder_nll, 0.0)
"""The mass in the bin of x0, an 8-bit value, with DDPM's small variance (Ho et al. 2020, eq. 13)."""

density = Decoder(_normal_nll, 1.0)
"""The density at x0, for data without bins; its variance is the posterior's of any smooth density at small sigma."""


def exact(keys: Key, field: Callable[[Array], Array], y: Array) -> tuple[Array, Array]:
    """The divergence itself: d reverse-mode products at once, so for low dimension (d up to some dozens).

    Reverse mode, since networks with a `custom_vjp` (all U-Nets of `nets`) have no forward mode.
    """
    value, pull = jax.vjp(field, y)
    axes = tuple(range(1, y.ndim))

    def one(unit: Array) -> Array:
        return jnp.sum(unit[None] * pull(jnp.broadcast_to(unit, y.shape))[0], axes)

    units = jnp.eye(math.prod(y.shape[1:]), dtype=y.dtype).reshape(-1, *y.shape[1:])
    return value, jnp.sum(jax.vmap(one)(units), axis=0)


def hutchinson(num_probes: int = 1, *, probe: Probe = jax.random.rademacher) -> Divergence:
    """The mean of z . J z over random z, unbiased (Grathwohl et al. 2019, eq. 7); a pass through the network a probe.

    Probes are new at every stage of every step, which is unbiased too and varies less than one for the whole path.
    Rademacher probes vary less than normal ones. Raises ConfigError unless num_probes is an integer >= 1.
    """
    num_probes = check_count("num_probes", num_probes, "Without probes: divergence=exact.")

    def divergence(keys: Key, field: Callable[[Array], Array], y: Array) -> tuple[Array, Array]:
        value, pull = jax.vjp(field, y)

        def one(i: Array) -> Array:
            z = jax.vmap(lambda k: probe(k, y.shape[1:], y.dtype))(fold_keys(keys, i))
            return jnp.sum(z * pull(z)[0], tuple(range(1, y.ndim)))

        return value, jnp.mean(jax.lax.map(one, jnp.arange(num_probes)), axis=0)

    return divergence


def transport(
    key: Key, denoise: Denoiser, x: Array, times: Any, *, schedule: Schedule, divergence: Divergence | None = None
) -> tuple[Array, Array]:
    """Carry data x (b, ...) at times[-1] along the flow to x_1 at times[0]: (x_1, log p(x) - log p(x_1) (b,), nats).

    Kutta's method of order 4 in theta, four calls of `denoise` and its reverse mode a step, in one scan. `times` as for
    `sample`; `divergence` is `hutchinson()` by default, or `exact`. Keys and errors as for `sample`.
    """
    x, times, keys, denoise = _prepare(key, denoise, x, times)
    times = times[::-1]
    divergence = hutchinson() if divergence is None else divergence
    angles = jnp.arctan2(schedule.sigma(times), schedule.alpha(times))

    def step(state: PyTree, row: tuple[Array, Array, Array]) -> tuple[PyTree, None]:
        n, start, stop = row

        def slope(stage: Array, state: PyTree, theta: Array) -> PyTree:
            field = partial(_velocity, denoise, schedule, theta)
            return divergence(fold_keys(keys, 4 * n + stage), field, state[0])

        return _runge_kutta(slope, state, start, stop), None

    first, last = (jnp.hypot(schedule.alpha(t), schedule.sigma(t)) for t in (times[0], times[-1]))
    start = (x / first, jnp.zeros(x.shape[:1], x.dtype))
    (y, change), _ = jax.lax.scan(step, start, (jnp.arange(len(angles) - 1), angles[:-1], angles[1:]))
    return y * last, change + math.prod(x.shape[1:]) * jnp.log(last / first)


def log_prob(
    key: Key, denoise: Denoiser, x0: Array, times: Any, *, schedule: Schedule, divergence: Divergence | None = None
) -> Array:
    """log p(x0) (b,) in nats of what the probability flow makes of N(0, sigma(1)^2) (Song et al. 2021, eq. 39).

    The density of x at times[-1]: for `ve` that is the data with its sigma(0) of noise. Arguments, errors: `transport`.
    `sample.log_snr_grid(schedule, 20)` is right to 0.1 % on smooth data of unit scale.
    """
    x, change = transport(key, denoise, x0, times, schedule=schedule, divergence=divergence)
    std = schedule.sigma(jnp.asarray(times)[0].astype(x.dtype))
    terms = -jnp.square(x / std) / 2 - jnp.log(std) - math.log(2 * math.pi) / 2
    return change + jnp.sum(terms, axis=tuple(range(1, x.ndim)))


def bits_per_dim_ode(
    key: Key, denoise: Denoiser, x0: Array, times: Any, *, schedule: Schedule, divergence: Divergence | None = None
) -> Array:
    """Bits per dimension (b,) of 8-bit data x0 in [-1, 1] by the flow, with uniform dequantisation: one draw of it.

    In expectation not below -log2 P(x0) of the model that rounds its samples to 8 bits (Theis et al. 2016), nor, over
    the data, below their entropy. For data without bins use `log_prob`. Arguments, errors: `transport`.
    """
    x0 = as_data(x0)
    key_bin, key_probe = split_keys(example_keys(key, x0.shape[0]))
    x = dequantize(key_bin, x0)
    nats = log_prob(key_probe, denoise, x, times, schedule=schedule, divergence=divergence)
    return BIN_BITS - nats / (math.prod(x0.shape[1:]) * math.log(2))


def dequantize(key: Key, x0: Array) -> Array:
    """x0, 8-bit values in [-1, 1], plus noise uniform over their bins of width 2/255; keys as for `sample`.

    The bins lie around the values, as in training: x stays in [-1 - 1/255, 1 + 1/255].
    """
    x0 = as_data(x0)
    keys = example_keys(key, x0.shape[0])
    return x0 + jax.vmap(lambda k: jax.random.uniform(k, x0.shape[1:], x0.dtype, -1 / 255, 1 / 255))(keys)


def bits_per_dim_bound(
    key: Key,
    denoise: Denoiser,
    x0: Array,
    times: Any,
    *,
    schedule: Schedule,
    fraction: float = 0.0,
    decoder: Decoder = eight_bit,
) -> Bound:
    """The bound on -log2 p(x0) per dimension of the chain over `times`, one random x_t at each; x0 in [-1, 1].

    DDPM's own chain is times = np.linspace(1, 0, T + 1). `fraction` chooses the variance: 0 is the fixed small one, 1
    the fixed large; a denoiser that returns a `LearnedRange` or `LearnedVariance` brings its own, in the decoder too.
    `decoder` is `eight_bit`, or `density` for data without bins. Keys, times and errors as for `sample`.
    """

    def cost(x0: Array, x_t: Array, row: tuple[Array, Array, Array], answer: Any) -> Array:
        _, t, s = row
        part = _fraction(schedule, answer, fraction, t, s)
        return bits(posterior_kl(schedule, x0, x_t, t, s, estimate(answer), fraction=part)[0])

    return _bound(key, denoise, x0, times, schedule, decoder, lambda keys, t, s: t, cost)


def bits_per_dim_continuous(
    key: Key, denoise: Denoiser, x0: Array, times: Any, *, schedule: Schedule, decoder: Decoder = eight_bit
) -> Bound:
    """The bound of infinitely many steps (Kingma et al. 2021): one random time in each interval.

    An unbiased estimate for any grid: a finer one only lowers its variance. The last interval is the decoder's. The
    schedule matters only through its ends. Arguments and errors as for `bits_per_dim_bound`.
    """

    def angle(t: Array) -> Array:
        return jnp.arctan2(schedule.sigma(t), schedule.alpha(t))

    def within(keys: Key, t: Array, s: Array) -> Array:
        u = jax.vmap(lambda k: jax.random.uniform(k, (), t.dtype))(keys)
        return _time(schedule, angle(s) + u * (angle(t) - angle(s)))

    def cost(x0: Array, x_t: Array, row: tuple[Array, Array, Array], answer: Any) -> Array:
        time, t, s = row
        alpha, sigma = expand(schedule.alpha(time), x0), expand(schedule.sigma(time), x0)
        error = jnp.square((x0 - estimate(answer)) * jnp.hypot(alpha, sigma) / sigma)
        return bits(error * (alpha / sigma) * (angle(t) - angle(s)))

    return _bound(key, denoise, x0, times, schedule, decoder, within, cost)


def _bound(
    key: Key,
    denoise: Denoiser,
    x0: Array,
    times: Any,
    schedule: Schedule,
    decoder: Decoder,
    draw_time: Callable[[Key, Array, Array], Array],
    cost: Callable[[Array, Array, tuple[Array, Array, Array], Any], Array],
) -> Bound:
    """The sum over the steps t > s of `cost` at a time of `draw_time`; the last step decodes from t instead."""
    x0, times, keys, denoise = _prepare(key, denoise, x0, times)
    count = times.shape[0] - 1

    def one(carry: None, step: tuple[Array, Array, Array]) -> tuple[None, Array]:
        n, t, s = step
        last = n == count - 1
        key_time, key_eps = split_keys(fold_keys(keys, n))
        time = jnp.where(last, t, draw_time(key_time, t, s))
        x_t = q_sample(schedule, x0, normal(key_eps, x0.shape, x0.dtype), time)
        answer = denoise(x_t, time)
        return carry, jnp.where(last, _decode(schedule, decoder, x0, answer, t, s), cost(x0, x_t, (time, t, s), answer))

    _, terms = jax.lax.scan(one, None, (jnp.arange(count), times[:-1], times[1:]))
    prior = prior_term(schedule, x0, times[0])
    return Bound(prior + jnp.sum(terms, axis=0), prior, terms[::-1])


def _decode(schedule: Schedule, decoder: Decoder, x0: Array, answer: Any, t: Array, s: Array) -> Array:
    """-log2 p(x0 | x_t) per dimension; where sigma_s > 0 (VE) the variance is (sigma_t / alpha_t)^2."""
    small, large = variance_range(schedule, t, s)
    part = _fraction(schedule, answer, decoder.fraction, t, s)
    log_variance = jnp.where(schedule.sigma(s) > 0, -schedule.logsnr(t), small + part * (large - small))
    return bits(decoder.nll(x0, estimate(answer), jnp.broadcast_to(log_variance / 2, x0.shape)))


def _fraction(schedule: Schedule, answer: Any, fixed: float, t: Array, s: Array) -> Any:
    if isinstance(answer, LearnedVariance):
        small, large = variance_range(schedule, t, s)
        return (answer.log_variance - small) / (large - small)
    return answer.fraction if isinstance(answer, LearnedRange) else fixed


def _prepare(key: Key, denoise: Denoiser, x: Array, times: Any) -> tuple[Array, Array, Key, Denoiser]:
    x = as_data(x)
    if x.ndim < 2:
        raise ConfigError(f"x0 must have shape (b, ...), got {x.shape}. For numbers use x0[:, None].")
    return x, check_times(times, x.dtype), example_keys(key, x.shape[0]), checked(denoise)


def _time(schedule: Schedule, theta: Array) -> Array:
    """The time of an angle: 0 and 1 at its ends, through the clamp of the log-SNR."""
    log_cos, log_sin = (jnp.log(jnp.maximum(u, 1e-30)) for u in (jnp.cos(theta), jnp.sin(theta)))
    return schedule.inverse(2 * (log_cos - log_sin))


def _velocity(denoise: Denoiser, schedule: Schedule, theta: Array, y: Array) -> Array:
    t = _time(schedule, theta)
    alpha, sigma = expand(schedule.alpha(t), y), expand(schedule.sigma(t), y)
    r = jnp.hypot(alpha, sigma)
    return jnp.where(sigma > 0, (alpha * y - r * estimate(denoise(r * y, t))) / jnp.where(sigma > 0, sigma, 1), 0)


def _runge_kutta(slope: Callable[[Array, PyTree, Array], PyTree], state: PyTree, start: Array, stop: Array) -> PyTree:
    """A step of Kutta's method of order 4, as a loop over its stages: the network is compiled once, not four times."""
    h = stop - start

    def stage(carry: tuple[PyTree, PyTree], row: tuple[Array, Array, Array]) -> tuple[tuple[PyTree, PyTree], None]:
        (k, total), (i, node, weight) = carry, row
        k = slope(i, jax.tree.map(lambda u, du: u + node * h * du, state, k), start + node * h)
        return (k, jax.tree.map(lambda u, du: u + weight * h * du, total, k)), None

    nodes, weights = (jnp.asarray(u, h.dtype) for u in ((0, 1 / 2, 1 / 2, 1), (1 / 6, 1 / 3, 1 / 3, 1 / 6)))
    zero = jax.tree.map(jnp.zeros_like, state)
    return jax.lax.scan(stage, (zero, state), (jnp.arange(4), nodes, weights))[0][1]
