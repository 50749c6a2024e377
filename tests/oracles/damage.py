"""What can go wrong in the folder of a saved step, and whether it is seen."""

import dataclasses
import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxdiff.errors import CheckpointError
from jaxdiff.train import Checkpoints


@dataclasses.dataclass(frozen=True)
class Damage:
    """One thing that goes wrong in the folder of a step; `name` says what and where."""

    name: str
    apply: Callable[[Path], None]


def files(folder: Path) -> list[Path]:
    """Every file of a folder, in order."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _rewrite(path: Path, change: Callable[[bytearray], bytes | bytearray]) -> None:
    path.write_bytes(change(bytearray(path.read_bytes())))


def flip(path: Path, position: int, bit: int) -> None:
    """Invert one bit."""

    def change(data: bytearray) -> bytearray:
        data[position] ^= 1 << bit
        return data

    _rewrite(path, change)


def zero(path: Path, start: int, length: int = 512) -> None:
    """A sector that reads as zeros; a file of zeros there is changed in its first byte, so that something is."""

    def change(data: bytearray) -> bytearray:
        lost = len(data[start : start + length])
        if not any(data[start : start + length]):
            data[start] = 1
        else:
            data[start : start + length] = bytes(lost)
        return data

    _rewrite(path, change)


def swap(one: Path, other: Path) -> None:
    """Exchange the contents of two files, or of two folders."""
    spare = one.with_name(one.name + ".spare")
    one.rename(spare)
    other.rename(one)
    spare.rename(other)


def damages(folder: Path, rng: np.random.Generator, flips: int = 4) -> Iterator[Damage]:
    """Every kind of damage to every file of `folder`: the paths are relative, so each can be applied to a copy."""
    sizes = {path.relative_to(folder): path.stat().st_size for path in files(folder)}
    for name, size in sizes.items():
        if size:
            yield from _changes(name, size, rng, flips)
        yield Damage(f"a byte after {name}", lambda f, n=name: _rewrite(f / n, lambda data: data + b"\n"))
        yield Damage(f"{name} deleted", lambda f, n=name: (f / n).unlink())
        yield Damage(f"a file beside {name}", lambda f, n=name: (f / n).with_name("extra").write_bytes(b""))
    names = list(sizes)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            if (folder / one).read_bytes() != (folder / other).read_bytes():
                yield Damage(f"{one} and {other} swapped", lambda f, a=one, b=other: swap(f / a, f / b))
    for key, value in {"step": 7, "finite": False, "config": "0" * 64, "format": 2, "files": {}}.items():
        yield Damage(f"{key} edited in the seal", lambda f, k=key, v=value: _edit_seal(f / "seal.json", k, v))
    yield Damage("the state deleted", lambda f: shutil.rmtree(f / "state"))
    yield Damage("everything deleted but the seal", lambda f: [p.unlink() for p in files(f) if p.name != "seal.json"])


def _edit_seal(path: Path, key: str, value: object) -> None:
    """As by hand: in the same layout, and without a new digest."""
    text = json.loads(path.read_text())
    text["body"][key] = value
    path.write_text(json.dumps(text, sort_keys=True, indent=1))


def _changes(name: Path, size: int, rng: np.random.Generator, flips: int) -> Iterator[Damage]:
    for place in {0, size // 2, size - 1, *rng.integers(size, size=flips).tolist()}:
        bit = int(rng.integers(8))
        yield Damage(f"bit {bit} of byte {place} of {name}", lambda f, p=place, b=bit: flip(f / name, p, b))
    for left in {0, size // 2, size - 1}:
        yield Damage(f"{name} cut to {left} bytes", lambda f, k=left: _rewrite(f / name, lambda data: data[:k]))
    yield Damage(f"zeros in {name}", lambda f: zero(f / name, 0))


def damaged(root: Path, trials: int, rng: np.random.Generator) -> tuple[int, int]:
    """Damage the newer of two steps: how often that was seen and the older one used, and how often it was done."""
    values = np.random.default_rng(1).normal(size=(2, 2000)).astype(np.float32)
    with Checkpoints(root / "good") as checkpoints:
        for n in range(2):
            checkpoints.save({"w": values[n]}, n)
    kinds = list(damages(root / "good" / "1", rng, flips=4 + trials // 6))
    chosen = [kinds[i] for i in rng.permutation(len(kinds))[:trials]]
    seen = 0
    for kind in chosen:
        copy = shutil.copytree(root / "good", root / "copy")
        kind.apply(copy / "1")
        found = np.array_equal(_fallen_back(copy), values[0])
        if not found:
            print(f"not seen: {kind.name}")
        seen += found
        shutil.rmtree(copy)
    shutil.rmtree(root / "good")
    return seen, len(chosen)


def _fallen_back(directory: Path) -> Any:
    """What is restored in the place of step 1, where that is said."""
    template = {"w": jax.ShapeDtypeStruct((2000,), np.float32)}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            tree, _ = Checkpoints(directory).restore(template)
        except CheckpointError:
            return None
    return tree["w"] if any("Falling back to step 0" in str(w.message) for w in said) else None
