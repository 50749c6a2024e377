"""Integrals of polynomials through past network outputs: what linear multistep methods are made of.

    P(v) = f[u_0] + f[u_0, u_1] (v - u_0) + f[u_0, u_1, u_2] (v - u_0) (v - u_1) + ...       (Newton; any steps)
    int P dm  from the moments  int v^k dm(v),  k = 0, 1, ...,  of a weight m
    m of an exponential integrator, v in [0, 1]:  int h e^{h (v - 1)} v^k dv = k! h phi_{k+1}(-h)
    phi_k(-h) = sum_j (-h)^j / (j + k)!,      h phi_{k+1}(-h) = 1 / k! - phi_k(-h),      phi_0(-h) = e^{-h}

A node at infinity stands for one that is not there (yet): all differences that reach it are 0. So a method without
a past starts at order 1 and gains an order with every step, without being told how many steps it has done.
"""

from collections.abc import Sequence
from math import factorial, inf
from typing import Any, TypeAlias

import jax.numpy as jnp

from jaxdiff.types import Array

_TERMS = 18  # 1 / 18! is below the rounding of float64

Past: TypeAlias = tuple[tuple[Array, ...], tuple[Array, ...]]
"""(nodes, values) of the last steps, newest first: scalars, and arrays like x."""


def no_past(x: Array, count: int) -> Past:
    """Room for `count` past values like x, none of them there."""
    return (jnp.asarray(inf, x.dtype),) * count, (jnp.zeros_like(x),) * count


def remember(past: Past, node: Array, value: Array) -> Past:
    """`past` with one more value; the oldest is forgotten."""
    nodes, values = past
    return (node, *nodes)[: len(nodes)], (value, *values)[: len(values)]


def phi(h: Array, count: int) -> list[Array]:
    """[phi_1(-h), ..., phi_count(-h)] for h >= 0, without cancellation: the series below 1, the recursion above."""
    small, series = jnp.minimum(h, 1.0), [jnp.full_like(h, 1 / factorial(_TERMS))]
    for k in range(_TERMS - 1, 0, -1):
        series.append(1 / factorial(k) - small * series[-1])
    large = jnp.maximum(h, 1.0)
    recursion = [-jnp.expm1(-large) / large]
    for k in range(1, count):
        recursion.append((1 / factorial(k) - recursion[-1]) / large)
    return [jnp.where(h < 1, a, b) for a, b in zip(series[::-1], recursion, strict=False)]


def exponential_moments(h: Array, count: int) -> list[Array]:
    """int_0^1 h e^{h (v - 1)} v^k dv for k = 0, ..., count - 1."""
    return [h * (factorial(k) * each) for k, each in enumerate(phi(h, count))]


def beyond_first(moments: Sequence[Array], nodes: Sequence[Array], values: Sequence[Array]) -> Array:
    """int (P(v) - values[0]) dm(v): what the polynomial through all the values adds to the first one alone."""
    total: Any = 0.0
    basis: list[Any] = [1.0]  # coefficients of (v - u_0) ... (v - u_{k-1}), lowest first
    table = list(values)
    for k in range(1, len(nodes)):
        gaps = [b - a for a, b in zip(nodes, nodes[k:], strict=False)]
        table = [
            (b - a) / jnp.where(jnp.isfinite(gap), gap, inf) for a, b, gap in zip(table, table[1:], gaps, strict=False)
        ]
        root = jnp.where(jnp.isfinite(nodes[k - 1]), nodes[k - 1], 0.0)
        basis = [lower - root * same for lower, same in zip([0.0, *basis], [*basis, 0.0], strict=True)]
        total = total + sum(c * m for c, m in zip(basis, moments, strict=False)) * table[0]
    return total
