"""UniPC (Zhao et al. 2023): a multistep predictor, and a corrector that costs nothing.

    x_s = (sigma_s / sigma_t) x_t + alpha_s int_0^1 h e^{h (v - 1)} D(v) dv,     v = 0 at t and 1 at s

UniP-p takes for D the polynomial through the last p values. UniC-p takes it through p + 1 values: also the one at s,
which the next step has to ask for anyway. So x_t is corrected when D(x_t, t) is known, before the step from t begins.

The paper's weights solve R rho = b / B(h) and enter multiplied by B(h): for two or more unknowns they are the exact
integrals, whatever B. With one unknown (UniP-2, UniC-1) the paper puts rho = 1/2 instead, so that B(h) / 2 stands for
int h e^{h (v - 1)} v dv, with B_1 = h or B_2 = 1 - e^{-h}.
"""

from collections.abc import Sequence

import jax.numpy as jnp

from jaxdiff.denoise import estimate
from jaxdiff.errors import ConfigError
from jaxdiff.solver.dpm import with_constant
from jaxdiff.solver.polynomial import beyond_first, exponential_moments, no_past, remember
from jaxdiff.types import Array, Denoiser, Key, PyTree, Schedule, Solver

_VARIANTS = ("bh1", "bh2")


def unipc(schedule: Schedule, *, order: int = 2, variant: str = "bh2") -> Solver:
    """UniPC-p of data prediction, p = `order` (Zhao et al. 2023, sec. 3, multistep); one call a step.

    Order p + 1: the corrector adds one (Theorem 3.1). The start climbs through UniPC-1, -2, ..., and its first step is
    of order 2, so over equal steps from the start the whole is of order 3 for p = 3 too. To sigma = 0 it returns D.
    `variant`: B(h), "bh2" (for guidance too) or "bh1". Raises ConfigError for others, or another order than 2 or 3.
    """
    if type(order) is not int or order not in (2, 3) or variant not in _VARIANTS:
        raise ConfigError(
            f'unipc needs order 2 or 3 and variant "bh1" or "bh2", got order={order!r}, variant={variant!r}. '
            "Use unipc(schedule) for UniPC-2; order 1 is ddim."
        )

    def init(x: Array) -> PyTree:
        return x, jnp.ones((), x.dtype), jnp.ones((), x.dtype), no_past(x, order)

    def step(key: Key, denoise: Denoiser, x: Array, t: Array, s: Array, memory: PyTree) -> tuple[Array, PyTree]:
        first_order, h_before, b_before, (nodes, values) = memory
        here, there = schedule.logsnr(t) / 2, schedule.logsnr(s) / 2
        h = there - here
        x0 = estimate(denoise(x, t))
        corrector = [0 * h, jnp.where(jnp.isfinite(nodes[0]), 1.0, nodes[0]), *_places(nodes[1:], nodes[0], h_before)]
        moments = _moments(h_before, b_before, corrector)
        x = first_order + schedule.alpha(t) * beyond_first(moments, corrector, [values[0], x0, *values[1:]])
        predictor = [0 * h, *_places(nodes[:-1], here, h)]
        b = -jnp.expm1(-h) if variant == "bh2" else jnp.where(schedule.alpha(t) > 0, h, 1.0)  # alpha = 0: h is infinite
        added = beyond_first(_moments(h, b, predictor), predictor, [x0, *values[:-1]])
        first_order = with_constant(schedule, x, x0, t, s)
        x = first_order + jnp.where(schedule.sigma(s) > 0, schedule.alpha(s), 0.0) * added
        return x, (first_order, h, b, remember((nodes, values), here, x0))

    return Solver(init, step)


def _places(nodes: Sequence[Array], origin: Array, h: Array) -> list[Array]:
    return [(node - origin) / h for node in nodes]


def _moments(h: Array, b: Array, places: Sequence[Array]) -> list[Array]:
    """The moments of the integral, the first replaced by B(h) / 2 where only one difference is known."""
    moments = exponential_moments(h, len(places))
    alone = True if len(places) == 2 else ~jnp.isfinite(places[2])
    return [moments[0], jnp.where(alone, b / 2, moments[1]), *moments[2:]]
