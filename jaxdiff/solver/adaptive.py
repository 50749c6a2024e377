"""Adaptive Runge-Kutta on the probability flow, through Diffrax (optional), with a step size for each example.

On the straight-line level tau = sigma / (alpha + sigma), with y = x / (alpha + sigma), all schedules have one flow:

    dy/dtau = eps - x0,    x0 = D(x, t),    eps = (x - alpha x0) / sigma

from tau = 1 (pure noise) to 0 (data), without a derivative of the schedule and with nothing infinite but eps at 0.
There the integration ends at tau = 1e-4, and D is the rest of the step: an error of order tau^2.
"""

import importlib
from collections.abc import Callable
from math import isfinite
from typing import Any

import jax
import jax.numpy as jnp

from jaxdiff.denoise import estimate
from jaxdiff.errors import ConfigError, check_count
from jaxdiff.solver.base import no_memory, predict
from jaxdiff.types import Array, Denoiser, Key, PyTree, Schedule, Solver

_CAP = 1e-4


def adaptive(schedule: Schedule, *, rtol: float = 1e-4, atol: float = 1e-4, max_steps: int = 4096) -> Solver:
    """Dormand-Prince 5(4) with error control (the RK45 of Song et al. 2021, appendix D.2) over each step of the grid.

    The grid [1, 0] suffices: the tolerances, not the grid, set the error and the number of calls (so it is not in
    `ALL`). Each example has its own steps, so no row changes another; the network is called on whole batches, with t of
    shape (b,). No gradient passes. At run time, raises where max_steps is passed.
    Raises ConfigError where Diffrax is not installed, a tolerance is not > 0, or max_steps no integer >= 1.
    """
    if not (isfinite(rtol) and isfinite(atol) and rtol > 0 and atol > 0):
        raise ConfigError(f"rtol and atol must be finite and > 0, got {rtol} and {atol}. Usual: 1e-4 to 1e-5.")
    max_steps = check_count("max_steps", max_steps, "The usual 4096 is passed only where a tolerance is too small.")
    diffrax = _optional("diffrax")
    control = diffrax.PIDController(rtol=rtol, atol=atol)

    def step(key: Key, denoise: Denoiser, x: Array, t: Array, s: Array, memory: PyTree) -> tuple[Array, PyTree]:
        start = _level(schedule, t)
        end = jnp.maximum(_level(schedule, s), jnp.minimum(start, _CAP))
        ask, arrays = _for_one(denoise, x, t)
        term = diffrax.ODETerm(_velocity(schedule, ask))

        def solve(y: Array) -> Array:
            solution = diffrax.diffeqsolve(
                term, diffrax.Dopri5(), start, end, None, y, arrays, stepsize_controller=control, max_steps=max_steps
            )
            return solution.ys[0]

        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # Diffrax needs both
            y = jax.vmap(solve)(x / _scale(schedule, t))
        last = _time(schedule, end)
        x = y * _scale(schedule, last)
        return jax.lax.cond(
            schedule.sigma(s) > 0, lambda: x, lambda: schedule.alpha(s) * estimate(denoise(x, last))
        ), ()

    return Solver(no_memory, step)


def _level(schedule: Schedule, t: Array) -> Array:
    return schedule.sigma(t) / _scale(schedule, t)


def _scale(schedule: Schedule, t: Array) -> Array:
    return schedule.alpha(t) + schedule.sigma(t)


def _time(schedule: Schedule, level: Array) -> Array:
    return schedule.inverse(2 * (jnp.log1p(-level) - jnp.log(level)))


def _velocity(schedule: Schedule, ask: Callable[..., Array]) -> Callable[[Array, Array, PyTree], Array]:
    """dy/dtau of one example; args: the arrays that the denoiser is bound to."""

    def velocity(level: Array, y: Array, arrays: PyTree) -> Array:
        t = _time(schedule, level)
        x0, eps = predict(schedule, lambda x, t: ask(arrays, x, t), y * _scale(schedule, t), t)
        return eps - x0

    return velocity


def _for_one(denoise: Denoiser, x: Array, t: Array) -> tuple[Callable[..., Array], PyTree]:
    """(ask, arrays): ask(arrays, x, t) is D for one example under `vmap`, which calls D once, with the whole batch.

    D may be bound to one batch (its classes, its prompts). Diffrax and `vmap` pass arrays on as arguments only, so
    whatever D closes over is taken out of it.
    """
    equinox = _optional("equinox")
    closed = equinox.filter_closure_convert(lambda x, t: estimate(denoise(x, t)), x, jnp.broadcast_to(t, x.shape[:1]))
    arrays, rest = equinox.partition(closed, equinox.is_array)

    @jax.custom_batching.custom_vmap
    def ask(arrays: PyTree, x: Array, t: Array) -> Array:
        return x  # the shape of the answer; the rule below takes its place

    @ask.def_vmap
    def _(axis_size: int, in_batched: Any, arrays: PyTree, x: Array, t: Array) -> tuple[Array, bool]:
        return equinox.combine(arrays, rest)(x, jnp.broadcast_to(t, x.shape[:1])), True

    return ask, arrays


def _optional(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError("solver.adaptive needs Diffrax. Type: pip install 'jaxdiff[ode]'.") from error
