"""What pictures are compared by: small features of the pixels, always at hand, and the Inception of the FID if given.

    pixels     a picture averaged down to 8 x 8, in [-1, 1]; points and other examples as they are
    inception  the 2048 features of `jaxdiff.metrics.inception`; only with these is a Frechet distance called FID

Whatever takes long (features, samples) is made in parts, each a safetensors file, so that a killed run goes on.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from jaxdiff import data, train
from jaxdiff.atomic import replacing
from jaxdiff.errors import ConfigError
from jaxdiff.metrics import checks
from jaxdiff.types import Array

SIDE = 8
"""Height and width of the small pictures."""


@dataclasses.dataclass(frozen=True)
class Features:
    """`run(batch) -> (b, d)`, how its Frechet distance is called, and the contract of its statistics."""

    name: str
    title: str
    contract: dict[str, str]
    run: Callable[[Array], Array]


def pixels(shape: tuple[int, ...]) -> Features:
    """The small pictures of examples of `shape`; examples that are no pictures are flattened."""
    small = (min(SIDE, shape[0]), min(SIDE, shape[1]), shape[2]) if len(shape) == 3 else shape

    def run(x: Array) -> Array:
        x = data.decode(x)
        x = jax.image.resize(x, (x.shape[0], *small), "linear") if small != shape else x
        return x.reshape(x.shape[0], -1)

    name = f"pixels {small[0]} x {small[1]}" if len(shape) == 3 else "values"
    contract = {"features": name, "input": str(shape), "resize": "linear, antialiased", "range": "[-1, 1]"}
    return Features(name, f"FD ({name})", contract, run)


def inception(path: str, shape: tuple[int, ...]) -> Features:
    """The features of the FID, with the weights of a safetensors file; grey pictures become grey RGB.

    Raises DataError for a wrong file, ConfigError when the examples are not pictures of 1 or 3 channels.
    """
    from jaxdiff.metrics import inception as network

    if len(shape) != 3 or shape[2] not in (1, 3):
        raise ConfigError(f"--inception is for pictures of 1 or 3 channels, and the examples are of shape {shape}.")
    params = network.load(path)
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()

    def run(x: Array) -> Array:
        return network.features(params, jnp.broadcast_to(x, (*x.shape[:3], 3)))

    return Features("inception", "FID", network.CONTRACT | {"weights_sha256": digest}, run)


def in_parts(folder: Path, count: int, size: int, make: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Rows 0 .. count - 1, `make(indices)` for `size` of them at a time, each part kept in `folder`.

    The last part is filled up with copies of the last row, so that one compiled program makes all. A part that is
    there is read instead; one that is damaged, or of another length, is made again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    for start in range(0, count, size):
        rows, path = np.arange(start, start + size), folder / f"{start:08d}.safetensors"
        length = min(size, count - start)
        part = _read(path)
        if part is None or len(part) < length:
            part = np.asarray(make(np.minimum(rows, count - 1)))[:length]
            with replacing(path) as temporary:
                save_file({"x": np.ascontiguousarray(part)}, temporary)
        parts.append(part[:length])
    return np.concatenate(parts)


def _read(path: Path) -> np.ndarray | None:
    try:
        return load_file(path)["x"]
    except (OSError, SafetensorError, KeyError):
        return None


def digest(value: Any) -> str:
    """Twelve hexadecimal digits of JSON values or of an array: the name of a folder of what they led to."""
    if not isinstance(value, np.ndarray):
        return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]
    head = f"{value.dtype} {value.shape}".encode()
    return hashlib.sha256(head + np.ascontiguousarray(value).tobytes()).hexdigest()[:12]


class Extractor:
    """Features of sets of examples, in batches over all devices, kept below `folder` by the content of the set."""

    def __init__(self, folder: Path, chosen: Features, mesh: Any, batch: int):
        self.folder, self.chosen, self.mesh, self.batch = folder, chosen, mesh, batch
        self.apply = jax.jit(chosen.run)

    def __call__(self, name: str, x: np.ndarray, count: int | None = None) -> np.ndarray:
        """float32 (n, d) of uint8 pictures or float32 rows, the first `count` of them (more, later, add to these).

        Raises as `metrics.checks` for constant or bad ones.
        """
        if x.dtype == np.uint8:
            checks.check_images(name, x)
        place = train.mesh.batch_sharding(self.mesh)
        where = self.folder / f"{digest(x)}-{digest(self.chosen.contract)}"
        rows = len(x) if count is None else min(count, len(x))
        return in_parts(
            where, rows, self.batch, lambda rows: np.asarray(self.apply(jax.device_put(x[rows], place)), np.float32)
        )
