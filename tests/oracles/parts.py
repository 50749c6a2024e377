"""What is no solver of fixed steps, beside its formulas: phi, the Brownian path, what `adaptive` hands to Diffrax.

Each is a check(solvers) -> words or None, as the cases of `printed` are; `solvers` is a package of solvers.
"""

import functools
import importlib
import math
import sys
import types
from fractions import Fraction
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff import process
from tests.oracles import printed

_BOTTOM, _TOP, _HALVINGS = 0, 2**32 - 1, 24


def part(solvers: Any, name: str) -> Any:
    """A module of this package of solvers."""
    return importlib.import_module(f"{solvers.__name__}.{name}")


@functools.cache
def _phi_table() -> tuple[np.ndarray, np.ndarray]:
    """(h, phi_k(-h)), k = 1 to 4, in rational numbers."""
    h = np.array([0.0, 1e-9, 1e-3, 0.3, 0.999, 1.0, 1.001, 4.0, 40.0, 80.0])
    return h, np.array([[_series(Fraction(float(u)).limit_denominator(10**9), k) for u in h] for k in (1, 2, 3, 4)])


def _series(h: Fraction, k: int) -> float:
    """sum_j (-h)^j / (j + k)!"""
    total = term = Fraction(1, math.factorial(k))
    j = 0
    while abs(term) > Fraction(1, 10**60):
        j += 1
        term *= -h / (j + k)
        total += term
    return float(total)


def phi(solvers: Any) -> str | None:
    """phi_k(-h) = sum_j (-h)^j / (j + k)! to the last digits, in both precisions."""
    h, right = _phi_table()
    for dtype, most in ((jnp.float64, 1e-14), (jnp.float32, 2e-6)):
        with jax.enable_x64(True):
            found = np.stack(part(solvers, "polynomial").phi(jnp.asarray(h, dtype), 4))
        worst = np.abs(found / right - 1).max()
        if not worst < most:
            return f"phi is wrong by {worst:.1e} in {dtype.__name__}"
    return None


def _normals(data: np.ndarray, width: int) -> np.ndarray:
    """Numbers that belong to keys: (..., 2) -> (..., width)."""
    rows = [np.random.default_rng([int(v) for v in row]).standard_normal(width) for row in data.reshape(-1, 2)]
    return np.reshape(rows, (*data.shape[:-1], width))


def _path(keys: jax.Array, logsnr: float, width: int) -> np.ndarray:
    """Z at one log-SNR: halvings of [-80, 80], each a draw of Z given both its neighbours; Cov = exp(-|distance| / 2).

    The node of a halving is numbered as in a heap: 1, and 2 n and 2 n + 1 below n.
    """
    node, nodes, left, size = 1, [], -80.0, 160.0
    for _ in range(_HALVINGS):
        nodes.append(node)
        size /= 2
        up = logsnr >= left + size
        left, node = left + size * up, 2 * node + up
    numbers = jnp.asarray([_BOTTOM, _TOP, *nodes], jnp.uint32)
    folded = jax.vmap(lambda key: jax.vmap(lambda n: jax.random.fold_in(key, n))(numbers))(keys)
    low, high, *draws = np.moveaxis(_normals(np.asarray(jax.random.key_data(folded)), width), 1, 0)
    left, size = -80.0, 160.0
    for draw in draws:
        ends = np.array([[1.0, np.exp(-size / 2)], [np.exp(-size / 2), 1.0]])
        towards = np.full(2, np.exp(-size / 4))
        weights = np.linalg.solve(ends, towards)
        size /= 2
        middle = weights[0] * low + weights[1] * high + np.sqrt(-np.expm1(np.log(weights @ towards))) * draw
        if logsnr >= left + size:
            left, low = left + size, middle
        else:
            high = middle
    return low + min(max((logsnr - left) / size, 0.0), 1.0) * (high - low)


def brownian(solvers: Any) -> str | None:
    """The noise over a span: (Z_s - e^(-d/2) Z_t) / sqrt(1 - e^-d); in a step that goes up, fresh noise."""
    levels, width = printed.VP, 3  # not the number of rows

    def normal(key, shape, dtype):
        return jnp.asarray(_normals(np.asarray(jax.random.key_data(key)), width)).reshape(shape).astype(dtype)

    with printed.eagerly(), jax.debug_key_reuse(False), mock.patch.object(process, "normal", normal):
        keys, other = (jax.random.split(jax.random.key(n), 2) for n in (0, 1))
        noise, x = solvers.brownian_path(keys, printed.Schedule(levels)), jnp.zeros((2, width))
        for t, s in ((0.7, 0.4), (1.0, 0.8), (1.0, 1 - 2**-53), (0.3, 0.0), (0.5, 0.499), (0.5, 0.5), (0.4, 0.7)):
            found = noise(other, x, jnp.asarray(t), jnp.asarray(s))
            if t > s:
                (z_t, z_s), d = (
                    (_path(keys, 2 * levels.half_logsnr(u), width) for u in (t, s)),
                    2 * float(levels.half_logsnr(s) - levels.half_logsnr(t)),
                )
                right = (z_s - np.exp(-d / 2) * z_t) / np.sqrt(-np.expm1(-d))
            else:
                right = normal(other, x.shape, x.dtype)
            wrong = np.abs(np.asarray(found) - np.asarray(right)).max()
            if not wrong < 1e-8:
                return f"the noise from {t} to {s} is {wrong:.1e} off"
    return None


class _Diffrax(types.ModuleType):
    """A stand-in that writes down what it is told, and integrates by three steps of the midpoint rule."""

    def __init__(self):
        super().__init__("diffrax")
        self.told: dict[str, Any] = {}

    def PIDController(self, *, rtol, atol):
        self.told |= {"rtol": rtol, "atol": atol}
        return "control"

    def ODETerm(self, field):
        return field

    def Dopri5(self):
        return "Dopri5"

    def diffeqsolve(self, field, method, start, end, first, y, args, *, stepsize_controller, max_steps):
        self.told |= {"method": method, "first": first, "control": stepsize_controller, "max_steps": max_steps}
        solution = types.SimpleNamespace(ys=[integrate(lambda level, y: field(level, y, args), start, end, y)])
        return solution


def integrate(field, start, end, y):
    """Three steps of the midpoint rule."""
    h = (end - start) / 3
    for n in range(3):
        level = start + n * h
        y = y + h * field(level + h / 2, y + h / 2 * field(level, y))
    return y


def adaptive(solvers: Any) -> str | None:
    """dy/dtau = eps - x0, y = x / (alpha + sigma), tau = sigma / (alpha + sigma), down to 1e-4; then D."""
    start = printed.Problem(printed.VP, (0.9, 0.0)).x
    for levels, times in ((printed.VP, (0.9, 0.4)), (printed.SKEW, (1.0, 0.0)), (printed.FLOW, (1.0, 0.0))):
        for settings in ({}, {"rtol": 3e-4, "atol": 2e-5, "max_steps": 77}):
            diffrax = _Diffrax()
            with printed.eagerly(), mock.patch.dict(sys.modules, {"diffrax": diffrax}):
                solve = solvers.adaptive(printed.Schedule(levels), **settings)
                denoise = lambda x, t: _answer(jnp.sin, x, jnp.broadcast_to(t, x.shape[:1])[:, None])  # noqa: E731
                x, _ = solve.step(None, denoise, jnp.asarray(start), *map(jnp.asarray, times), solve.init(start))
            told = {"rtol": 1e-4, "atol": 1e-4, "max_steps": 4096} | settings
            told |= {"method": "Dopri5", "first": None, "control": "control"}
            if diffrax.told != told:
                return f"Diffrax is told {diffrax.told}, not {told}"
            wrong = np.abs(np.asarray(x) - _flow(levels, start, *times, lambda x, t: _answer(np.sin, x, t))).max()
            if not wrong < 1e-9:
                return f"from {times[0]} to {times[1]} on {levels} it is {wrong:.1e} off"
    return None


def _answer(sin, x, t):
    return 0.4 * sin(1.4 * x + 2.0 * t) + 0.1 * x


def _flow(levels, x, t, s, denoise):
    scale = lambda u: levels.alpha(u) + levels.sigma(u)  # noqa: E731

    def time(level):
        with np.errstate(divide="ignore"):
            return float(levels.time(np.log1p(-level) - np.log(level)))

    def field(level, y):
        x, u = y * scale(time(level)), time(level)
        x0 = denoise(x, u)
        return (x - levels.alpha(u) * x0) / levels.sigma(u) - x0

    start, end = (levels.sigma(u) / scale(u) for u in (t, s))
    end = max(end, 1e-4)
    last = time(end)
    y = integrate(field, start, end, x / scale(t))
    return y * scale(last) if levels.sigma(s) > 0 else levels.alpha(s) * denoise(y * scale(last), last)


CHECKS = {"phi": phi, "brownian_path": brownian, "adaptive": adaptive}
