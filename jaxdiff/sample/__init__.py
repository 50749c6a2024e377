"""Sampling: noise -> scan(solver step over a decreasing grid of times) -> x0, and the grids.

t_0 > t_1 > ... > t_N,    x_{n+1}, memory = step(fold_in(key, n), D, x_n, t_n, t_{n+1}, memory)

>>> import jaxdiff as jd
>>> flow = jd.schedule.rectified_flow()
>>> times = uniform_grid(flow, 4)
>>> times.tolist()
[1.0, 0.75, 0.5, 0.25, 0.0]
>>> noise = jd.process.prior(jax.random.key(0), flow, (2, 3))
>>> x0 = sample(jax.random.key(1), lambda x, t: jnp.full_like(x, 0.5), noise, times, jd.solver.ddim(flow))
>>> x0.tolist()  # all data of this denoiser are the point 0.5
[[0.5, 0.5, 0.5], [0.5, 0.5, 0.5]]
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxdiff import process
from jaxdiff.errors import ConfigError
from jaxdiff.sample.grids import (
    AYS,
    GRIDS,
    ays_grid,
    beta_sigma_grid,
    beta_t_grid,
    dynamic_shift_grid,
    exponential_grid,
    flow_shift_grid,
    karras_grid,
    log_snr_grid,
    respaced_grid,
    uniform_grid,
)
from jaxdiff.schedule import as_float
from jaxdiff.schedule.base import check_times
from jaxdiff.types import Array, Denoiser, Key, Solver

__all__ = [
    "AYS",
    "GRIDS",
    "Callback",
    "ays_grid",
    "beta_sigma_grid",
    "beta_t_grid",
    "dynamic_shift_grid",
    "exponential_grid",
    "flow_shift_grid",
    "invert",
    "karras_grid",
    "log_snr_grid",
    "nfe",
    "respaced_grid",
    "sample",
    "uniform_grid",
]

Callback = Callable[[int, int], Any]
"""`callback(steps_done, num_steps)`, called on the host after each step."""


def sample(
    key: Key,
    denoise: Denoiser,
    x: Array,
    times: Any,
    solver: Solver,
    *,
    return_trajectory: bool = False,
    callback: Callback | None = None,
) -> Any:
    """Draw x0 from noise: run `solver` over `times`. Works eagerly and inside your own `jax.jit`.

    key: one key (example i gets fold_in(key, i)) or (b,) keys, one per example: an example then comes out the same at
    any place of any batch. x: (b, ...), noise at times[0], see `process.prior`; arithmetic is float32 at the least.
    times: N + 1 decreasing values in [0, 1]; as an argument of your jit they are not checked, and do not recompile.
    Returns x (b, ...), or (x, trajectory (N + 1, b, ...)). callback(steps_done, num_steps) is called on the host.
    Raises ConfigError for unusable times, keys or solvers, or a denoiser that changes the shape.
    """
    return _run(key, denoise, x, times, solver, 1, return_trajectory, callback)


def invert(denoise: Denoiser, x: Array, times: Any, solver: Solver, *, callback: Callback | None = None) -> Array:
    """Run `solver.ddim_inversion(schedule)` from data up to noise, over the `times` of `sample`.

    x: (b, ...) at times[-1]. Returns the noise at times[0] from which `sample` leads back to x. Raises as `sample`, and
    ConfigError for a solver that is not `upward`: from data, where there is no eps yet, the others lose a step.
    """
    return _run(jax.random.key(0), denoise, x, times, solver, -1, False, callback)


def nfe(solver: Solver, times: Any, *, denoise: Denoiser | None = None, x: Array | None = None) -> int:
    """The number of function evaluations: the calls of the denoiser by `solver` over `times`, counted by running it.

    The denoiser of the count returns x as it is. Give `denoise` and `x`, (b, ...), where the number depends on them (an
    adaptive solver), or where the answer must be a `LearnedRange`. A guided denoiser is one call, of twice the batch.
    """
    calls = []

    def count(x: Array, t: Array) -> Any:
        jax.debug.callback(lambda _: calls.append(1), t)  # of t, so that it runs with each call and not when traced
        return x if denoise is None else denoise(x, t)

    with jax.ensure_compile_time_eval():  # also where the caller is inside jit
        x = jnp.zeros((1, 1), jnp.float32) if x is None else x
        jax.block_until_ready(sample(jax.random.key(0), count, x, times, solver))
    jax.effects_barrier()
    return len(calls)


def _run(
    key: Key,
    denoise: Denoiser,
    x: Array,
    times: Any,
    solver: Solver,
    direction: int,
    return_trajectory: bool,
    callback: Callback | None,
) -> Any:
    x = as_float(x)
    if x.ndim < 1:
        raise ConfigError(
            "x must have shape (b, ...), got a scalar. Make noise with process.prior(key, schedule, shape)."
        )
    if callable(solver):
        raise ConfigError(f"solver is the function {solver!r}: call it with the schedule, as solver.ddim(schedule).")
    if solver.upward != (direction < 0):
        raise ConfigError(
            "this solver goes from data up to noise: use it with sample.invert."
            if solver.upward
            else "this solver goes from noise down to data. To invert, use solver.ddim_inversion(schedule)."
        )
    times = check_times(times, x.dtype)[::direction]
    keys = process.example_keys(key, x.shape[0])
    denoise = checked(denoise)
    num_steps = times.shape[0] - 1

    def body(carry: Any, step: tuple[Array, Array, Array]) -> tuple[Any, Any]:
        (x, memory), (n, t, s) = carry, step
        x, memory = solver.step(process.fold_keys(keys, n), denoise, x, t, s, memory)
        if callback is not None:
            x = _report(callback, x, n, num_steps)
        return (x, memory), x if return_trajectory else None

    steps = (jnp.arange(num_steps), times[:-1], times[1:])
    (last, _), xs = jax.lax.scan(body, (x, solver.init(x)), steps)
    return (last, jnp.concatenate([x[None], xs])) if return_trajectory else last


def _report(callback: Callback, x: Array, n: Array, num_steps: int) -> Array:
    # The barrier ties the call to the step: without it the host may hear of steps that the device has not done yet.
    x, n = jax.lax.optimization_barrier((x, n))
    jax.debug.callback(lambda n: callback(int(n) + 1, num_steps), n)
    return x


def checked(denoise: Denoiser) -> Denoiser:
    """`denoise` that answers in the dtype of x. Raises ConfigError, when called, if it changes the shape."""

    def inner(x: Array, t: Array) -> Any:
        out = denoise(x, t)
        x0 = out[0] if isinstance(out, tuple) else out
        if jnp.shape(x0) != x.shape:
            raise ConfigError(
                f"denoise(x, t) must return x0 of the shape of x, {x.shape}; got {jnp.shape(x0)}. "
                "Make a denoiser from a network with denoise.from_net."
            )
        return jax.tree.map(lambda leaf: leaf.astype(x.dtype), out)

    return inner
