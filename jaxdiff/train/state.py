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

from jaxdiff.errors import ConfigError, NonFiniteError
from jaxdiff.train import guard
from jaxdiff.types import Array, PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Parameters and everything that moves with them.

    `step` counts every step taken, `bad_steps` those of them that the finite gate refused (both () int32); the
    number of updates made is their difference. `ema_params` holds one copy of the parameters for each name.
    `bad_at` (10,) int32 are the steps of the last refused ones, and `skipped` (2, 2) int32 the last two stretches
    [from, to) of the data that `roll_back` left out; the newest comes last, and -1 is none.
    """

    step: Array
    params: PyTree
    ema_params: dict[str, PyTree]
    opt_state: PyTree
    bad_steps: Array
    bad_at: Array
    skipped: Array


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
        bad_at=jnp.full((guard.IN_WINDOW,), -1, jnp.int32),
        skipped=jnp.full((guard.ROLLBACKS, 2), -1, jnp.int32),
    )


def roll_back(good: TrainState, state: TrainState, step: int) -> TrainState:
    """The parameters of `good`, an earlier state of this run, at `step`, where `state` is in trouble.

    The steps between count as bad ones: their data are not used, and no update was made in them.
    Raises NonFiniteError where this would be the third time within 1,000 steps.
    """
    windows = [(int(start), int(end)) for start, end in state.skipped]
    if windows[0][0] >= 0 and step - windows[0][1] < guard.WINDOW:
        raise NonFiniteError(
            f"the gradients are not finite again before step {step}, though the data of the steps "
            f"{' and '.join(f'{start} to {end - 1}' for start, end in windows)} were skipped. Look at what comes in "
            "there and then; else start anew with a lower learning rate, stronger clipping, or in float32."
        )
    start = int(good.step)
    return dataclasses.replace(
        good,
        step=jnp.int32(step),
        bad_steps=good.bad_steps + jnp.int32(step - start),
        bad_at=jnp.full_like(good.bad_at, -1),
        skipped=jnp.array([*windows[1:], (start, step)], jnp.int32),
    )
