"""One mesh, two axes, and the rules that place a state and its batches on it.

    'data'   copies of the model, each on its share of the batch
    'fsdp'   shares of the model; the batch is divided over this axis too

A parameter of at least MIN_SHARDED elements is cut along its largest dimension that the fsdp axis divides; everything
else is on every device. XLA inserts the collectives, so the same code runs on one CPU, 8 devices and many hosts.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxdiff.errors import ConfigError
from jaxdiff.types import PyTree

MIN_SHARDED = 2**12
T = TypeVar("T")


def make(data: int = -1, fsdp: int = 1, *, devices: Sequence[Any] | None = None) -> Mesh:
    """A ('data', 'fsdp') mesh over `devices` (default: all); -1 for one of the two means the rest.

    Raises ConfigError when the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = [data, fsdp]
    if sizes.count(-1) == 1:
        known = max(sizes)
        sizes[sizes.index(-1)] = len(devices) // known if known > 0 else 0
    if min(sizes) < 1 or sizes[0] * sizes[1] != len(devices):
        raise ConfigError(
            f"mesh data={data}, fsdp={fsdp} does not fit {len(devices)} device(s): the product must be "
            f"{len(devices)}, and one of the two may be -1 for the rest. Try data=-1, fsdp=1."
        )
    # Explicit axes, the default of make_mesh, reject Linen convolutions and norms.
    return jax.make_mesh(tuple(sizes), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2, devices=devices)


def batch_sharding(mesh: Mesh, *, leading: int = 0) -> NamedSharding:
    """The batch axis over both mesh axes, after `leading` axes that are not divided (the steps of one call)."""
    return NamedSharding(mesh, P(*([None] * leading), ("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    """On every device whole: for the data set that lives on the devices."""
    return NamedSharding(mesh, P())


def _leaf_spec(shape: tuple[int, ...], fsdp: int) -> P:
    if fsdp == 1 or np.prod(shape, dtype=np.int64) < MIN_SHARDED:
        return P()
    divisible = [axis for axis, n in enumerate(shape) if n % fsdp == 0]
    if not divisible:
        return P()
    axis = max(divisible, key=lambda a: shape[a])
    return P(*([None] * axis), "fsdp")


def state_sharding(mesh: Mesh, state: PyTree) -> PyTree:
    """The NamedSharding of every leaf, by its shape alone: parameter, EMA and moment of one shape lie alike."""
    fsdp = mesh.shape["fsdp"]
    return jax.tree.map(lambda leaf: NamedSharding(mesh, _leaf_spec(leaf.shape, fsdp)), state)


def born_sharded(mesh: Mesh, init: Callable[[], T]) -> T:
    """Runs `init()` compiled so that each device makes only its own share; no device ever holds the whole state."""
    return jax.jit(init, out_shardings=state_sharding(mesh, jax.eval_shape(init)))()


def template(mesh: Mesh, init: Callable[[], T]) -> T:
    """Shapes, dtypes and shardings of `init()` without making it: what `Checkpoints.restore` restores onto."""
    shapes = jax.eval_shape(init)
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        shapes,
        state_sharding(mesh, shapes),
    )


def check_batch_size(mesh: Mesh, batch_size: int) -> None:
    """Raises ConfigError unless the mesh's devices divide the batch evenly."""
    if batch_size % mesh.size:
        raise ConfigError(
            f"a batch of {batch_size} cannot be divided over {mesh.size} devices (data={mesh.shape['data']}, "
            f"fsdp={mesh.shape['fsdp']}). Use a multiple of {mesh.size}: {-(-batch_size // mesh.size) * mesh.size}."
        )
