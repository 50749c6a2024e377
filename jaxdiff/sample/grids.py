"""Time grids: N + 1 decreasing times for N = `num_steps` steps, made in float64 on the host, nothing rounded.

All start at t = 1 (but `leading` respacing) and end at t = 0. With n = 0, 1, ..., u_n = 1 - n / N, and
rho = sigma / alpha of the schedule, in the range where [sigma_min, sigma_max] and the schedule's own meet:

    uniform          t_n = u_n
    respaced         a part of a chain's training times
    flow_shift       t_n = s u_n / (1 + (s - 1) u_n)
    dynamic_shift    the same with s = exp(mu), mu linear in the number of image tokens
    beta_t           t_n = F(u_n), F the quantile function of Beta(alpha, beta)
    beta_sigma       rho_n = rho_min + F(1 - n / (N - 1)) (rho_max - rho_min),               then 0
    karras           rho_n = (rho_max^(1/7) + n / (N - 1) (rho_min^(1/7) - rho_max^(1/7)))^7,  then 0
    exponential      log rho_n uniform from rho_max to rho_min in N points,                    then 0
    log_snr          log rho_n uniform in N + 1 points, the last of which is moved to t = 0
    ays              log rho_n from a published table, in N + 1 points, the last of which is moved to t = 0

A schedule whose sigma(0) is not 0 (VE) has no step to 0: its grids end at sigma(0), and so much noise is left in x.
"""

from collections.abc import Callable
from math import exp, isfinite, log
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.errors import ConfigError, check_count
from jaxdiff.types import Array, Schedule

AYS = {
    "sd1": (
        14.6146412293, 6.4745760956, 3.8636745985, 2.6946151520, 1.8841921177, 1.3943805092, 0.9642583904,
        0.6523686016, 0.3977456272, 0.1515232662, 0.0291671582,
    ),
    "sdxl": (
        14.6146412293, 6.3184485287, 3.7681790315, 2.1811480769, 1.3405244945, 0.8620721141, 0.5550693289,
        0.3798540708, 0.2332364134, 0.1114188177, 0.0291671582,
    ),
    "svd": (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002),
}  # fmt: skip
"""sigma / alpha of the 10-step schedules of Align Your Steps (Sabour et al. 2024, the authors' published tables)."""


def uniform_grid(schedule: Schedule, num_steps: int) -> np.ndarray:
    """t_n = 1 - n / N, n = 0 .. N: uniform in t. Raises ConfigError unless num_steps is an integer >= 1."""
    return np.linspace(1.0, 0.0, _check_steps(num_steps) + 1)


def respaced_grid(
    schedule: Schedule, num_steps: int, *, spacing: str = "trailing", num_train_steps: int = 1000
) -> np.ndarray:
    """A part of the T = num_train_steps training times (index i is t = (i + 1) / T), kept continuous, then t = 0.

    With n = 0 .. N - 1 (Lin et al. 2024, table 2): "leading" t_n = (N - 1 - n) / N + 1 / T (starts below t = 1: a known
    flaw, kept for models sampled so); "linspace" N points from 1 to 1 / T; "trailing" t_n = 1 - n / N, as uniform.
    For N = T these are the T training times. "quadratic" t_n = (1 - n / N)^2 (Song et al. 2021, DDIM, appendix D.2).
    Raises ConfigError for another spacing, or num_steps > T.
    """
    num_steps, total = _check_steps(num_steps), num_train_steps
    if num_steps > total:
        raise ConfigError(
            f"num_steps must be <= num_train_steps = {total}, got {num_steps}. Use uniform_grid for more."
        )
    if spacing == "trailing":
        return uniform_grid(schedule, num_steps)
    if spacing == "quadratic":
        return uniform_grid(schedule, num_steps) ** 2
    if spacing == "leading":
        return np.append(np.arange(num_steps - 1, -1, -1) / num_steps + 1 / total, 0.0)
    if spacing == "linspace":
        return np.append(np.linspace(1.0, 1 / total, num_steps), 0.0)
    raise ConfigError(f'spacing must be "leading", "linspace", "trailing" or "quadratic", got {spacing!r}.')


def flow_shift_grid(schedule: Schedule, num_steps: int, *, shift: float = 3.0) -> np.ndarray:
    """Uniform times moved towards noise by a constant shift s (Esser et al. 2024, eq. 23): s t / (1 + (s - 1) t).

    s is 3 for Stable Diffusion 3, sqrt(pixels / training pixels) by the paper's rule. Leave it out (s = 1) where the
    schedule is shifted itself, by `schedule.shift`. Raises ConfigError unless shift is > 0 and finite.
    """
    if not (isfinite(shift) and shift > 0):
        raise ConfigError(f"shift must be finite and > 0, got {shift}. Stable Diffusion 3 uses 3; 1 is no shift.")
    u = uniform_grid(schedule, num_steps)
    return _distinct(shift * u / ((1 - u) + shift * u))  # so written, it is exactly 1 at t = 1


def dynamic_shift_grid(
    schedule: Schedule,
    num_steps: int,
    *,
    tokens: int = 4096,
    base_tokens: int = 256,
    max_tokens: int = 4096,
    base_mu: float = 0.5,
    max_mu: float = 1.15,
) -> np.ndarray:
    """`flow_shift_grid` by the size of the picture: s = exp(mu), mu linear in `tokens`, as FLUX.1 and SD 3.5 do.

    tokens: those of the transformer, (height / 16) (width / 16) for FLUX: 4096 at 1024 x 1024. mu is base_mu at
    base_tokens and max_mu at max_tokens, and goes on outside. exp(mu) / (exp(mu) + 1 / t - 1) is eq. 23 of Esser et
    al. 2024 with s = exp(mu). Raises ConfigError for tokens < 1, or base_tokens = max_tokens.
    """
    if tokens < 1 or base_tokens == max_tokens:
        raise ConfigError(
            f"tokens must be >= 1, and base_tokens differ from max_tokens; got {tokens}, {base_tokens}, {max_tokens}. "
            "FLUX: tokens = (height / 16) * (width / 16), between 256 and 4096."
        )
    mu = base_mu + (max_mu - base_mu) * (tokens - base_tokens) / (max_tokens - base_tokens)
    return flow_shift_grid(schedule, num_steps, shift=exp(mu))


def beta_t_grid(schedule: Schedule, num_steps: int, *, alpha: float = 0.6, beta: float = 0.6) -> np.ndarray:
    """Quantiles of Beta(alpha, beta) in t (Lee et al. 2024): more steps at both ends where alpha, beta < 1.

    What web interfaces call "beta" (there rounded to training times, and equal ones dropped). Raises ConfigError unless
    alpha and beta are > 0 and all times differ in float32.
    """
    return _distinct(_beta_quantiles(uniform_grid(schedule, num_steps), alpha, beta))


def beta_sigma_grid(
    schedule: Schedule,
    num_steps: int,
    *,
    alpha: float = 0.6,
    beta: float = 0.6,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
) -> np.ndarray:
    """Quantiles of Beta(alpha, beta) in sigma / alpha: what diffusers calls use_beta_sigmas (there rounded to times).

    Arguments as in `beta_t_grid` and `karras_grid`. On a wide range few steps fall to small noise: see `beta_t_grid`.
    """
    low, high = _sigma_range(schedule, sigma_min, sigma_max)
    ramp = np.linspace(1.0, 0.0, _ramp_points(schedule, num_steps))
    return _grid_of_sigmas(schedule, num_steps, low + _beta_quantiles(ramp, alpha, beta) * (high - low))


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


def ays_grid(schedule: Schedule, num_steps: int, *, table: str = "sd1") -> np.ndarray:
    """Align Your Steps (Sabour et al. 2024): a table of 10 optimised steps, log-linear for other counts; ends at t = 0.

    table: "sd1", "sdxl" (for `scaled_linear`) or "svd" (for sigma_max = 700). The levels are sigma / alpha, not times;
    a schedule that does not reach all of them divides the part that it reaches. Raises ConfigError for another table.
    """
    if table not in AYS:
        raise ConfigError(f"table must be one of {', '.join(AYS)}; got {table!r}.")
    levels = np.log(AYS[table])
    low, high = _sigma_range(schedule, AYS[table][-1], AYS[table][0])
    places = np.arange(len(levels))
    first, last = np.interp([-log(high), -log(low)], -levels, places)
    points = np.linspace(first, last, _check_steps(num_steps) + 1)
    return _grid_of_sigmas(schedule, num_steps, np.exp(np.interp(points, places, levels)))


GRIDS: dict[str, Callable[..., np.ndarray]] = {
    "uniform": uniform_grid,
    "respaced": respaced_grid,
    "flow_shift": flow_shift_grid,
    "dynamic_shift": dynamic_shift_grid,
    "beta_t": beta_t_grid,
    "beta_sigma": beta_sigma_grid,
    "karras": karras_grid,
    "exponential": exponential_grid,
    "log_snr": log_snr_grid,
    "ays": ays_grid,
}
"""Every grid by name, all with arguments (schedule, num_steps, *, ...)."""


def _check_steps(num_steps: int) -> int:
    return check_count("num_steps", num_steps, "To denoise once, call denoise(x, t).")


def _on_host(function: Callable[[Array], Array], values: Any) -> np.ndarray:
    """A schedule's method in float64, also where the caller is inside jit."""
    with jax.enable_x64(True), jax.ensure_compile_time_eval():
        return np.asarray(function(jnp.asarray(values, jnp.float64)))


def _beta_quantiles(u: np.ndarray, alpha: float, beta: float) -> np.ndarray:
    from scipy.special import betaincinv  # JAX's own dependency; a fifth of a second to import

    if not (isfinite(alpha) and isfinite(beta) and alpha > 0 and beta > 0):
        raise ConfigError(f"alpha and beta must be finite and > 0, got {alpha} and {beta}. The usual ones are 0.6.")
    return betaincinv(alpha, beta, u)


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
    return _distinct(times)


def _distinct(times: np.ndarray) -> np.ndarray:
    """`times`, if they decrease strictly also in float32, as the device will see them; else ConfigError."""
    equal = np.flatnonzero(np.diff(times.astype(np.float32)) >= 0)
    if equal.size:
        raise ConfigError(
            f"times {equal[0]} and {equal[0] + 1} of {len(times)} are both {times[equal[0]]:.9g} in float32. "
            "Use fewer steps, or settings that spread them wider."
        )
    return times
