"""The training loss and the variational bound, per token: the loss in nats, the bounds in bits.

    T steps      L_T   = sum_i KL(q(x_s | x_t, x0) || p(x_s | x_t)),   t = i / T,  s = t - 1 / T
    continuous   L     = int_0^1 loss(t) dt,   loss = -k'(t) sum_y [q_y log(q_y / p_y) - q_y + p_y]   (q, p: odds)
                       = int_0^1 -k'(t) / l_t sum_masked -log p(x0 | x_t) dt                          (masked)

-log p(x0) <= L <= ... <= L_T in the mean. There is no prior term: at t = 1 nothing is left of the data; and the step to
t = 0 is the decoder. For an exact denoiser L is the entropy, and L_T exceeds it by what tokens of one step do not tell
each other. Sources: Austin et al. 2021; Campbell et al. 2022; Shi et al. 2024, eq. 5; Sahoo et al. 2024, eq. 11.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.discrete import unmask
from jaxdiff.discrete.forward import Denoise, check_logits, log_chances, q_sample
from jaxdiff.discrete.keep import inside, loss_rate
from jaxdiff.discrete.processes import Masked, Process, check_tokens
from jaxdiff.errors import ConfigError, check_count
from jaxdiff.process import example_keys, fold_keys, split_keys
from jaxdiff.types import Array, Key


def uniform_times(key: Key, b: int) -> Array:
    """Independent, uniform on (0, 1]."""
    return 1 - jax.random.uniform(key, (b,), jnp.float32)


def loss(
    key: Key, denoise: Denoise, x0: Array, process: Process, *, times: Callable[[Key, int], Array] = uniform_times
) -> Array:
    """The continuous-time training loss (b,) of tokens x0 (b, n), nats per token; its mean over t is the bound.

    Masked: cross entropy of the masked tokens with the weight -k' / l (MD4, MDLM); uniform: the KL of the jump rates.
    `times(key, b)` draws t, e.g. `jaxdiff.loss.antithetic`. Wrap a bare network by `from_net`.
    Raises ConfigError for unusable tokens or logits.
    """
    key_t, key_x = jax.random.split(key)
    x0 = check_tokens("x0", x0, process.vocab)
    t = inside(times(key_t, x0.shape[0]))
    x_t = q_sample(key_x, process, x0, t)
    return rate(process, denoise(x_t, t), x0, x_t, t)


def rate(process: Process, logits: Array, x0: Array, x_t: Array, t: Array) -> Array:
    """The loss (b,) at given x_t and t, nats per token and unit of time: the limit T KL of `kl` for T steps."""
    return _odds_kl(process, jax.nn.log_softmax(check_logits(process, logits, x_t)), x0, x_t, t) * loss_rate(
        process.schedule, jnp.broadcast_to(t, x0.shape[:1])
    ).astype(logits.dtype)


def kl(process: Process, logits: Array, x0: Array, x_t: Array, t: Array, s: Array) -> Array:
    """KL(q(x_s | x_t, x0) || p(x_s | x_t)) (b,), nats per token; at s = 0 it is -log p(x0 | x_t), the decoder."""
    log_p = jax.nn.log_softmax(check_logits(process, logits, x_t))
    odds, stay = process.divergence(log_p, x0, x_t, t, s)
    return jnp.mean(process.gained(t, s, odds) * odds + stay, axis=1)


def variational_bound(key: Key, denoise: Denoise, x0: Array, process: Process, *, T: int) -> Array:
    """The bound (b,) on -log2 p(x0) per token by T steps, one random x_t at each: the likelihood of `ancestral`.

    Masked: along one random path, in which each token is scored once, in at most min(T, n) calls of the network.
    Raises ConfigError for T < 1, unusable tokens or logits.
    """
    T = check_count("T", T, "For infinitely many steps use continuous_bound.")
    x0 = check_tokens("x0", x0, process.vocab)
    keys = example_keys(key, x0.shape[0])
    if isinstance(process, Masked):
        times = jnp.asarray(np.linspace(1, 0, T + 1), jnp.float32)
        plan = unmask.compact(unmask.on_grid(keys, process, _noise(process, x0), times))
        return _path(denoise, process, x0, plan)

    def step(total: Array, i: Array) -> tuple[Array, None]:
        t, s = (i + 1).astype(jnp.float32) / T, i.astype(jnp.float32) / T
        x_t = q_sample(fold_keys(keys, i), process, x0, t)
        log_p = log_chances(process, denoise, x_t, t)
        return total + kl(process, log_p, x0, x_t, t, s).astype(total.dtype), None

    total, _ = jax.lax.scan(step, jnp.zeros(x0.shape[:1], jnp.float32), jnp.arange(T))
    return total / math.log(2)


def any_order_bound(key: Key, denoise: Denoise, x0: Array, process: Masked) -> Array:
    """The bound (b,) of infinitely many steps for `masked`, bits per token, by one random path: n calls, no grid.

    The tokens are scored one by one in a random order, each given those before it (Hoogeboom et al. 2022). By the
    chain rule an exact denoiser gives -log2 p(x0) on every path. Raises ConfigError for another process.
    """
    if not isinstance(process, Masked):
        raise ConfigError(f"any_order_bound needs discrete.masked(vocab), got {process}. Use continuous_bound.")
    x0 = check_tokens("x0", x0, process.vocab)
    plan = unmask.by_hitting(example_keys(key, x0.shape[0]), process, _noise(process, x0))
    return _path(denoise, process, x0, plan)


def continuous_bound(key: Key, denoise: Denoise, x0: Array, process: Process, *, num_times: int) -> Array:
    """An unbiased estimate (b,) of the bound of infinitely many steps, bits per token, in num_times network calls.

    The integral is taken over lost(t), one random value in each of num_times equal parts: the schedule drops out but
    for the t that the network is told. Raises ConfigError for num_times < 1, unusable tokens or logits.
    """
    num_times = check_count("num_times", num_times, "More calls of the network vary less.")
    x0 = check_tokens("x0", x0, process.vocab)
    keys = example_keys(key, x0.shape[0])

    def part(total: Array, i: Array) -> tuple[Array, None]:
        key_offset, key_x = split_keys(fold_keys(keys, i))
        offset = jax.vmap(lambda k: jax.random.uniform(k, (), jnp.float32))(key_offset)
        t = inside(process.schedule.inverse((i.astype(jnp.float32) + offset) / num_times))
        x_t = q_sample(key_x, process, x0, t)
        log_p = log_chances(process, denoise, x_t, t)
        return total + _odds_kl(process, log_p, x0, x_t, t).astype(total.dtype), None

    total, _ = jax.lax.scan(part, jnp.zeros(x0.shape[:1], jnp.float32), jnp.arange(num_times))
    return total / (num_times * math.log(2))


def _odds_kl(process: Process, log_p: Array, x0: Array, x_t: Array, t: Array) -> Array:
    """The loss per unit of lost(t): the KL of the odds to jump, with t kept where they are finite."""
    t = inside(t)
    return jnp.mean(process.divergence(log_p, x0, x_t, t, t)[0], axis=1)


def _path(denoise: Denoise, process: Masked, x0: Array, plan: unmask.Plan) -> Array:
    start = _noise(process, x0)
    score = unmask.follow(denoise, process, start, plan, lambda steps, log_p: x0, skip=True)[1]
    return -score / (x0.shape[1] * math.log(2))


def _noise(process: Masked, x0: Array) -> Array:
    return jnp.full(x0.shape, process.mask, jnp.int32)
