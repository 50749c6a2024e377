"""What every schedule shares: shapes and dtypes, derivatives, log-SNR, and an inverse that is exact at both ends.

logsnr = 2 (log alpha - log sigma), clamped to +-80
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxdiff.errors import ConfigError
from jaxdiff.types import Array, Schedule

LOGSNR_MAX = 80.0
_FLOOR = 1e-30  # keeps log(0) finite; its log-SNR is far outside the clamp
_EDGE = 1e-6  # distance from the ends at which derivatives are taken: d sigma/dt of a VP schedule is infinite at 0


def as_float(x: Array | np.ndarray | float) -> Array:
    """`x` as a JAX array of at least float32: float32 and float64 stay, anything else becomes float32."""
    x = jnp.asarray(x)
    return x if x.dtype in (jnp.float32, jnp.float64) else x.astype(jnp.float32)


def expand(a: Array | float, x: Array) -> Array:
    """`a`, a scalar or (b,), in the dtype of `as_float(x)` and shaped to broadcast against `x` (b, ...).

    Raises ConfigError if `a` is neither a scalar nor as long as the batch.
    """
    a = jnp.asarray(a).astype(as_float(x).dtype)
    if a.ndim == 1 and x.ndim >= 1 and a.shape[0] == x.shape[0]:
        return a.reshape(a.shape + (1,) * (x.ndim - 1))
    if a.ndim == 0:
        return a.reshape((1,) * x.ndim)
    raise ConfigError(
        f"a time or scale must be a scalar or have shape ({x.shape[0] if x.ndim else 'b'},) to go with"
        f" x of shape {x.shape}, got shape {a.shape}. Use t of shape (x.shape[0],)."
    )


def derivative(schedule: Schedule, t: Array | float) -> tuple[Array, Array]:
    """(d alpha/dt, d sigma/dt), finite: within 1e-6 of an end, the value at that distance is used.

    The velocity target is made of them, and so are the drift and diffusion of the SDE.
    """
    return _rates(schedule, t)[1]


def sde(schedule: Schedule, t: Array | float) -> tuple[Array, Array]:
    """(f, g^2) of the SDE dx = f x dt + g dw that has the marginals x_t = alpha x0 + sigma eps.

    f = d log alpha/dt, g^2 = d sigma^2/dt - 2 f sigma^2 (Kingma et al. 2021; Lu et al. 2022, section 2.1): of `vp`
    Song's -beta/2 and beta. Finite everywhere: within 1e-6 of an end, the value at that distance is used, so that where
    alpha(1) = 0 and the truth is infinite, f is about -1e6. For `ve`, x starts with sigma(0) of noise in it.
    """
    (alpha, sigma), (alpha_rate, sigma_rate) = _rates(schedule, t)
    f = alpha_rate / alpha
    return f, 2 * sigma * (sigma_rate - f * sigma)


def _rates(schedule: Schedule, t: Array | float) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """(alpha, sigma) and their derivatives, at least 1e-6 from both ends."""
    t = jnp.clip(as_float(t), _EDGE, 1 - _EDGE)
    return jax.jvp(lambda u: (schedule.alpha(u), schedule.sigma(u)), (t,), (jnp.ones_like(t),))


def safe_sqrt(u: Array) -> Array:
    """Square root with derivative 0, not infinity, at 0."""
    positive = u > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, u, 1)), 0)


def pin(t: Array, value: Array, start: float, end: float) -> Array:
    """`value`, with its limits exact: `start` at t <= 0 and `end` at t >= 1."""
    return jnp.where(t <= 0, start, jnp.where(t >= 1, end, value)).astype(t.dtype)


def require(ok: bool, message: str) -> None:
    """Raise ConfigError with `message` unless `ok`."""
    if not ok:
        raise ConfigError(message)


def check_times(times: Any, dtype: Any) -> Array:
    """`times` as an array of `dtype`. Raises ConfigError unless decreasing, in [0, 1]; traced ones go unchecked."""
    if np.ndim(times) != 1 or np.shape(times)[0] < 2:
        raise ConfigError(
            f"times must be one row of at least 2 times, got shape {np.shape(times)}. "
            "Make one with sample.uniform_grid(schedule, num_steps), or discrete.grid(num_steps) for tokens."
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


class Base:
    """What all schedules share: log-SNR from alpha and sigma, and an inverse that is exact at infinite log-SNR."""

    def alpha(self, t: Array) -> Array:
        raise NotImplementedError

    def sigma(self, t: Array) -> Array:
        raise NotImplementedError

    def _inverse(self, logsnr: Array) -> Array:
        raise NotImplementedError

    def project(self, a: Array, b: Array) -> tuple[Array, Array]:
        """The (alpha, sigma) of this family with alpha : sigma = a : b. Here: alpha^2 + sigma^2 = 1."""
        norm = jnp.sqrt(jnp.square(a) + jnp.square(b))
        return a / norm, b / norm

    def logsnr(self, t: Array) -> Array:
        """log(alpha^2 / sigma^2), clamped to +-80."""
        log_alpha, log_sigma = (jnp.log(jnp.maximum(u, _FLOOR)) for u in (self.alpha(t), self.sigma(t)))
        return jnp.clip(2 * (log_alpha - log_sigma), -LOGSNR_MAX, LOGSNR_MAX)

    def inverse(self, logsnr: Array) -> Array:
        """The t with this log-SNR, clipped to [0, 1]; the clamps +-80 are the ends themselves."""
        logsnr = as_float(logsnr)
        t = jnp.clip(self._inverse(jnp.clip(logsnr, -LOGSNR_MAX, LOGSNR_MAX)), 0, 1)
        return jnp.where(logsnr >= LOGSNR_MAX, 0, jnp.where(logsnr <= -LOGSNR_MAX, 1, t)).astype(logsnr.dtype)
