"""Time samplers: times(key, b) -> t (b,) in [0, 1], or (t, weight) where unbiasedness needs a weight.

importance:  p_i proportional to sqrt(E[L_i^2]),  weight_i = 1 / (T p_i)      (Nichol & Dhariwal 2021, eq. 18)
"""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from jaxdiff.errors import ConfigError
from jaxdiff.types import Array, Key, Schedule

Times: TypeAlias = Callable[[Key, int], Array | tuple[Array, Array]]


def uniform(key: Key, b: int) -> Array:
    """Independent, uniform on (0, 1]."""
    return 1 - jax.random.uniform(key, (b,), jnp.float32)


def stratified(key: Key, b: int) -> Array:
    """One uniform time in each of b equal parts of (0, 1]: lower variance of the batch mean."""
    return 1 - (jnp.arange(b, dtype=jnp.float32) + jax.random.uniform(key, (b,), jnp.float32)) / b


def antithetic(key: Key, b: int) -> Array:
    """An equidistant grid with one random offset, wrapped to (0, 1] (Kingma et al. 2021, appendix I.1)."""
    return 1 - (jax.random.uniform(key, (), jnp.float32) + jnp.arange(b, dtype=jnp.float32) / b) % 1


def discrete(T: int = 1000) -> Times:
    """Uniform over the T steps of a chain, t = (i + 1) / T (Ho et al. 2020, Algorithm 1)."""
    _check_count("T", T)
    return lambda key, b: (jax.random.randint(key, (b,), 0, T) + 1).astype(jnp.float32) / T


def logit_normal(mean: float = 0.0, std: float = 1.0) -> Times:
    """t = sigmoid(n), n ~ N(mean, std^2) (Esser et al. 2024, eq. 19)."""
    _check_std(std)
    return lambda key, b: jax.nn.sigmoid(mean + std * jax.random.normal(key, (b,), jnp.float32))


def log_normal(schedule: Schedule, *, mean: float = -1.2, std: float = 1.2) -> Times:
    """log(sigma / alpha) ~ N(mean, std^2), through the inverse of the schedule (Karras et al. 2022, Table 1)."""
    _check_std(std)
    return lambda key, b: schedule.inverse(-2 * (mean + std * jax.random.normal(key, (b,), jnp.float32)))


class LossHistory(NamedTuple):
    """The last losses seen at each of the T steps of a chain, the state of `importance`."""

    losses: Array
    """(T, size)"""
    counts: Array
    """(T,) int32, how many were ever recorded."""


def loss_history(T: int = 1000, *, size: int = 10) -> LossHistory:
    """An empty history of `size` losses for each of T steps; until it is full, `importance` is uniform."""
    _check_count("T", T)
    _check_count("size", size)
    return LossHistory(jnp.zeros((T, size), jnp.float32), jnp.zeros((T,), jnp.int32))


def record(history: LossHistory, t: Array, losses: Array) -> LossHistory:
    """`history` with the losses (b,) seen at t (b,), the oldest replaced. Give losses without importance weights."""
    T, size = history.losses.shape
    index = jnp.clip(jnp.round(t * T).astype(jnp.int32) - 1, 0, T - 1)

    def one(state: LossHistory, seen: tuple[Array, Array]) -> tuple[LossHistory, None]:
        i, loss = seen
        values = state.losses.at[i, state.counts[i] % size].set(loss)
        return LossHistory(values, state.counts.at[i].add(1)), None

    return jax.lax.scan(one, history, (index, losses.astype(history.losses.dtype)))[0]


def importance(history: LossHistory, *, uniform_share: float = 0.001) -> Times:
    """Times drawn with p_i ~ sqrt(E[L_i^2]) and the weights that keep the loss unbiased (Nichol & Dhariwal 2021).

    Uniform until every step has a full history, and for `uniform_share` of the draws after that. Build it inside the
    jitted step, from the history in the state. Raises ConfigError unless 0 < uniform_share <= 1.
    """
    if not 0 < uniform_share <= 1:
        raise ConfigError(f"uniform_share must be in (0, 1], got {uniform_share}. iDDPM uses uniform_share=0.001.")
    T, size = history.losses.shape
    rms = jnp.sqrt(jnp.mean(jnp.square(history.losses), axis=1))
    total = jnp.sum(rms)
    ready = jnp.all(history.counts >= size) & (total > 0)
    p = jnp.where(ready, (1 - uniform_share) * rms / jnp.where(ready, total, 1) + uniform_share / T, 1 / T)

    def times(key: Key, b: int) -> tuple[Array, Array]:
        index = jax.random.categorical(key, jnp.log(p), shape=(b,))
        return (index + 1).astype(jnp.float32) / T, 1 / (T * p[index])

    return times


def _check_count(name: str, value: int) -> None:
    if not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} must be an integer >= 1, got {value!r}.")


def _check_std(std: float) -> None:
    if not std > 0:
        raise ConfigError(
            f"std must be positive, got {std}. For a fixed time, pass times=lambda key, b: jnp.full(b, t)."
        )
