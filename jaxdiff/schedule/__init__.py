"""Noise schedules: t in [0, 1], 0 = data and 1 = noise, to the scales of  x_t = alpha(t) x0 + sigma(t) eps.

    logsnr(t)  = log(alpha^2 / sigma^2), clamped to +-80, decreasing in t
    inverse(l) = the t with logsnr(t) = l
    sde        = (f, g^2) of  dx = f x dt + g dw

A schedule is a frozen, hashable dataclass: close over it freely. Every method is elementwise, works under jit, and
follows the dtype of its argument (at least float32). Where alpha or sigma has the limit 0 or 1, it is exactly that.
The constructors below raise ConfigError for settings out of range.

    >>> import jaxdiff as jd
    >>> flow = jd.schedule.rectified_flow()
    >>> float(flow.alpha(0.25)), float(flow.sigma(0.25)), float(flow.inverse(flow.logsnr(0.25)))
    (0.75, 0.25, 0.25)
    >>> float(jd.schedule.cosine().alpha(1.0))  # exactly 0: nothing is left of the data
    0.0
"""

from collections.abc import Sequence

import numpy as np

from jaxdiff.errors import check_count
from jaxdiff.schedule.base import LOGSNR_MAX, Base, as_float, derivative, expand, require, sde
from jaxdiff.schedule.families import EDM, VE, VP, Cosine, RectifiedFlow, Sigmoid, SubVP
from jaxdiff.schedule.shifted import LogSnrShift, TimeShift
from jaxdiff.schedule.table import Table

__all__ = [
    "EDM",
    "LOGSNR_MAX",
    "VE",
    "VP",
    "Base",
    "Cosine",
    "LogSnrShift",
    "RectifiedFlow",
    "Sigmoid",
    "SubVP",
    "Table",
    "TimeShift",
    "as_float",
    "cosine",
    "ddpm_table",
    "derivative",
    "edm",
    "expand",
    "from_betas",
    "linear",
    "rectified_flow",
    "scaled_linear",
    "sde",
    "shift",
    "sigmoid",
    "sub_vp",
    "ve",
    "vp",
    "zero_terminal_snr",
]


def vp(*, beta_min: float = 0.1, beta_max: float = 20.0) -> VP:
    """The VP-SDE: beta(t) linear from beta_min to beta_max (Song et al. 2021, eq. 33)."""
    _check_range("beta_min", beta_min, "beta_max", beta_max)
    return VP(beta_min, beta_max)


def sub_vp(*, beta_min: float = 0.1, beta_max: float = 20.0) -> SubVP:
    """The sub-VP SDE: alpha of `vp`, sigma = 1 - alpha^2 (Song et al. 2021, appendix C)."""
    _check_range("beta_min", beta_min, "beta_max", beta_max)
    return SubVP(beta_min, beta_max)


def ve(*, sigma_min: float = 0.01, sigma_max: float = 50.0) -> VE:
    """The VE-SDE: sigma geometric from sigma_min to sigma_max (Song et al. 2021, appendix C). sigma(0) is not 0."""
    _check_range("sigma_min", sigma_min, "sigma_max", sigma_max, equal=False)
    return VE(sigma_min, sigma_max)


def edm(*, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> EDM:
    """EDM: alpha = 1, sigma from 0 to sigma_max (Karras et al. 2022); uniform t is close to its grid, eq. 5."""
    _check_range("sigma_min", sigma_min, "sigma_max", sigma_max, equal=False)
    require(rho >= 1, f"rho must be at least 1, got {rho}. EDM uses rho=7.")
    return EDM(sigma_min, sigma_max, rho)


def linear(*, beta_min: float = 1e-4, beta_max: float = 0.02, T: int = 1000) -> VP:
    """The continuous limit of DDPM's T linear betas: the VP-SDE with beta(t) from T beta_min to T beta_max.

    The table itself is `ddpm_table`. Source: Song et al. 2021, appendix B.
    """
    check_count("T", T, "DDPM uses T=1000.")
    return vp(beta_min=T * beta_min, beta_max=T * beta_max)


def ddpm_table(*, beta_min: float = 1e-4, beta_max: float = 0.02, T: int = 1000) -> Table:
    """DDPM's T linear betas (Ho et al. 2020, section 4). The continuous limit is `linear`."""
    check_count("T", T, "DDPM uses T=1000.")
    return from_betas(np.linspace(beta_min, beta_max, T))


def scaled_linear(*, beta_min: float = 0.00085, beta_max: float = 0.012, T: int = 1000) -> Table:
    """Betas whose square roots are linear: latent diffusion and Stable Diffusion (Rombach et al. 2022)."""
    check_count("T", T, "DDPM uses T=1000.")
    _check_range("beta_min", beta_min, "beta_max", beta_max)
    return from_betas(np.linspace(beta_min**0.5, beta_max**0.5, T) ** 2)


def cosine(*, s: float = 0.008) -> Cosine:
    """Cosine, in continuous time and without clipping: alpha(1) = 0 (Nichol & Dhariwal 2021, eq. 17)."""
    require(0 <= s < 1, f"s must be in [0, 1), got {s}. The paper uses s=0.008.")
    return Cosine(s)


def sigmoid(*, start: float = -3.0, end: float = 3.0, tau: float = 1.0) -> Sigmoid:
    """Sigmoid: alpha^2 falls from 1 to 0 along -sigmoid(u), u from start/tau to end/tau (Chen 2023, alg. 1)."""
    require(start < end, f"start must be below end, got {start} and {end}. The paper uses start=-3, end=3.")
    require(tau > 0, f"tau must be positive, got {tau}. Use tau=1.0.")
    return Sigmoid(start, end, tau)


def rectified_flow() -> RectifiedFlow:
    """Straight lines: alpha = 1 - t, sigma = t (Liu et al. 2023; Lipman et al. 2023 with t reversed)."""
    return RectifiedFlow()


def from_betas(betas: Sequence[float] | np.ndarray) -> Table:
    """The schedule of a discrete chain x_i = sqrt(1 - beta_i) x_{i-1} + sqrt(beta_i) eps (Ho et al. 2020, eq. 2).

    Step i of T is t = (i + 1) / T (`Table.time` checks the index); in between it is interpolated. Only the last beta
    may be 1. Raises ConfigError for betas that are not a sequence in (0, 1).
    """
    values = np.asarray(betas, np.float64)
    ok = values.ndim == 1 and values.size >= 1 and np.all(values > 0) and np.all(values[:-1] < 1) and values[-1] <= 1
    require(
        bool(ok),
        f"betas must be a one-dimensional sequence of numbers in (0, 1), the last at most 1, got"
        f" {np.array2string(values, threshold=6)}. For DDPM's, use ddpm_table().",
    )
    return Table(tuple(values.tolist()))


def zero_terminal_snr(betas: Table | Sequence[float] | np.ndarray) -> Table:
    """The chain rescaled so that alpha is exactly 0 at its last step (Lin et al. 2024, alg. 1).

    sqrt(alpha_bar) is shifted and scaled so that its first value stays and its last becomes 0.
    """
    table = betas if isinstance(betas, Table) else from_betas(betas)
    require(table.T >= 2, f"zero_terminal_snr needs at least 2 betas, got {table.T}. Use ddpm_table().")
    alpha = np.sqrt(np.cumprod(1 - np.asarray(table.betas)))
    alpha = (alpha - alpha[-1]) * (alpha[0] / (alpha[0] - alpha[-1]))
    return from_betas(1 - np.square(np.concatenate([alpha[:1], alpha[1:] / alpha[:-1]])))


def shift(schedule: Base, *, logsnr: float | None = None, time: float | None = None) -> Base:
    """`schedule` for another resolution; give exactly one of the two.

    logsnr: added to the log-SNR; 2 log(64 / size) is simple diffusion's (Hoogeboom et al. 2023, section 3.1). alpha and
      sigma stay on the curve of the schedule (alpha^2 + sigma^2 = 1, alpha + sigma = 1, alpha = 1).
    time: t becomes s t / (1 + (s - 1) t) (Esser et al. 2024, eq. 23). For `rectified_flow` it is the same as
      logsnr = -2 log(s).
    """
    require((logsnr is None) != (time is None), "shift needs exactly one of logsnr and time. Type shift(s, time=3.0).")
    if time is not None:
        require(time > 0, f"time must be positive, got {time}. Stable Diffusion 3 uses time=3.0.")
        return TimeShift(schedule, float(time))
    require(abs(float(logsnr or 0)) < 40, f"logsnr must be within +-40, got {logsnr}. Use 2 * log(64 / size).")
    return LogSnrShift(schedule, float(logsnr or 0))


def _check_range(low_name: str, low: float, high_name: str, high: float, equal: bool = True) -> None:
    require(
        0 < low < high or (equal and 0 < low == high),
        f"need 0 < {low_name} {'<=' if equal else '<'} {high_name}, got {low} and {high}.",
    )
