"""When gradients are not finite: what the state remembers of it, and when it is time to go back.

    trouble at step n  <=>  gradient n is bad, and so are n - 1 and n - 2, or nine more of the last 1,000

One bad gradient is skipped by the step itself. In trouble the parameters may be the cause: then the last good
checkpoint takes their place, and the data since are not used again (`state.roll_back`).
"""

import jax.numpy as jnp

from jaxdiff.types import Array

IN_A_ROW, IN_WINDOW, WINDOW = 3, 10, 1000
ROLLBACKS = 2  # in one window; then the run stops


def remember(bad_at: Array, step: Array, finite: Array) -> Array:
    """`bad_at` (10,) int32, the steps of the last bad gradients with the newest last, after that of `step`."""
    return jnp.where(finite, bad_at, jnp.concatenate([bad_at[1:], step[None]]))


def trouble(bad_at: Array, step: Array) -> Array:
    """Whether it is time to go back after the gradient of `step`: () bool. -1 in `bad_at` is none."""
    first, recent, last = bad_at[-IN_WINDOW], bad_at[-IN_A_ROW], bad_at[-1]
    in_a_row = (recent >= 0) & (last - recent < IN_A_ROW)
    in_window = (first >= 0) & (last - first < WINDOW)
    return (last == step) & (in_a_row | in_window)
