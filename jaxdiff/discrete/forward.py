"""The verbs of `jaxdiff.process` for tokens, and the denoiser of a network.

q(x_t | x0)            tokens kept with chance keep(t)
q(x_s | x_t, x0)       Bayes' rule
p(x_s | x_t)         = sum_x0 q(x_s | x_t, x0) p(x0 | x_t),   p(x0 | x_t) = softmax(denoise(x_t, t))
"""

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp

from jaxdiff.discrete.processes import Masked, Process, check_tokens, one_hot
from jaxdiff.errors import ConfigError
from jaxdiff.process import example_keys
from jaxdiff.schedule import as_float, expand
from jaxdiff.types import Array, Key

Denoise: TypeAlias = Callable[[Array, Array], Array]
"""`denoise(x_t, t) -> logits` of p(x0 | x_t): x_t (b, n) int32, t a scalar or (b,), logits (b, n, vocab)."""


def q_sample(key: Key, process: Process, x0: Array, t: Array) -> Array:
    """x_t (b, n) int32 of tokens x0 (b, n), each kept with chance keep(t); t a scalar or (b,). Keys as for `prior`.

    Raises ConfigError for tokens of another shape or dtype, or out of range.
    """
    x0 = check_tokens("x0", x0, process.vocab)
    lost = jnp.broadcast_to(expand(process.schedule.lost(t), x0), (x0.shape[0], 1))

    def one(key: Key, x0: Array, lost: Array) -> Array:
        key_level, key_noise = jax.random.split(key)
        return jnp.where(level(key_level, x0.shape) <= lost, process.noise(key_noise, x0.shape), x0)

    return jax.vmap(one)(example_keys(key, x0.shape[0]), x0, lost)


def prior(key: Key, process: Process, shape: tuple[int, int]) -> Array:
    """x_1 of `shape` (b, n): all masks, or uniform tokens. `key` is one key or (b,) keys, one for each example.

    Raises ConfigError for another shape.
    """
    if len(shape) != 2:
        raise ConfigError(f"shape must be (b, n), got {tuple(shape)}. Use (1, n) for one example.")
    return jax.vmap(lambda k: process.noise(k, shape[1:]))(example_keys(key, shape[0]))


def q_posterior(process: Process, x0: Array, x_t: Array, t: Array, s: Array) -> Array:
    """q(x_s | x_t, x0) as chances (b, n, states), for s <= t (Austin et al. 2021, eq. 3).

    For an x_t that x0 cannot become (masked: another token) it is x_t itself. From t to itself it is x_t.
    """
    x0 = check_tokens("x0", x0, process.vocab)
    dtype = as_float(t).dtype
    return _posterior(process, one_hot(x0, process.vocab, dtype), x_t, t, s)


def p_posterior(process: Process, logits: Array, x_t: Array, t: Array, s: Array) -> Array:
    """p(x_s | x_t) as chances (b, n, states), for s <= t, by logits (b, n, vocab) of p(x0 | x_t).

    Exact for an exact denoiser. Equation 4 of Austin et al. 2021, which weighs x0 by q(x_t | x0) once more, is this for
    a network wrapped by `from_net`. Raises ConfigError for logits of another shape.
    """
    return _posterior(process, jax.nn.softmax(check_logits(process, logits, x_t)), x_t, t, s)


def _posterior(process: Process, m: Array, x_t: Array, t: Array, s: Array) -> Array:
    x_t = check_tokens("x_t", x_t, process.states)
    stay, odds = process.reverse(m, x_t, t, s)
    jump = process.gained(t, s, odds) * odds
    jump = jnp.pad(jump, ((0, 0), (0, 0), (0, process.states - process.vocab)))
    return jump + one_hot(x_t, process.states, jump.dtype) * stay[..., None]


def from_net(net: Denoise, process: Process) -> Denoise:
    """The denoiser of a network that tells x0 from the *other* tokens: logits + log q(x_t | x0), by Bayes' rule.

    The network then need not learn to copy: D3PM's parameterisation (Austin et al. 2021, eq. 4), and for `masked`
    MDLM's, where an unmasked token stays (Sahoo et al. 2024, section 3.2.3). net(x_t, t) -> (b, n, vocab), t (b,).
    Raises ConfigError for an output of another shape.
    """

    def denoise(x_t: Array, t: Array) -> Array:
        t = jnp.broadcast_to(as_float(t), x_t.shape[:1])
        logits = check_logits(process, net(x_t, t), x_t)
        keep, lost = process.levels(t, logits)
        same = one_hot(x_t, process.vocab, logits.dtype)  # of a mask: zeros
        noise = lost / process.vocab if not isinstance(process, Masked) else jnp.zeros_like(lost)
        chance = jnp.maximum(keep * same + noise, float(jnp.finfo(logits.dtype).tiny))
        return logits + jnp.log(chance)

    return denoise


def check_logits(process: Process, logits: Array, x_t: Array) -> Array:
    """`logits` in at least float32, if they are (b, n, vocab) for x_t (b, n); else ConfigError."""
    wanted = (*x_t.shape, process.vocab)
    if logits.shape != wanted:
        raise ConfigError(
            f"denoise(x_t, t) must return logits of shape (b, n, vocab) = {wanted}, got {logits.shape}. "
            "The mask is an input, never an output."
        )
    return as_float(logits)


def log_chances(process: Process, denoise: Denoise, x: Array, t: Array) -> Array:
    """log p(x0 | x_t) (b, n, vocab), with t a scalar or (b,) given to the denoiser as (b,)."""
    t = jnp.broadcast_to(as_float(t), x.shape[:1])
    return jax.nn.log_softmax(check_logits(process, denoise(x, t), x))


def level(key: Key, shape: tuple[int, ...]) -> Array:
    """Uniform on (0, 1]: a token of this level is noise at t where level <= lost(t)."""
    return 1 - jax.random.uniform(key, shape, jnp.float32)


def gumbel(key: Key, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    """Standard Gumbel noise: argmax(log p + gumbel) is a draw from p.

    In float32 the usual -log(-log u) cannot exceed 17: rare tokens never come up (Zheng et al. 2024). This one can.
    """
    return jax.random.gumbel(key, shape, dtype, mode="high")
