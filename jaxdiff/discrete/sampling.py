"""Samplers: from noise, or from tokens with masks among them, to tokens.

    ancestral       x_s ~ p(x_s | x_t) over a grid of times                   any process; a network call a step
    cached          the same draws, without the steps that change nothing     masked; at most min(N, n) calls
    first_hitting   the limit of infinitely many steps, one token a step      masked; n calls
    confident       the tokens that the network is surest of, first           masked; at most N calls; not exact

A grid of N steps is N + 1 decreasing times, from 1 to 0. Tokens that are not the mask stay as they are (infilling).
"""

from math import isfinite
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxdiff.discrete import unmask
from jaxdiff.discrete.forward import Denoise, gumbel, log_chances, p_posterior
from jaxdiff.discrete.processes import Masked, Process, check_tokens, pick
from jaxdiff.errors import ConfigError, check_count
from jaxdiff.process import example_keys, fold_keys, split_keys
from jaxdiff.schedule import as_float
from jaxdiff.schedule.base import check_times
from jaxdiff.types import Array, Key


def grid(num_steps: int) -> np.ndarray:
    """t_n = 1 - n / N, n = 0 .. N, in float64. Raises ConfigError unless num_steps is an integer >= 1."""
    return np.linspace(1.0, 0.0, check_count("num_steps", num_steps, "Use discrete.grid(1) for one step.") + 1)


def ancestral(key: Key, denoise: Denoise, x: Array, times: Any, process: Process) -> Array:
    """Draw x_s ~ p(x_s | x_t) over `times`, from x (b, n) at times[0]; returns tokens (b, n) at times[-1].

    key: one key (example i gets fold_in(key, i)) or (b,) keys, one for each example. Tokens of one step are drawn
    independently: exact only as steps get many. Source: Austin et al. 2021, section 3. Raises ConfigError for unusable
    tokens, times or logits.
    """
    x, times, keys = _start(key, x, times, process)
    if isinstance(process, Masked):
        key_level, key_token = split_keys(keys)
        plan = unmask.on_grid(key_level, process, x, times)
        return unmask.follow(denoise, process, x, plan, _draw(key_token), skip=False)[0]

    def body(x: Array, step: tuple[Array, Array, Array]) -> tuple[Array, None]:
        n, t, s = step
        chances = p_posterior(process, log_chances(process, denoise, x, t), x, t, s)
        return _draw(keys)(n, jnp.log(jnp.maximum(chances, 0))), None

    return jax.lax.scan(body, x, (jnp.arange(times.shape[0] - 1), times[:-1], times[1:]))[0]


def cached(key: Key, denoise: Denoise, x: Array, times: Any, process: Masked) -> Array:
    """The very draws of `ancestral`, calling the network only where a token is filled in. Arguments as there.

    At most min(N, n) calls for N steps and n tokens, for any batch: each example goes through its own steps, so the
    network gets a time for each, t (b,). It may depend on time, unlike the cache of Sahoo et al. 2024 (section 4.2).
    """
    _check_masked("cached", process)
    x, times, keys = _start(key, x, times, process)
    key_level, key_token = split_keys(keys)
    plan = unmask.compact(unmask.on_grid(key_level, process, x, times))
    return unmask.follow(denoise, process, x, plan, _draw(key_token), skip=True)[0]


def first_hitting(key: Key, denoise: Denoise, x: Array, process: Masked) -> Array:
    """Exact for an exact denoiser, in n calls: one token a step, each at its own time (Zheng et al. 2024, alg. 1).

    Arguments as for `ancestral`; x is at t = 1.
    """
    _check_masked("first_hitting", process)
    x = check_tokens("x", x, process.states)
    key_level, key_token = split_keys(example_keys(key, x.shape[0]))
    plan = unmask.by_hitting(key_level, process, x)
    return unmask.follow(denoise, process, x, plan, _draw(key_token), skip=True)[0]


def confident(
    key: Key,
    denoise: Denoise,
    x: Array,
    times: Any,
    process: Masked,
    *,
    temperature: float = 1.0,
    choice_temperature: float = 0.0,
) -> Array:
    """MaskGIT (Chang et al. 2022, section 3.2): at each s, round(lost(s) / lost(times[0]) m) of m masks are left.

    A token is argmax(log p + temperature gumbel): 0 the likeliest, 1 a draw. Those with the largest
    log p + choice_temperature s gumbel are filled in (MaskGIT: 4.5). Steps that fill none call no network. Other
    arguments, and what is raised, as for `ancestral`; ConfigError also for a negative temperature.
    """
    _check_masked("confident", process)
    _check_temperature("temperature", temperature)
    _check_temperature("choice_temperature", choice_temperature)
    x, times, keys = _start(key, x, times, process)
    lost = process.schedule.lost(times)
    left = jnp.round(lost[1:, None] / lost[0] * jnp.sum(x == process.mask, axis=1)[None].astype(lost.dtype))

    def body(x: Array, step: tuple[Array, ...]) -> tuple[Array, None]:
        n, t, s, left = step
        masked = x == process.mask
        count = jnp.sum(masked, axis=1) - left.astype(jnp.int32)

        def fill(x: Array) -> Array:
            key_token, key_choice = split_keys(fold_keys(keys, n))
            log_p = log_chances(process, denoise, x, t)
            tokens = jnp.argmax(log_p + temperature * _gumbel(key_token, log_p), axis=-1).astype(x.dtype)
            sure = pick(log_p, tokens)
            sure = sure + choice_temperature * s.astype(sure.dtype) * _gumbel(key_choice, sure)
            order = jnp.argsort(jnp.where(masked, -sure, jnp.inf), axis=1)
            return jnp.where(jnp.argsort(order, axis=1) < count[:, None], tokens, x)

        return jax.lax.cond(jnp.any(count > 0), fill, lambda x: x, x), None

    return jax.lax.scan(body, x, (jnp.arange(times.shape[0] - 1), times[:-1], times[1:], left))[0]


def _start(key: Key, x: Array, times: Any, process: Process) -> tuple[Array, Array, Key]:
    x = check_tokens("x", x, process.states)
    return x, check_times(times, as_float(times).dtype), example_keys(key, x.shape[0])


def _gumbel(keys: Key, like: Array) -> Array:
    return jax.vmap(lambda key: gumbel(key, like.shape[1:], like.dtype))(keys)


def _draw(keys: Key) -> Any:
    """choose(steps, log_p): a token from each, by the key of the example and the number of its step."""

    def choose(steps: Array, log_p: Array) -> Array:
        return jnp.argmax(log_p + _gumbel(fold_keys(keys, steps), log_p), axis=-1).astype(jnp.int32)

    return choose


def _check_masked(name: str, process: Process) -> None:
    if not isinstance(process, Masked):
        raise ConfigError(f"{name} needs discrete.masked(vocab), got {process}. Use discrete.ancestral.")


def _check_temperature(name: str, value: float) -> None:
    if not isinstance(value, Tracer) and not (isfinite(value) and value >= 0):
        raise ConfigError(f"{name} must be finite and >= 0, got {value}. 0 takes the likeliest, 1 draws.")
