"""One mesh, three axes, and the rules that place a state and its batches on it.

    'data'    copies of the model, each on its share of the batch
    'fsdp'    shares of the parameters; the batch is divided over this axis too
    'tensor'  shares of the channels: the members of this axis work on the same examples

A leaf of fewer than MIN_SHARDED elements is on every device. A larger one is cut over 'tensor' where its name is in
TENSOR, and over 'fsdp' along the largest of its other dimensions that this axis divides. The pairs of TENSOR are those
of Megatron (Shoeybi et al. 2019, section 3): heads or hidden channels are made by a matrix cut along its outputs, and
taken up by one cut along its inputs. XLA inserts the collectives, so the same code runs on one CPU, 8 devices and many
hosts.
"""

import itertools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxdiff.errors import ConfigError
from jaxdiff.types import PyTree

AXES = ("data", "fsdp", "tensor")
MIN_SHARDED = 2**12
# The end of a leaf's path -> the axis that is cut over 'tensor'; moments and averages end as their parameter does.
TENSOR = (
    (re.compile(r"(?:^|/)(qkv|query|key_value|mlp_in|up|conv_in|embedding|in_\d+|embedding_\d+)/kernel$"), -1),
    (re.compile(r"(?:^|/)((attention|cross|block_\d+)/out|mlp_out|down|conv_out|out_\d+)/kernel$"), -2),
)
T = TypeVar("T")


def make(data: int = -1, fsdp: int = 1, tensor: int = 1, *, devices: Sequence[Any] | None = None) -> Mesh:
    """A ('data', 'fsdp', 'tensor') mesh over `devices` (default: all, of all hosts); -1 for one of them is the rest.

    Neighbouring devices go to 'tensor' first, then 'fsdp': what speaks most is closest.
    Raises ConfigError when the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = [data, fsdp, tensor]
    if sizes.count(-1) == 1:
        known = math.prod(size for size in sizes if size != -1)
        sizes[sizes.index(-1)] = len(devices) // known if known > 0 else 0
    if min(sizes) < 1 or math.prod(sizes) != len(devices):
        raise ConfigError(
            f"mesh data={data}, fsdp={fsdp}, tensor={tensor} does not fit {len(devices)} device(s): the product must "
            f"be {len(devices)}, and one of the three may be -1 for the rest. Try data=-1, fsdp=1, tensor=1."
        )
    # Explicit axes, the default of make_mesh, reject Linen convolutions and norms.
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def batch_sharding(mesh: Mesh, *, leading: int = 0) -> NamedSharding:
    """The batch axis over 'data' and 'fsdp', after `leading` axes that are not divided (the steps of one call)."""
    return NamedSharding(mesh, P(*([None] * leading), ("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    """On every device whole: for the data set that lives on the devices."""
    return NamedSharding(mesh, P())


def place(tree: PyTree, sharding: NamedSharding) -> PyTree:
    """Arrays that every process holds whole, laid on the devices; each process sends its own devices their shares."""
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)

    def one(leaf: Any) -> jax.Array:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return jax.device_put(leaf, sharding)
        # device_put would first send the whole array to the other processes, to see that theirs is the same.
        return jax.make_array_from_callback(np.shape(leaf), sharding, lambda index: leaf[index])

    return jax.tree.map(one, tree)


def own_rows(mesh: Mesh, batch_size: int) -> slice:
    """The rows of a batch that the devices of this process work on: all that it has to read.

    Raises ConfigError where they are not in one piece.
    """
    shares = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    rows = sorted({piece[0].indices(batch_size)[:2] for piece in shares if piece is not None})
    if any(end != start for (_, end), (start, _) in itertools.pairwise(rows)):
        raise ConfigError(
            f"process {jax.process_index()} has the rows {rows} of a batch, which are not in one piece. Choose "
            "mesh.tensor so that it divides the devices of a process, or is a multiple of them."
        )
    return slice(rows[0][0], rows[-1][1])


def assemble(mesh: Mesh, batches: PyTree, batch_size: int) -> PyTree:
    """Whole batches (k, batch_size, ...) on the devices, from arrays of which each process holds its `own_rows`."""

    def one(leaf: Any) -> jax.Array:
        whole = (leaf.shape[0], batch_size, *leaf.shape[2:])
        return jax.make_array_from_process_local_data(batch_sharding(mesh, leading=1), leaf, whole)

    return jax.tree.map(one, batches)


def _leaf_spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> P:
    if math.prod(shape) < MIN_SHARDED:
        return P()
    axes: list[str | None] = [None] * len(shape)
    for pattern, axis in TENSOR:
        if mesh.shape["tensor"] > 1 and len(shape) > 1 and pattern.search(path):
            axes[axis] = "tensor" if shape[axis] % mesh.shape["tensor"] == 0 else None
    free = [axis for axis, n in enumerate(shape) if axes[axis] is None and n % mesh.shape["fsdp"] == 0]
    if mesh.shape["fsdp"] > 1 and free:
        axes[max(free, key=lambda axis: shape[axis])] = "fsdp"
    while axes and axes[-1] is None:
        axes.pop()
    return P(*axes)


def state_sharding(mesh: Mesh, state: PyTree) -> PyTree:
    """The NamedSharding of every leaf, by its path and shape: a parameter, its EMA and its moments lie alike."""

    def place_of(path: Any, leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, _leaf_spec(name, leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(place_of, state)


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
    """Raises ConfigError unless the batch divides evenly over data x fsdp."""
    shares = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % shares:
        raise ConfigError(
            f"a batch of {batch_size} cannot be divided over {shares} devices (data={mesh.shape['data']}, "
            f"fsdp={mesh.shape['fsdp']}). Use a multiple of {shares}: {-(-batch_size // shares) * shares}."
        )
