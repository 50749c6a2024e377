"""The path by which a masked sequence is filled in: which token at which step, known before any network is asked.

A token of level u, uniform on (0, 1], is masked at t where u <= lost(t). So on a grid it is filled in the step from t
to s for which lost(s) < u <= lost(t), and in continuous time at the t for which lost(t) = u: all tokens independently,
as the process has it. A step in which an example has no token needs no network; a plan lists those that have.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxdiff.discrete.forward import Denoise, level, log_chances
from jaxdiff.discrete.processes import Masked, pick
from jaxdiff.types import Array, Key


class Plan(NamedTuple):
    """When each token is filled in. Round r is step `steps[r]` of each example, at time `t[r]`."""

    step_of: Array
    """(b, n) the step of each token; one that is no step for tokens that are not masked."""
    steps: Array
    """(R, b)"""
    t: Array
    """(R, b)"""


def on_grid(keys: Key, process: Masked, x: Array, times: Array) -> Plan:
    """Every step of the grid `times` (N + 1,) for every example."""
    b, num_steps = x.shape[0], times.shape[0] - 1
    lost = process.schedule.lost(times)
    u = _levels(keys, x).astype(lost.dtype) * lost[0]
    step_of = num_steps - jnp.searchsorted(lost[1:][::-1], u)  # how many of the times after the first are >= u
    steps = jnp.broadcast_to(jnp.arange(num_steps)[:, None], (num_steps, b))
    t = jnp.broadcast_to(times[:-1, None], (num_steps, b))
    return Plan(jnp.where(x == process.mask, step_of, num_steps), steps, t)


def compact(plan: Plan) -> Plan:
    """Only the steps in which an example has a token, at most n of N: the others are left out, example by example."""
    num_steps, n = plan.steps.shape[0], plan.step_of.shape[1]
    found = jnp.sort(plan.step_of, axis=1)
    again = jnp.concatenate([jnp.zeros_like(found[:, :1], bool), found[:, 1:] == found[:, :-1]], axis=1)
    steps = jnp.sort(jnp.where(again, num_steps, found), axis=1)[:, : min(n, num_steps)].T
    return Plan(plan.step_of, steps, jnp.take_along_axis(plan.t, jnp.minimum(steps, num_steps - 1), axis=0))


def by_hitting(keys: Key, process: Masked, x: Array) -> Plan:
    """One token in each of n steps, at its own time: the limit of infinitely many steps (Zheng et al. 2024, alg. 1)."""
    n = x.shape[1]
    masked = x == process.mask
    u = jnp.where(masked, _levels(keys, x), 0)
    order = jnp.argsort(-u, axis=1)
    steps = jnp.broadcast_to(jnp.arange(n)[:, None], (n, x.shape[0]))
    t = process.schedule.inverse(jnp.take_along_axis(u, order, axis=1).T)
    return Plan(jnp.where(masked, jnp.argsort(order, axis=1), n), steps, t)


def follow(
    denoise: Denoise, process: Masked, x: Array, plan: Plan, choose: Callable[[Array, Array], Array], *, skip: bool
) -> tuple[Array, Array]:
    """Fill x (b, n) in by `choose(steps (b,), log_p (b, n, vocab)) -> tokens`; returns (x, log p of all filled (b,)).

    With `skip`, the network is not called in a round in which no example has a token.
    """

    def body(carry: tuple[Array, Array], now: tuple[Array, Array]) -> tuple[tuple[Array, Array], None]:
        (steps, t), here = now, (plan.step_of == now[0][:, None]) & (carry[0] == process.mask)

        def fill(x: Array, score: Array) -> tuple[Array, Array]:
            log_p = log_chances(process, denoise, x, t)
            tokens = choose(steps, log_p)
            score = score + jnp.sum(jnp.where(here, pick(log_p, tokens), 0), axis=1).astype(score.dtype)
            return jnp.where(here, tokens, x), score

        return (jax.lax.cond(jnp.any(here), fill, lambda *same: same, *carry) if skip else fill(*carry)), None

    start = (x, jnp.zeros(x.shape[:1], plan.t.dtype))
    return jax.lax.scan(body, start, (plan.steps, plan.t))[0]


def _levels(keys: Key, x: Array) -> Array:
    return jax.vmap(lambda key: level(key, x.shape[1:]))(keys)
