"""What training carries from one step to the next, as one pytree.

    state_{n+1} = step(state_n, batch_n),   batch_n and every random draw a function of (seed, n) alone

so a run that is killed and restored from a saved state repeats the uninterrupted run bit for bit: no key, no data
iterator and no counter lives outside the state.
"""

import dataclasses
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import optax

from jaxdiff.errors import ConfigError
from jaxdiff.types import Array, PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Parameters and everything that moves with them.

    `step` counts every step taken, `bad_steps` those of them that the finite gate refused (both () int32); the
    number of updates made is their difference. `ema_params` holds one copy of the parameters for each name.
    """

    step: Array
    params: PyTree
    ema_params: dict[str, PyTree]
    opt_state: PyTree
    bad_steps: Array


def create_state(params: PyTree, optimizer: optax.GradientTransformation, *, ema: Iterable[str] = ()) -> TrainState:
    """The state before the first step; every EMA starts from the parameters themselves, not from zero.

    `ema` names the averages (a dict as given to `make_step` will do). All leaves are copies, so that the step may
    donate them while the caller keeps `params`. To shard it from birth, call it inside `mesh.born_sharded`.

    Raises ConfigError for an EMA name with a '.', which checkpoints cannot tell from a nested name.
    """
    names = list(ema)
    for name in names:
        if not name or "." in name:
            raise ConfigError(f"an EMA name must be non-empty and without '.', got {name!r}. Write e.g. 'ema_0_9999'.")
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=jax.tree.map(jnp.copy, params),
        ema_params={name: jax.tree.map(jnp.copy, params) for name in names},
        opt_state=optimizer.init(params),
        bad_steps=jnp.zeros((), jnp.int32),
    )
