"""Guidance: functions from denoiser to denoiser, to be composed freely.

    cfg            D = D_u + w (D_c - D_u)        the same in x0, eps, v and score: they are affine in each other
    interval       D = D_guided where sigma / alpha is in (low, high], else D_plain
    rescale        D = phi D_g std(D_c) / std(D_g) + (1 - phi) D_g
    threshold      D = clip(D_0, -1, 1), or clip(D_0, -q, q) / q with q = max(quantile(|D_0|), 1)
    classifier     D = D_0 + w sigma^2 / alpha grad_x log p(y | x_t)          (Tweedie's formula for the tilted density)

Statistics are taken per example: nothing here lets one row of a batch change another. Where a denoiser returns a
`denoise.LearnedRange`, its x0 is guided and its variance stays: in `cfg` that of cond (as in GLIDE and DiT).

    >>> guided = cfg(lambda x, t: x + 1, lambda x, t: x, 4.0)
    >>> threshold_static(guided, 3.0)(jnp.float32([[0.0], [-2.0]]), jnp.float32(0.5)).tolist()
    [[3.0], [2.0]]
"""

from collections.abc import Callable
from math import isfinite
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxdiff.denoise import map_x0
from jaxdiff.errors import ConfigError
from jaxdiff.schedule import as_float, expand
from jaxdiff.types import Array, Denoiser, PyTree, Schedule


def cfg(cond: Denoiser, uncond: Denoiser, scale: Any, *, phi: float = 0.0) -> Denoiser:
    """Classifier-free guidance (Ho & Salimans 2022, eq. 6, with scale = 1 + w): uncond + scale * (cond - uncond).

    scale: a number, or an array of shape () or (b,). A Python 1 is off (uncond is not run), a Python 0 is uncond.
    phi > 0 rescales the result as `rescale` does, without running cond again.
    Raises ConfigError for a negative or non-finite scale.
    """
    scale, phi = _check_scale(scale), _check_phi(phi)
    if _is_static(scale, 1):
        return cond
    if _is_static(scale, 0):
        return uncond
    return lambda x, t: _combine(cond(x, t), uncond(x, t), scale, phi)


def cfg_batched(
    denoise_with_cond: Callable[[Array, Array, PyTree], Any],
    cond: PyTree,
    null_cond: PyTree,
    scale: Any,
    *,
    phi: float = 0.0,
) -> Denoiser:
    """`cfg` by one call of `denoise_with_cond(x, t, cond)` on a batch of 2 b: the rows of cond, then of null_cond.

    cond, null_cond: pytrees of the same structure whose leaves are (b, ...). Put a negative prompt into null_cond.
    scale, phi and errors as in `cfg`.
    """
    scale, phi = _check_scale(scale), _check_phi(phi)
    if _is_static(scale, 1):
        return lambda x, t: denoise_with_cond(x, t, cond)
    if _is_static(scale, 0):
        return lambda x, t: denoise_with_cond(x, t, null_cond)

    def guided(x: Array, t: Array) -> Array:
        both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), cond, null_cond)
        out = denoise_with_cond(jnp.concatenate([x, x]), t if jnp.ndim(t) == 0 else jnp.concatenate([t, t]), both)
        b = x.shape[0]
        return _combine(jax.tree.map(lambda u: u[:b], out), jax.tree.map(lambda u: u[b:], out), scale, phi)

    return guided


def autoguidance(good: Denoiser, bad: Denoiser, scale: Any) -> Denoiser:
    """Guide a model by a worse version of itself (Karras et al. 2024, eq. 3): bad + scale * (good - bad). See `cfg`."""
    return cfg(good, bad, scale)


def interval(guided: Denoiser, plain: Denoiser, schedule: Schedule, *, sigma: tuple[float, float]) -> Denoiser:
    """Use `guided` only where sigma(t) / alpha(t) lies in (low, high], else `plain` (Kynkaanniemi et al. 2024, eq. 5).

    For a scalar t only the one that is used runs; for t (b,) both do. Raises ConfigError unless 0 <= low < high.
    """
    low, high = sigma
    if not 0 <= low < high:
        raise ConfigError(
            f"sigma must be (low, high) with 0 <= low < high, got {sigma}. For log-SNR l, sigma = exp(-l / 2)."
        )
    # low = 0 gives an infinite log-SNR: the clamped end of a schedule is inside.
    logsnr_low, logsnr_high = -2 * np.log(high), np.inf if low == 0 else -2 * np.log(low)

    def limited(x: Array, t: Array) -> Array:
        logsnr = schedule.logsnr(jnp.asarray(t))
        inside = (logsnr >= float(logsnr_low)) & (logsnr < float(logsnr_high))
        if inside.ndim == 0:
            return jax.lax.cond(inside, guided, plain, x, t)
        chosen = expand(inside, x) > 0
        return jax.tree.map(lambda yes, no: jnp.where(chosen, yes, no), guided(x, t), plain(x, t))

    return limited


def rescale(guided: Denoiser, cond: Denoiser, phi: float = 0.7) -> Denoiser:
    """Pull the contrast of `guided` back to that of `cond` (Lin et al. 2024, eq. 15 and 16), per example, on x0.

    Runs both; `cfg(..., phi=)` does the same without a second run. Raises ConfigError unless 0 <= phi <= 1.
    """
    _check_phi(phi)
    return lambda x, t: map_x0(lambda x0, x0_cond: _rescale(x0, x0_cond, phi), guided(x, t), cond(x, t))


def threshold_static(denoise: Denoiser, limit: float = 1.0) -> Denoiser:
    """Clip x0 to [-limit, limit]. Raises ConfigError unless limit > 0."""
    _check_limit(limit)
    return lambda x, t: map_x0(lambda x0: jnp.clip(x0, -limit, limit), denoise(x, t))


def threshold_dynamic(denoise: Denoiser, quantile: float = 0.995, limit: float = 1.0) -> Denoiser:
    """Clip x0 to its own quantile q of |x0|, then scale back to `limit` (Saharia et al. 2022, sec. 2.3), per example.

    Nothing happens where q <= limit. Raises ConfigError unless 0 < quantile <= 1 and limit > 0.
    """
    _check_limit(limit)
    if not 0 < quantile <= 1:
        raise ConfigError(f"quantile must lie in (0, 1], got {quantile}. Imagen uses 0.995.")

    def threshold(x0: Array) -> Array:
        rows = as_float(jnp.abs(x0)).reshape(x0.shape[0], -1)
        q = expand(jnp.maximum(jnp.quantile(rows, quantile, axis=1), limit), x0).astype(x0.dtype)
        return jnp.clip(x0, -q, q) * (limit / q)

    return lambda x, t: map_x0(threshold, denoise(x, t))


def classifier(
    denoise: Denoiser, log_prob: Callable[[Array, Array], Array], schedule: Schedule, scale: Any = 1.0
) -> Denoiser:
    """Classifier guidance (Dhariwal & Nichol 2021, sec. 4.2): x0 + scale sigma^2 / alpha grad_x log p(y | x_t).

    log_prob(x_t, t) -> (b,), each row of its own x alone. Where alpha is exactly 0, x_t holds nothing of y and the
    shift is 0. scale: as in `cfg` (0 is off). Raises ConfigError for a negative or NaN scale.
    """
    scale = _check_scale(scale)
    if _is_static(scale, 0):
        return denoise

    def guided(x: Array, t: Array) -> Array:
        gradient = jax.grad(lambda x: jnp.sum(log_prob(x, t)))(x)
        alpha, sigma = schedule.alpha(jnp.asarray(t)), schedule.sigma(jnp.asarray(t))
        shift = jnp.where(alpha > 0, sigma**2 / jnp.where(alpha > 0, alpha, 1.0), 0.0)
        moved = (_column(scale, x) * expand(shift, x) * gradient).astype(x.dtype)
        return map_x0(lambda x0: x0 + moved, denoise(x, t))

    return guided


def _combine(cond: Any, uncond: Any, scale: Any, phi: float) -> Any:
    def combine(x0_c: Array, x0_u: Array) -> Array:
        x0 = (x0_u + _column(scale, x0_c) * (x0_c - x0_u)).astype(x0_c.dtype)
        return x0 if phi == 0 else _rescale(x0, x0_c, phi)

    return map_x0(combine, cond, uncond)


def _rescale(x0: Array, x0_cond: Array, phi: float) -> Array:
    axes = tuple(range(1, x0.ndim))
    std, std_cond = jnp.std(x0, axes, keepdims=True), jnp.std(x0_cond, axes, keepdims=True)
    # A constant example has no contrast to restore.
    factor = jnp.where(std > 0, std_cond / jnp.where(std > 0, std, 1.0), 1.0)
    return x0 * (phi * factor + (1 - phi))


def _column(scale: Any, x: Array) -> Any:
    return expand(jnp.asarray(scale), x) if isinstance(scale, jax.Array | np.ndarray) else scale


def _is_static(scale: Any, value: float) -> bool:
    return isinstance(scale, int | float) and scale == value


def _check_scale(scale: Any) -> Any:
    """The scale as it is; concrete values are checked, traced ones cannot be."""
    if not isinstance(scale, Tracer):
        values = np.asarray(scale, np.float64)
        if not (np.isfinite(values).all() and (values >= 0).all()):
            raise ConfigError(f"guidance scale must be finite and >= 0, got {scale}. Use 1 for no guidance.")
    return float(scale) if isinstance(scale, np.generic) else scale


def _check_phi(phi: float) -> float:
    if not 0 <= phi <= 1:
        raise ConfigError(f"phi must lie in [0, 1], got {phi}. Use 0 for no rescaling; Lin et al. use 0.7.")
    return phi


def _check_limit(limit: float) -> None:
    if not (isfinite(limit) and limit > 0):
        raise ConfigError(f"limit must be finite and > 0, got {limit}. Data lie in [-1, 1], so use 1.")
