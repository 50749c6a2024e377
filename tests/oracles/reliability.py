"""What can happen to the files of a checkpoint, as functions; and, as a command, the long trials of the promises.

python -m tests.oracles.reliability --trials 100
"""

import dataclasses
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np


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
    yield Damage("the state deleted", lambda f: shutil.rmtree(f / "state"))
    yield Damage("everything deleted but the seal", lambda f: [p.unlink() for p in files(f) if p.name != "seal.json"])


def _changes(name: Path, size: int, rng: np.random.Generator, flips: int) -> Iterator[Damage]:
    for place in {0, size // 2, size - 1, *rng.integers(size, size=flips).tolist()}:
        bit = int(rng.integers(8))
        yield Damage(f"bit {bit} of byte {place} of {name}", lambda f, p=place, b=bit: flip(f / name, p, b))
    for left in {0, size // 2, size - 1}:
        yield Damage(f"{name} cut to {left} bytes", lambda f, k=left: _rewrite(f / name, lambda data: data[:k]))
    yield Damage(f"zeros in {name}", lambda f: zero(f / name, 0))
