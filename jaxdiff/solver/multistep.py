"""Linear multistep methods on eps: the flow is x / alpha = int eps drho, and eps a polynomial through its last values.

    rho = sigma / alpha,    x_s = alpha_s (x_t / alpha_t + int_t^s eps drho)
                                = alpha_s x0 + sigma_s eps_t + alpha_s int_t^s (eps - eps_t) drho

In the second form nothing is divided by alpha, so pure noise (rho infinite) can start: its one step is DDIM.
The polynomial is in rho (`lms`), in t (`deis`), or in the number of the step (`plms`, `ipndm`, `pndm`: the weights of
Adams and Bashforth, the same at every step). All begin with what is there, order 1, 2, ...; one call a step.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.errors import ConfigError
from jaxdiff.solver.base import predict
from jaxdiff.solver.polynomial import Past, beyond_first, no_past, remember
from jaxdiff.types import Array, Denoiser, Key, PyTree, Schedule, Solver

_POINTS, _WEIGHTS = np.polynomial.legendre.leggauss(8)  # on [-1, 1]


def lms(schedule: Schedule, *, order: int = 4) -> Solver:
    """Linear multistep, the Adams-Bashforth weights of any grid (k-diffusion's sample_lms); exact in steps of rho.

    The first step is Euler's and leaves an error h^2: from equal first steps the order is 2, from short ones `order`.
    To sigma = 0 it returns D (k-diffusion extrapolates there too). Raises ConfigError unless order is 1, 2, 3 or 4.
    """
    _check_order("lms", order, (1, 2, 3, 4))

    def step(key: Key, denoise: Denoiser, x: Array, t: Array, s: Array, memory: PyTree) -> tuple[Array, PyTree]:
        x0, eps = predict(schedule, denoise, x, t)
        here = _rho(schedule, t)
        length = _rho(schedule, s) - here
        moments = [length / (k + 1) for k in range(order)]
        places = [(node - here) / length for node in memory[0]]
        return _advance(schedule, x0, eps, s, moments, places, memory), remember(memory, here, eps)

    return Solver(lambda x: no_past(x, order - 1), step)


def deis(schedule: Schedule, *, order: int = 3) -> Solver:
    """DEIS, tAB (Zhang & Chen 2023, sec. 3): eps is a polynomial in t; `order` values of it, order as many.

    Its integrals over rho are done by Gauss' rule in 8 points of log-SNR. When the second call comes, the first step
    is corrected as UniC-1 does (Zhao et al. 2023): without it the order would be 2. To sigma = 0 it returns D.
    Raises ConfigError unless order is 2 or 3.
    """
    _check_order("deis", order, (2, 3))

    def step(key: Key, denoise: Denoiser, x: Array, t: Array, s: Array, memory: PyTree) -> tuple[Array, PyTree]:
        x0, eps = predict(schedule, denoise, x, t)
        eps = eps - _first_step_error(schedule, t, memory) * (eps - memory[1][0])
        here, there = schedule.logsnr(t) / 2, schedule.logsnr(s) / 2
        points = here + (there - here) * jnp.asarray((_POINTS + 1) / 2, t.dtype)
        drho = -jnp.exp(-points) * (there - here) * jnp.asarray(_WEIGHTS / 2, t.dtype)
        inside = (schedule.inverse(2 * points) - t) / (s - t)
        moments = [jnp.sum(drho * inside**k) for k in range(order)]
        places = [(node - t) / (s - t) for node in memory[0]]
        return _advance(schedule, x0, eps, s, moments, places, memory), remember(memory, t, eps)

    return Solver(lambda x: no_past(x, order - 1), step)


def ipndm(schedule: Schedule, *, order: int = 4) -> Solver:
    """iPNDM (Zhang & Chen 2023): PLMS that starts with its own lower orders, one call in every step.

    Order 2, on grids uniform in a smooth function of t: the weights are those of steps equal in rho, and the first
    step is Euler's. To sigma = 0 it returns D. Raises ConfigError unless order is 1, 2, 3 or 4.
    """
    _check_order("ipndm", order, (1, 2, 3, 4))

    def step(key: Key, denoise: Denoiser, x: Array, t: Array, s: Array, memory: PyTree) -> tuple[Array, PyTree]:
        x0, eps = predict(schedule, denoise, x, t)
        return _adams_bashforth(schedule, x0, eps, t, s, memory), remember(memory, jnp.zeros_like(t), eps)

    return Solver(lambda x: no_past(x, order - 1), step)


def plms(schedule: Schedule) -> Solver:
    """PLMS (Liu et al. 2022, started as by latent diffusion): the weights of Adams-Bashforth, order 4.

    The first step is improved Euler's (two calls), then orders 2, 3, 4. Order 2 on grids uniform in a smooth function
    of t; 3 where rho itself is uniform (the weights are made for it, the start is of order 3). To sigma = 0: D.
    """

    def step(key: Key, denoise: Denoiser, x: Array, t: Array, s: Array, memory: PyTree) -> tuple[Array, PyTree]:
        x0, eps = predict(schedule, denoise, x, t)

        def improved_euler() -> Array:
            _, eps_s = predict(schedule, denoise, _transfer(schedule, x0, eps, eps, t, s), s)
            return _transfer(schedule, x0, eps, (eps + eps_s) / 2, t, s)

        first = ~jnp.isfinite(memory[0][0]) & _regular(schedule, t, s)
        x = jax.lax.cond(first, improved_euler, lambda: _adams_bashforth(schedule, x0, eps, t, s, memory))
        return x, remember(memory, jnp.zeros_like(t), eps)

    return Solver(lambda x: no_past(x, 3), step)


def pndm(schedule: Schedule) -> Solver:
    """PNDM (F-PNDM of Liu et al. 2022): three pseudo Runge-Kutta steps of four calls each, then PLMS.

    Order 2 on grids uniform in a smooth function of t, with smaller errors than `plms`. To sigma = 0 it returns D.
    """

    def step(key: Key, denoise: Denoiser, x: Array, t: Array, s: Array, memory: PyTree) -> tuple[Array, PyTree]:
        x0, eps = predict(schedule, denoise, x, t)

        def ask(slope: Array, time: Array) -> Array:
            return predict(schedule, denoise, _transfer(schedule, x0, eps, slope, t, time), time)[1]

        def runge_kutta() -> Array:
            second = ask(eps, (t + s) / 2)
            third = ask(second, (t + s) / 2)
            fourth = ask(third, s)
            return _transfer(schedule, x0, eps, (eps + 2 * second + 2 * third + fourth) / 6, t, s)

        start = ~jnp.isfinite(memory[0][-1]) & _regular(schedule, t, s)
        x = jax.lax.cond(start, runge_kutta, lambda: _adams_bashforth(schedule, x0, eps, t, s, memory))
        return x, remember(memory, jnp.zeros_like(t), eps)

    return Solver(lambda x: no_past(x, 3), step)


def _check_order(name: str, order: int, allowed: Sequence[int]) -> None:
    if type(order) is not int or order not in allowed:
        raise ConfigError(
            f"{name} has order {', '.join(map(str, allowed))}; got {order!r}. Use {name}(schedule) for {allowed[-1]}."
        )


def _rho(schedule: Schedule, t: Array) -> Array:
    """sigma / alpha, finite: at most exp(40) (a log-SNR of -80)."""
    return jnp.exp(-schedule.logsnr(t) / 2)


def _regular(schedule: Schedule, t: Array, s: Array) -> Array:
    """Whether another eps than that of t may be used: not to sigma = 0 (D is asked for), nor from rho = infinity."""
    return (schedule.sigma(s) > 0) & (schedule.alpha(t) > 0)


def _advance(
    schedule: Schedule, x0: Array, eps: Array, s: Array, moments: list[Array], places: list[Array], past: Past
) -> Array:
    """x_s, from the integrals int v^k drho and the places v of the past values; v = 0 at t, and 1 at s."""
    added = beyond_first(moments, [jnp.zeros_like(s), *places], [eps, *past[1]])
    alpha, sigma = schedule.alpha(s), schedule.sigma(s)
    return alpha * x0 + sigma * eps + jnp.where(sigma > 0, alpha, 0.0) * added


def _adams_bashforth(schedule: Schedule, x0: Array, eps: Array, t: Array, s: Array, past: Past) -> Array:
    """`_advance` as if all steps were equal in rho: the places are -1, -2, ... (a past node is 0, or infinite)."""
    length = _rho(schedule, s) - _rho(schedule, t)
    moments = [length / (k + 1) for k in range(len(past[0]) + 1)]
    return _advance(schedule, x0, eps, s, moments, [node - k for k, node in enumerate(past[0], 1)], past)


def _transfer(schedule: Schedule, x0: Array, eps: Array, slope: Array, t: Array, s: Array) -> Array:
    """The transfer part of Liu et al. 2022, from x_t = alpha_t x0 + sigma_t eps to s along `slope`."""
    alpha, sigma = schedule.alpha(s), schedule.sigma(s)
    return alpha * x0 + sigma * eps + (sigma - alpha * _rho(schedule, t)) * (slope - eps)


def _first_step_error(schedule: Schedule, t: Array, past: Past) -> Array:
    """(1 - e^-h) / 2 in the second step, h that of the first, else 0.

    UniC-1 adds alpha_t (1 - e^-h) / 2 (D_1 - D_0) to x_t; after a step of DDIM, alpha_t (D_1 - D_0) is
    -sigma_t (eps_1 - eps_0), so it can be taken from eps.
    """
    nodes = past[0]
    second = jnp.isfinite(nodes[0]) & ~jnp.isfinite(nodes[-1])  # never, where only one value is kept
    before = jnp.where(second, nodes[0], t)
    return -jnp.expm1((schedule.logsnr(before) - schedule.logsnr(t)) / 2) / 2
