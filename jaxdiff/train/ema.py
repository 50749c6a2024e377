"""Exponential moving averages of the parameters.

    ema_{n+1} = ema_n + (1 - d(n)) (params_{n+1} - ema_n),   ema_0 = params_0,   n = 0, 1, ... updates made so far

A decay d is a function of n. Because the average starts from the parameters and not from zero it needs no
debiasing: constant parameters are reproduced exactly, whatever the decay.
"""

from collections.abc import Callable, Mapping
from typing import TypeAlias

import jax
import jax.numpy as jnp

from jaxdiff.errors import ConfigError
from jaxdiff.types import Array, PyTree

Decay: TypeAlias = Callable[[Array], Array]
"""`decay(n) -> d` in [0, 1], for the () float32 number of updates made before this one."""


def _check(decay: float) -> None:
    if not 0.0 <= decay < 1.0:
        raise ConfigError(f"an EMA decay must be in [0, 1), got {decay}. A usual value is 0.9999.")


def constant(decay: float) -> Decay:
    """The same decay at every update (DDPM, appendix B: 0.9999)."""
    _check(decay)
    return lambda n: jnp.full_like(n, decay)


def warmed(decay: float) -> Decay:
    """min(decay, (1 + n) / (10 + n)): short memory at first, so that early averages forget the initial values.

    The warm-up of TensorFlow's ExponentialMovingAverage(num_updates=n).
    """
    _check(decay)
    return lambda n: jnp.minimum(jnp.full_like(n, decay), (1.0 + n) / (10.0 + n))


def half_life(examples: float, *, batch_size: int, ramp: float = 0.05) -> Decay:
    """0.5^(batch_size / h) with h = min(examples, ramp * examples seen so far) (EDM, training_loop.py; table 7).

    Raises ConfigError unless examples, batch_size and ramp are positive.
    """
    if min(examples, batch_size, ramp) <= 0:
        raise ConfigError(
            f"half_life needs positive numbers, got {examples=}, {batch_size=}, {ramp=}. EDM on CIFAR-10: "
            "half_life(500_000, batch_size=512)."
        )

    def decay(n: Array) -> Array:
        life = jnp.minimum(jnp.full_like(n, examples), ramp * batch_size * n)
        return jnp.exp2(-batch_size / jnp.maximum(life, 1e-8))

    return decay


def decays(ema: Mapping[str, float | Decay]) -> dict[str, Decay]:
    """The same with a float replaced by `warmed(float)`."""
    return {name: decay if callable(decay) else warmed(decay) for name, decay in ema.items()}


def update(ema_params: PyTree, params: PyTree, decay: Array) -> PyTree:
    """One step of the average, leaf by leaf; `decay` is a () float32 array."""
    return jax.tree.map(lambda e, p: e + (1 - decay).astype(e.dtype) * (p - e), ema_params, params)
