"""The training step: one compiled, donated function from state to state.

key_n   = fold_in(root, n),                  n = state.step
key_n,i = fold_in(key_n, i),                 micro-batch i of a, where a > 1
g_n     = 1/a sum_i grad mean_b loss(params, key_n,i, batch_n,i)
params, ema, opt_state  <-  update(g_n)      where loss and |g_n| are finite; else untouched and counted
n       <-  n + 1                            always, so that the place in the data moves on past a bad batch
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jaxdiff.errors import ConfigError
from jaxdiff.train import ema as ema_lib
from jaxdiff.train import guard
from jaxdiff.train import mesh as mesh_lib
from jaxdiff.train.state import TrainState
from jaxdiff.types import Array, Key, PyTree

LossFn: TypeAlias = Callable[..., tuple[Array, dict[str, Array]]]
"""`loss_fn(params, key, batch) -> (losses, aux)`: losses (b,), aux a dict of (b,) arrays. With frozen arrays
`loss_fn(params, key, batch, frozen)`."""

Metrics: TypeAlias = dict[str, Array]
Summary: TypeAlias = Callable[[Array, dict[str, Array]], Metrics]
"""`summary(losses, aux) -> metrics`: what a step reports of its per-example losses (b,) and aux (b,)."""


def take(data: PyTree, indices: Array) -> PyTree:
    """The default `get_batch`: rows `indices` (b,) of every array in `data`; without data, the batch itself."""
    return indices if data is None else jax.tree.map(lambda x: x[indices], data)


def no_summary(losses: Array, aux: dict[str, Array]) -> Metrics:
    """Nothing beyond loss, grad_norm, bad_steps and trouble."""
    del losses, aux
    return {}


def logsnr_buckets(low: float = -10.0, high: float = 10.0, count: int = 10) -> Summary:
    """A summary: loss per log-SNR bucket, as `bucket_sum` and `bucket_count` of shape (count,).

    Equal buckets over [low, high]; the outermost take what lies beyond. Needs aux['logsnr'] of shape (b,). Add the
    sums and the counts of many steps before dividing, since a bucket may be empty in one of them.
    """
    if count < 1 or not low < high:
        raise ConfigError(f"logsnr_buckets needs low < high and count >= 1, got {low=}, {high=}, {count=}.")

    def summary(losses: Array, aux: dict[str, Array]) -> Metrics:
        place = jnp.floor((aux["logsnr"] - low) * (count / (high - low)))
        member = jax.nn.one_hot(jnp.clip(place, 0, count - 1).astype(jnp.int32), count, dtype=losses.dtype)
        return {"bucket_sum": losses @ member, "bucket_count": member.sum(0)}

    return summary


@dataclasses.dataclass(frozen=True)
class Step:
    """What `make_step` returns: call it, or `lower` it to read compile time, memory and cost."""

    jitted: Any
    key: Key
    steps_per_call: int
    accumulate: int
    mesh: Mesh | None

    def __call__(
        self, state: TrainState, batches: PyTree, data: PyTree = None, frozen: PyTree = None
    ) -> tuple[TrainState, Metrics]:
        """`steps_per_call` steps. Donates `state`: use only the returned one. Metrics are stacked, (k, ...)."""
        parts = self._parts(batches)
        results = []
        for part in parts:
            state, metrics = self.jitted(state, self.key, self._place(part), data, frozen)
            results.append(metrics)
        return state, results[0] if len(parts) == 1 else jax.tree.map(lambda *m: jnp.concatenate(m), *results)

    def lower(
        self, state: TrainState, batches: PyTree, data: PyTree = None, frozen: PyTree = None
    ) -> jax.stages.Lowered:
        """The program of one dispatch, not run: `.compile()` gives cost_analysis() and memory_analysis()."""
        return self.jitted.lower(state, self.key, self._place(self._parts(batches)[0]), data, frozen)

    def _parts(self, batches: PyTree) -> list[PyTree]:
        """What goes into one dispatch: all the steps, but on a CPU, where a loop is slow (see `_loop`), one."""
        for leaf in jax.tree.leaves(batches):
            self._check(np.shape(leaf))
        if self.steps_per_call == 1 or not _on_cpu(self.mesh):
            return [batches]
        return [jax.tree.map(lambda x: x[i : i + 1], batches) for i in range(self.steps_per_call)]  # noqa: B023

    def _place(self, batches: PyTree) -> PyTree:
        if self.mesh is None:
            return batches
        return mesh_lib.place(batches, mesh_lib.batch_sharding(self.mesh, leading=1))

    def _check(self, shape: tuple[int, ...]) -> None:
        if len(shape) < 2 or shape[0] != self.steps_per_call:
            raise ConfigError(
                f"batches must have the shape (steps_per_call, batch_size, ...) with steps_per_call="
                f"{self.steps_per_call}, got {shape}. For one step a call, pass batch[None]."
            )
        if shape[1] % self.accumulate:
            raise ConfigError(
                f"a batch of {shape[1]} cannot be cut into accumulate={self.accumulate} micro-batches. "
                f"Use a batch size that is a multiple of {self.accumulate}."
            )
        if self.mesh is not None:
            mesh_lib.check_batch_size(self.mesh, shape[1] // self.accumulate)


def make_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    key: Key,
    ema: Mapping[str, float | ema_lib.Decay] | None = None,
    accumulate: int = 1,
    steps_per_call: int = 1,
    get_batch: Callable[[PyTree, PyTree], PyTree] = take,
    summary: Summary = no_summary,
    mesh: Mesh | None = None,
) -> Step:
    """`step(state, batches, data=None, frozen=None) -> (state, metrics)`: the one jit of training; donates the state.

    Every leaf of `batches` is (steps_per_call, b, ...). One step trains on `get_batch(data, batches[i])`: without
    `data` that is `batches[i]`; with `data`, arrays resident on the device (never donated), the rows `batches[i]`.
    `frozen`, where given, goes to the loss as it is: parameters that do not train, so without moments or averages.
    `ema` maps names to decays: a float is `ema.warmed(float)`; use the same names in `create_state`. Micro-batch i
    of `accumulate` is examples i, i + a, ... Metrics, each (steps_per_call, ...): loss, grad_norm (before
    clipping), bad_steps, trouble (`guard.trouble`), and what `summary(losses, aux)` returns.
    Raises ConfigError for counts < 1, and at the call for batches of the wrong shape or indivisible.
    """
    for name, value in (("accumulate", accumulate), ("steps_per_call", steps_per_call)):
        if value < 1:
            raise ConfigError(f"{name} must be an integer >= 1, got {value}. 1 is off.")
    decays = ema_lib.decays(ema or {})

    def one(state: TrainState, batch: PyTree, root: Key, data: PyTree, fixed: tuple) -> tuple[TrainState, Metrics]:
        step_key, gradient = jax.random.fold_in(root, state.step), _gradient(loss_fn, accumulate, mesh, fixed)
        grads, losses, aux = gradient(state.params, step_key, lambda part: get_batch(data, part), batch)
        loss, norm = losses.mean(), optax.tree.norm(grads)
        # A norm that overflows is refused with the others: clipping by it would make the update zero or NaN.
        new = _advance(state, grads, jnp.isfinite(loss) & jnp.isfinite(norm), optimizer, decays)
        if mesh is not None:
            new = jax.lax.with_sharding_constraint(new, mesh_lib.state_sharding(mesh, new))
        trouble = guard.trouble(new.bad_at, state.step)
        own = {"loss": loss, "grad_norm": norm, "bad_steps": new.bad_steps, "trouble": trouble}
        metrics = own | summary(losses, aux)
        if mesh is not None:  # so that every host can read them
            metrics = jax.lax.with_sharding_constraint(metrics, mesh_lib.replicated(mesh))
        return new, metrics

    def run(state: TrainState, root: Key, batches: PyTree, data: PyTree, frozen: PyTree) -> tuple[TrainState, Metrics]:
        fixed = () if frozen is None else (frozen,)
        return _loop(lambda s, batch: one(s, batch, root, data, fixed), state, batches, mesh)

    return Step(jax.jit(run, donate_argnums=0), key, steps_per_call, accumulate, mesh)


def _gradient(
    loss_fn: LossFn, accumulate: int, mesh: Mesh | None, fixed: tuple
) -> Callable[..., tuple[PyTree, Array, dict]]:
    """`gradient(params, key, fetch, batch) -> (grads, losses, aux)`, averaged over the micro-batches."""

    def mean_loss(params: PyTree, key: Key, batch: PyTree) -> tuple[Array, tuple[Array, dict[str, Array]]]:
        losses, aux = loss_fn(params, key, batch, *fixed)
        return losses.mean(), (losses, aux)

    def of_part(params: PyTree, key: Key, fetch: Callable, part: PyTree) -> tuple[PyTree, Array, dict]:
        batch = fetch(part)
        if mesh is not None:
            batch = jax.lax.with_sharding_constraint(batch, mesh_lib.batch_sharding(mesh))
        grads, (losses, aux) = jax.grad(mean_loss, has_aux=True)(params, key, batch)
        return grads, losses, aux

    def of_parts(params: PyTree, key: Key, fetch: Callable, batch: PyTree) -> tuple[PyTree, Array, dict]:
        def body(total: PyTree, numbered: tuple[Array, PyTree]) -> tuple[PyTree, tuple[Array, dict]]:
            index, part = numbered
            grads, losses, aux = of_part(params, jax.random.fold_in(key, index), fetch, part)
            return jax.tree.map(jnp.add, total, grads), (losses, aux)

        parts = jax.tree.map(lambda x: _split(x, accumulate), batch)
        zeros = jax.tree.map(jnp.zeros_like, params)
        total, per_example = _loop(body, zeros, (jnp.arange(accumulate), parts), mesh)
        losses, aux = jax.tree.map(_join, per_example)
        return jax.tree.map(lambda g: g / accumulate, total), losses, aux

    return of_part if accumulate == 1 else of_parts


def _loop(body: Callable, carry: PyTree, xs: PyTree, mesh: Mesh | None) -> tuple[PyTree, PyTree]:
    """`lax.scan`, written out where XLA runs no fast backward convolution inside a loop: on CPUs, 100 times slower."""
    length = jax.tree.leaves(xs)[0].shape[0]
    if length > 1 and not _on_cpu(mesh):
        return jax.lax.scan(body, carry, xs)
    results = []
    for i in range(length):
        carry, result = body(carry, jax.tree.map(lambda x: x[i], xs))  # noqa: B023
        results.append(result)
    return carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *results)


def _on_cpu(mesh: Mesh | None) -> bool:
    return (jax.default_backend() if mesh is None else mesh.devices.flat[0].platform) == "cpu"


def _split(x: Array, parts: int) -> Array:
    """(b, ...) -> (parts, b / parts, ...), strided, so that each device cuts its own share without sending any."""
    return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)


def _join(x: Array) -> Array:
    """The inverse of `_split`: per-example values back in the order of the batch."""
    return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])


def _advance(
    state: TrainState,
    grads: PyTree,
    finite: Array,
    optimizer: optax.GradientTransformation,
    decays: Mapping[str, ema_lib.Decay],
) -> TrainState:
    """The update, kept only where `finite`; the optimiser's own count, too, counts good steps only."""
    if set(decays) != set(state.ema_params):
        raise ConfigError(
            f"the state has the averages {sorted(state.ema_params)} and make_step was given {sorted(decays)}. "
            "Pass the same `ema` to create_state and to make_step."
        )
    with jax.numpy_dtype_promotion("standard"):  # Optax raises a python float to an integer count
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
    made = (state.step - state.bad_steps).astype(jnp.float32)
    averages = {name: ema_lib.update(state.ema_params[name], params, d(made)) for name, d in decays.items()}

    def keep(new: PyTree, old: PyTree) -> PyTree:
        return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

    return TrainState(
        step=state.step + jnp.int32(1),
        params=keep(params, state.params),
        ema_params=keep(averages, state.ema_params),
        opt_state=keep(opt_state, state.opt_state),
        bad_steps=state.bad_steps + (~finite).astype(jnp.int32),
        bad_at=guard.remember(state.bad_at, state.step, finite),
        skipped=state.skipped,
    )
