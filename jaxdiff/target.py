"""What a network is trained to output, as one 2 x 2 system.

    x_t    = alpha x0 + sigma eps            eps: (0, 1)            v:        (-sigma, alpha)
    target =     a x0 +     b eps            x0:  (1, 0)            velocity: (alpha', sigma')
                                             score: (0, -1/sigma)   edm(sd):  (sigma / sd, -sd alpha) / h
    with h^2 = sigma^2 + sd^2 alpha^2. Solved for the pair:

    x0  = (b x_t - sigma target) / det       det = alpha b - sigma a
    eps = (alpha target - a x_t) / det

Where det is 0 (eps and score at alpha = 0, x0 at sigma = 0) x_t and target say the same thing, and the other unknown is
free. The answer there is the solution of  target = a x0 + b eps  of least norm: the known one as told, the other 0.

    >>> import jax.numpy as jnp
    >>> import jaxdiff as jd
    >>> flow, t = jd.schedule.rectified_flow(), jnp.float32(0.25)
    >>> x0, eps = jnp.float32([[1.0]]), jnp.float32([[3.0]])
    >>> x_t, velocity = 0.75 * x0 + 0.25 * eps, encode(jd.target.velocity, flow, x0, eps, t)
    >>> velocity.item()  # eps - x0
    2.0
    >>> [part.item() for part in decode(jd.target.velocity, flow, x_t, velocity, t)]
    [1.0, 3.0]
"""

import jax.numpy as jnp

from jaxdiff.errors import ConfigError
from jaxdiff.schedule import as_float, derivative, expand
from jaxdiff.types import Array, Schedule, Target


def _eps(schedule: Schedule, t: Array) -> tuple[Array, Array]:
    one = jnp.ones_like(as_float(t))
    return 0 * one, one


def _x0(schedule: Schedule, t: Array) -> tuple[Array, Array]:
    one = jnp.ones_like(as_float(t))
    return one, 0 * one


def _v(schedule: Schedule, t: Array) -> tuple[Array, Array]:
    return -schedule.sigma(t), schedule.alpha(t)


def _score(schedule: Schedule, t: Array) -> tuple[Array, Array]:
    sigma = schedule.sigma(t)
    # sigma = 0 is an infinite score. The floor is small enough to decode exactly, large enough to square.
    inverse = -1 / jnp.maximum(sigma, float(jnp.finfo(sigma.dtype).tiny) ** 0.25)
    return 0 * inverse, inverse


eps = Target("eps", _eps)
"""The noise (Ho et al. 2020)."""

x0 = Target("x0", _x0)
"""The clean data."""

v = Target("v", _v)
"""alpha eps - sigma x0 (Salimans & Ho 2022)."""

score = Target("score", _score)
"""grad log p(x_t) = -eps / sigma (Song et al. 2021); its scale is bounded where sigma is 0."""

velocity = Target("velocity", derivative)
"""dx_t/dt = alpha' x0 + sigma' eps (Lipman et al. 2023); eps - x0 for rectified flow."""


def edm(sigma_data: float = 0.5) -> Target:
    """EDM's raw network output F, of unit variance for data of standard deviation `sigma_data`.

    x0 = c_skip x + c_out F with x = x_t / alpha (Karras et al. 2022, eq. 7 and Table 1). Raises ConfigError unless
    sigma_data > 0.
    """
    if not sigma_data > 0:
        raise ConfigError(f"sigma_data must be positive, got {sigma_data}. EDM uses sigma_data=0.5.")

    def row(schedule: Schedule, t: Array) -> tuple[Array, Array]:
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        norm = jnp.sqrt(jnp.square(sigma) + jnp.square(sigma_data * alpha))
        return sigma / (sigma_data * norm), -sigma_data * alpha / norm

    return Target(f"edm({sigma_data:g})", row)


def encode(target: Target, schedule: Schedule, x0: Array, eps: Array, t: Array) -> Array:
    """The value of `target` for data `x0` and noise `eps` (b, ...) at time `t`, a scalar or (b,)."""
    x0, eps = as_float(x0), as_float(eps)
    a, b = (expand(u, x0) for u in target.row(schedule, t))
    return a * x0 + b * eps


def decode(target: Target, schedule: Schedule, x_t: Array, value: Array, t: Array) -> tuple[Array, Array]:
    """(x0, eps) from x_t and a value of `target`; finite everywhere (see the module). At least float32."""
    x_t = as_float(x_t)
    value = as_float(value).astype(x_t.dtype)
    alpha, sigma = expand(schedule.alpha(t), x_t), expand(schedule.sigma(t), x_t)
    a, b = (expand(u, x_t) for u in target.row(schedule, t))
    det = alpha * b - sigma * a
    singular = jnp.abs(det) < float(jnp.finfo(x_t.dtype).tiny) ** 0.5
    det = jnp.where(singular, 1, det)
    norm = jnp.square(a) + jnp.square(b)
    x0 = jnp.where(singular, a * value / norm, (b * x_t - sigma * value) / det)
    eps = jnp.where(singular, b * value / norm, (alpha * value - a * x_t) / det)
    return x0, eps


def convert(source: Target, to: Target, schedule: Schedule, x_t: Array, value: Array, t: Array) -> Array:
    """A value of `source` at x_t, as the value of `to` for the same (x0, eps)."""
    return encode(to, schedule, *decode(source, schedule, x_t, value, t), t)
