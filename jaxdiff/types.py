"""Shared names: array aliases and the Protocols of the four seams. No logic.

Schedule   t in [0, 1] (0 = data, 1 = noise)  ->  alpha, sigma of  x_t = alpha x0 + sigma eps
Target     what a network is trained to output, as a row (a, b):  target = a x0 + b eps
Denoiser   D(x_t, t) -> x0_hat, the posterior mean E[x0 | x_t]; everything that samples takes one
Solver     a pair (init, step) of pure functions, as an Optax gradient transformation is
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeAlias

import jax

Array: TypeAlias = jax.Array
Key: TypeAlias = jax.Array
"""A typed JAX key (`jax.random.key`), or a batch of them of shape (b,)."""
PyTree: TypeAlias = Any

Net: TypeAlias = Callable[[Array, Array], Array]
"""A network bound to its parameters and conditioning: `net(x, time) -> output`, with time of shape (b,)."""

Denoiser: TypeAlias = Callable[[Array, Array], Array]
"""`denoise(x_t, t) -> x0_hat`; x_t is (b, ...), t a scalar or (b,); returns x_t.dtype."""

Noise: TypeAlias = Callable[[Key, Array, Array, Array], Array]
"""`noise(key, x, t, s)`: standard normal noise like x for the step from t to s; key is (b,), one per example."""


class Schedule(Protocol):
    """A noise schedule: x_t = alpha(t) x0 + sigma(t) eps for t in [0, 1]. All methods are elementwise and jit-safe."""

    def alpha(self, t: Array) -> Array:
        """Signal scale."""
        ...

    def sigma(self, t: Array) -> Array:
        """Noise scale."""
        ...

    def logsnr(self, t: Array) -> Array:
        """log(alpha^2 / sigma^2), finite: clamped to +-80 where alpha or sigma is 0."""
        ...

    def inverse(self, logsnr: Array) -> Array:
        """The t at which `logsnr(t)` has the given value, clipped to [0, 1]."""
        ...


class Target(NamedTuple):
    """What a network outputs: target = a x0 + b eps, with (a, b) = row(schedule, t)."""

    name: str
    row: Callable[[Schedule, Array], tuple[Array, Array]]


class Solver(NamedTuple):
    """A reverse-time solver: `memory = init(x)`, then `x, memory = step(key, denoise, x, t, s, memory)` for each t > s.

    `key` is a batch of keys, one per example. `t` and `s` are scalars. `memory` is a pytree of fixed shapes.
    `upward`: whether its steps go from data to noise instead, s > t (see `sample.invert`).
    """

    init: Callable[[Array], PyTree]
    step: Callable[[Key, Denoiser, Array, Array, Array, PyTree], tuple[Array, PyTree]]
    upward: bool = False
