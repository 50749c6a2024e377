"""Sampling: noise -> scan(solver step over a decreasing grid of times) -> x0, and the grids.

    t_0 > t_1 > ... > t_N,    x_{n+1}, memory = step(fold_in(key, n), D, x_n, t_n, t_{n+1}, memory)

A grid of `num_steps` = N steps has N + 1 times, computed in float64 on the host, with nothing rounded to integers. All
start at t = 1 (but `leading` respacing) and end at t = 0. With rho = sigma / alpha of the schedule, n = 0, 1, ...:

    karras         rho_n = (rho_max^(1/7) + n / (N - 1) (rho_min^(1/7) - rho_max^(1/7)))^7,   then 0
    exponential    log rho_n uniform from rho_max to rho_min in N points,                     then 0
    log_snr        log rho_n uniform from rho_max to rho_min in N + 1 points, the last of which is moved to t = 0

A schedule whose sigma(0) is not 0 (VE) has no step to 0: its grids end at sigma(0), and so much noise is left in x.

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
from math import isfinite
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxdiff import process
from jaxdiff.denoise import LearnedRange
from jaxdiff.errors import ConfigError
from jaxdiff.schedule import as_float
from jaxdiff.types import Array, Denoiser, Key, Schedule, Solver

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
    Raises ConfigError for unusable times, keys, or a denoiser that changes the shape.
    """
    return _run(key, denoise, x, times, solver, 1, return_trajectory, callback)


def invert(denoise: Denoiser, x: Array, times: Any, solver: Solver, *, callback: Callback | None = None) -> Array:
    """Run a deterministic solver, e.g. `solver.ddim_inversion`, from data up to noise, over the `times` of `sample`.

    x: (b, ...) at times[-1]. Returns the noise at times[0] from which `sample` leads back to x. Raises as `sample`.
    """
    return _run(jax.random.key(0), denoise, x, times, solver, -1, False, callback)


def nfe(solver: Solver, times: Any, *, learned_range: bool = False) -> int:
    """The number of function evaluations: the calls of the denoiser by `solver` over `times`, counted.

    `learned_range`: for a solver that needs a denoiser with a learned variance.
    """
    calls = []

    def count(x: Array, t: Array) -> Any:
        jax.debug.callback(lambda: calls.append(1))
        return LearnedRange(x, jnp.zeros_like(x)) if learned_range else x

    jax.block_until_ready(sample(jax.random.key(0), count, jnp.zeros((1, 1), jnp.float32), times, solver))
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
    if jnp.ndim(x) < 1:
        raise ConfigError(
            "x must have shape (b, ...), got a scalar. Make noise with process.prior(key, schedule, shape)."
        )
    x = as_float(x)
    times = _check_times(times, x.dtype)[::direction]
    keys = process.example_keys(key, x.shape[0])
    checked = _checked(denoise)
    num_steps = times.shape[0] - 1

    def body(carry: Any, step: tuple[Array, Array, Array]) -> tuple[Any, Any]:
        (x, memory), (n, t, s) = carry, step
        step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, n)
        x, memory = solver.step(step_keys, checked, x, t, s, memory)
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


def _checked(denoise: Denoiser) -> Denoiser:
    def checked(x: Array, t: Array) -> Any:
        out = denoise(x, t)
        x0 = out[0] if isinstance(out, tuple) else out
        if jnp.shape(x0) != x.shape:
            raise ConfigError(
                f"denoise(x, t) must return x0 of the shape of x, {x.shape}; got {jnp.shape(x0)}. "
                "Make a denoiser from a network with denoise.from_net."
            )
        return jax.tree.map(lambda leaf: leaf.astype(x.dtype), out)

    return checked


def _check_times(times: Any, dtype: Any) -> Array:
    if np.ndim(times) != 1 or np.shape(times)[0] < 2:
        raise ConfigError(
            f"times must be one row of at least 2 times, got shape {np.shape(times)}. "
            "Make one with sample.uniform_grid(schedule, num_steps)."
        )
    if not isinstance(times, Tracer):
        # Checked as the device will see them: two times may differ in float64 and be equal in float32.
        values = np.asarray(times).astype(dtype)
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1 and (np.diff(values) < 0).all()):
            raise ConfigError(
                f"times must be finite, in [0, 1] and strictly decreasing (in {jnp.dtype(dtype).name}), got {values}. "
                "Time 1 is noise and 0 is data; reverse an increasing grid with times[::-1]."
            )
    return jnp.asarray(times, dtype)


def uniform_grid(schedule: Schedule, num_steps: int) -> np.ndarray:
    """t_n = 1 - n / N, n = 0 .. N: uniform in t. Raises ConfigError unless num_steps is an integer >= 1."""
    return np.linspace(1.0, 0.0, _check_steps(num_steps) + 1)


def respaced_grid(
    schedule: Schedule, num_steps: int, *, spacing: str = "trailing", num_train_steps: int = 1000
) -> np.ndarray:
    """A part of the T = num_train_steps training times (index i is t = (i + 1) / T), kept continuous, then t = 0.

    With n = 0 .. N - 1 (Lin et al. 2024, table 2): "leading" t_n = (N - 1 - n) / N + 1 / T (starts below t = 1: a known
    flaw, kept for models sampled so); "linspace" N points from 1 to 1 / T; "trailing" t_n = 1 - n / N, as uniform.
    For N = T all three are the T training times. Raises ConfigError for another spacing, or num_steps > T.
    """
    num_steps, total = _check_steps(num_steps), num_train_steps
    if num_steps > total:
        raise ConfigError(
            f"num_steps must be <= num_train_steps = {total}, got {num_steps}. Use uniform_grid for more."
        )
    if spacing == "trailing":
        return uniform_grid(schedule, num_steps)
    if spacing == "leading":
        return np.append(np.arange(num_steps - 1, -1, -1) / num_steps + 1 / total, 0.0)
    if spacing == "linspace":
        return np.append(np.linspace(1.0, 1 / total, num_steps), 0.0)
    raise ConfigError(f'spacing must be "leading", "linspace" or "trailing", got {spacing!r}.')


def karras_grid(
    schedule: Schedule, num_steps: int, *, rho: float = 7.0, sigma_min: float = 0.002, sigma_max: float = 80.0
) -> np.ndarray:
    """Karras et al. 2022, eq. 5, in sigma / alpha. The range is narrowed to what the schedule reaches; starts at t = 1.

    Raises ConfigError unless num_steps is an integer >= 1, rho > 0 and 0 < sigma_min < sigma_max.
    """
    if not (isfinite(rho) and rho > 0):
        raise ConfigError(f"rho must be > 0, got {rho}. EDM uses 7.")
    low, high = _sigma_range(schedule, sigma_min, sigma_max)
    points = _ramp_points(schedule, num_steps)
    return _grid_of_sigmas(schedule, num_steps, np.linspace(high ** (1 / rho), low ** (1 / rho), points) ** rho)


def exponential_grid(
    schedule: Schedule, num_steps: int, *, sigma_min: float = 0.002, sigma_max: float = 80.0
) -> np.ndarray:
    """Geometric in sigma / alpha down to sigma_min, then 0 (k-diffusion's). Arguments as in `karras_grid`."""
    low, high = _sigma_range(schedule, sigma_min, sigma_max)
    return _grid_of_sigmas(schedule, num_steps, np.geomspace(high, low, _ramp_points(schedule, num_steps)))


def log_snr_grid(
    schedule: Schedule, num_steps: int, *, sigma_min: float = 0.002, sigma_max: float = 80.0
) -> np.ndarray:
    """Equal steps of log-SNR (Lu et al. 2022), the last of which ends at t = 0. Arguments as in `karras_grid`."""
    low, high = _sigma_range(schedule, sigma_min, sigma_max)
    return _grid_of_sigmas(schedule, num_steps, np.geomspace(high, low, _check_steps(num_steps) + 1))


GRIDS: dict[str, Callable[..., np.ndarray]] = {
    "uniform": uniform_grid,
    "respaced": respaced_grid,
    "karras": karras_grid,
    "exponential": exponential_grid,
    "log_snr": log_snr_grid,
}
"""Every grid by name, all with arguments (schedule, num_steps, *, ...)."""


def _check_steps(num_steps: int) -> int:
    if isinstance(num_steps, bool) or not isinstance(num_steps, int | np.integer) or num_steps < 1:
        raise ConfigError(f"num_steps must be an integer >= 1, got {num_steps!r}. To denoise once, call denoise(x, t).")
    return int(num_steps)


def _on_host(function: Callable[[Array], Array], values: Any) -> np.ndarray:
    """A schedule's method in float64, also where the caller is inside jit."""
    with jax.enable_x64(True), jax.ensure_compile_time_eval():
        return np.asarray(function(jnp.asarray(values, jnp.float64)))


def _sigma_range(schedule: Schedule, sigma_min: float, sigma_max: float) -> tuple[float, float]:
    if not (isfinite(sigma_max) and 0 < sigma_min < sigma_max):
        raise ConfigError(f"needs 0 < sigma_min < sigma_max < inf, got {sigma_min} and {sigma_max}. EDM: 0.002 and 80.")
    reach_min, reach_max = np.exp(-_on_host(schedule.logsnr, [0.0, 1.0]) / 2)
    low, high = max(sigma_min, float(reach_min)), min(sigma_max, float(reach_max))
    if low >= high:
        raise ConfigError(f"no noise level in [{sigma_min}, {sigma_max}]: the schedule has [{reach_min}, {reach_max}].")
    return low, high


def _ramp_points(schedule: Schedule, num_steps: int) -> int:
    """N levels and a last step to 0, or N + 1 levels where the schedule itself ends above 0."""
    return _check_steps(num_steps) + int(_on_host(schedule.sigma, 0.0) > 0)


def _grid_of_sigmas(schedule: Schedule, num_steps: int, sigmas: np.ndarray) -> np.ndarray:
    times = np.zeros(num_steps + 1)
    times[: len(sigmas)] = _on_host(schedule.inverse, -2 * np.log(sigmas))
    times[0], times[-1] = 1.0, 0.0
    return times
