"""Files of weights that other people wrote, and ours for them: safetensors and JSON, nothing else.

    folder/config.json                                          the architecture
    folder/model.safetensors                                    or diffusion_pytorch_model.safetensors, or one other
    folder/model.fp16.safetensors                               the variant fp16
    folder/model.safetensors.index.json                         {"weight_map": {name: shard}}; the shards beside it

A pickle can run code when it is read, so one is refused, by name and by content. A header is checked against the size
of its file before anything is allocated (by `safetensors`, whose rule that tensors lie without gaps also gives their
places). A tensor is read only when it is asked for, by plain reads: a file cut short meanwhile is an error, no crash.
"""

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxdiff.atomic import replacing
from jaxdiff.errors import CheckpointError, UnsafeFileError

STEMS = ("model", "diffusion_pytorch_model")
PICKLES = (".bin", ".ckpt", ".joblib", ".npy", ".npz", ".pickle", ".pkl", ".pt", ".pth", ".h5", ".msgpack")
MAX_JSON = 2**22
"""No config or index of a published model comes near this many bytes; more is refused before it is read."""
MAX_VALUES = 4000
"""How many values a JSON file may hold beside one for each 48 bytes: '[[],[],...' would take 20 times its size."""

_MAGIC = (b"PK\x03\x04", b"\x89HDF", b"\x93NUMPY", *(b"\x80" + bytes([protocol]) for protocol in range(2, 6)))
_DTYPES: dict[str, Any] = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2, "BOOL": np.bool_,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
    "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8,
}  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor that is still on the disk; `np.asarray(tensor)` reads it."""

    path: Path
    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        count = math.prod(self.shape)
        try:
            array = np.fromfile(self.path, self.dtype, count, offset=self.offset)
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {error}. Was it moved after it was opened?") from error
        if array.size != count:
            raise CheckpointError(f"{self.path} ends within the tensor {self.name}: it was cut after it was opened.")
        return array.reshape(self.shape).astype(dtype or self.dtype, copy=False)


def read(path: str | os.PathLike, *, variant: str | None = None) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, of an index and its shards, or of a folder, by name, not yet read.

    `variant="fp16"` takes a folder's files of that variant. Raises UnsafeFileError for a pickle and for an index that
    leads out of its folder, CheckpointError for what is missing, damaged or ambiguous.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        path = _choose(path, variant)
    if path.name.endswith(".json"):
        return _read_shards(path)
    return _read_one(path)


def config(path: str | os.PathLike, name: str = "config.json") -> dict[str, Any]:
    """The JSON object in `path`/`name`. Raises CheckpointError where it is missing, damaged or over MAX_JSON bytes."""
    path = Path(path).expanduser() / name
    _check_kind(path, ".json")
    if path.stat().st_size > MAX_JSON:
        raise CheckpointError(f"{path} has {path.stat().st_size:,} bytes; no {name} has more than {MAX_JSON:,}.")
    try:
        text = path.read_bytes()
        if sum(map(text.count, (b",", b"[", b"{"))) > MAX_VALUES + len(text) // 48:
            raise ValueError("it holds more values than any config does")
        value = json.loads(text.decode())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {error}. Get it again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(value).__name__}.")
    return value


def write(
    folder: str | os.PathLike, tensors: Mapping[str, np.ndarray], config: Mapping[str, Any], *, stem: str = STEMS[0]
) -> None:
    """Write `stem`.safetensors and config.json into `folder`, each whole or not at all, as their libraries read them.

    `stem` is "model" for transformers and "diffusion_pytorch_model" for diffusers.
    """
    from safetensors import numpy

    folder = Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {name: np.ascontiguousarray(tensors[name]).reshape(np.shape(tensors[name])) for name in sorted(tensors)}
    with replacing(folder / "config.json") as settings, replacing(folder / f"{stem}.safetensors") as weights:
        settings.write_text(json.dumps(dict(config), indent=2, sort_keys=True) + "\n", encoding="utf-8")
        numpy.save_file(arrays, weights, metadata={"format": "pt"})  # transformers refuses a file that does not say so


def download(repo: str, *, variant: str | None = None, revision: str | None = None) -> Path:
    """The local folder of a model of the Hugging Face Hub, fetched through `huggingface_hub` where it is not there.

    Only weights in safetensors, JSON and vocabularies are fetched: of the folders of a pipeline or of one model, in
    `variant` (e.g. "fp16") or in full precision. Raises CheckpointError where the Hub does not give them.
    """
    import huggingface_hub

    dot = f".{variant}" if variant else ""
    weights = [f"{place}{dot}{part}.safetensors" for place in ("*/*", *STEMS) for part in ("", "-?????-of-?????")]
    try:
        path = huggingface_hub.snapshot_download(
            repo,
            revision=revision,
            allow_patterns=[*weights, "*.json", "*/merges.txt", "merges.txt", "*/vocab.txt", "vocab.txt"],
            ignore_patterns=None if variant else ["*.fp16*.safetensors", "*.bf16*.safetensors", "*non_ema*"],
        )
    except (OSError, ValueError) as error:  # its own errors are among these
        raise CheckpointError(f"the Hub did not give {repo}: {error}. Name a local folder, or log in.") from error
    return Path(path)


def _choose(folder: Path, variant: str | None) -> Path:
    """The weights in a folder: of the usual names the first that is there, else the only one of its kind."""
    dot = f".{variant}" if variant else ""
    for stem in STEMS:
        for name in (f"{stem}{dot}.safetensors", f"{stem}.safetensors.index{dot}.json"):
            if (folder / name).is_file():
                return folder / name
    names = sorted(p.name for p in folder.iterdir() if p.suffix == ".safetensors" or p.name.endswith("index.json"))
    fitting = [name for name in names if name.endswith(f"{dot}.safetensors")]
    if len(fitting) == 1 and (variant or "." not in Path(fitting[0]).stem):
        return folder / fitting[0]
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
    if not names and pickles:
        _refuse(folder / pickles[0])
    wanted = f"{STEMS[0]}{dot}.safetensors"
    found = f"It holds {', '.join(names[:4])}: name the file, or its variant." if names else "Name another folder."
    raise CheckpointError(f"there is no {wanted} in {folder}. {found}")


def _read_shards(path: Path) -> dict[str, Tensor]:
    shards = config(path.parent, path.name).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise CheckpointError(f"{path} is damaged: weight_map must be an object of file names.")
    for name in sorted(set(shards.values())):
        if name != Path(name).name or not name.endswith(".safetensors"):
            raise UnsafeFileError(f"{path} leads to {name!r}. Only .safetensors files beside it are read.")
    parts = {name: _read_one(path.parent / name) for name in sorted(set(shards.values()))}
    lost = sorted(name for name, shard in shards.items() if name not in parts[shard])
    if lost:
        raise CheckpointError(f"{path} says that {shards[lost[0]]} holds {lost[0]}, and it does not. Get both again.")
    return {name: parts[shard][name] for name, shard in shards.items()}


def _read_one(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    _check_kind(path, ".safetensors")
    tensors = {}
    try:
        with path.open("rb") as file:
            position = 8 + int.from_bytes(file.read(8), "little")
        with safe_open(path, framework="np") as header:
            for name in header.offset_keys():
                part = header.get_slice(name)
                dtype, shape = np.dtype(_DTYPES[part.get_dtype()]), tuple(part.get_shape())
                tensors[name] = Tensor(path, name, dtype, shape, position)
                position += math.prod(shape) * dtype.itemsize
    except KeyError as error:
        raise CheckpointError(f"{path}: {name} has the type {error}; known are {', '.join(_DTYPES)}.") from error
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is not a safetensors file or is damaged: {error}. Get it again.") from error
    return tensors


def _check_kind(path: Path, suffix: str) -> None:
    """A regular file of the right name that does not begin as a pickle does."""
    if path.suffix in PICKLES:
        _refuse(path)
    if not os.path.isfile(path):  # Path.is_file raises for a name that is too long
        raise CheckpointError(f"there is no file {path}.")
    if path.suffix != suffix:
        raise CheckpointError(f"{path} must be a {suffix} file; only .safetensors and .json are read.")
    try:
        with path.open("rb") as file:
            head = file.read(9)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from error
    if head.startswith(_MAGIC) and head[8:] != b"{":  # the low bytes of a header's length may look like anything
        _refuse(path)


def _refuse(path: Path) -> None:
    raise UnsafeFileError(f"refusing {path}: pickle files can run code. Convert it to .safetensors first.")
