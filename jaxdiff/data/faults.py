"""Records that cannot be used: skipped, replaced, counted and listed; too many of them stop the run.

A record is bad where reading it raises DataError (unreadable, cut short, too large, no picture of a kind that is read)
or where it holds NaN or infinite values. In the batch of `step` the first good one of these takes its place:

    record + 1 + (a + k b) mod (n - 1)   (mod n),   k = 0, 1, ...,   b coprime to n - 1

with a and b drawn by Philox from (seed, step, record). So the replacement is a function of (seed, step, record) alone:
the same after a resume, in memory or streamed, and for any number of workers.
"""

import json
import math
import os
import warnings
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from jaxdiff.atomic import replacing
from jaxdiff.errors import DataError

LEAST, SHARE, TRIES = 5, 1e-3, 64  # more than this share of the records, and at least so many of them, stop a run


class Examples(Protocol):
    """What is read: a length, and one array an index (`ImageFolder` is one); DataError for a record that is bad."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> np.ndarray: ...


def replacements(seed: int, step: int, record: int, num_examples: int) -> Iterator[int]:
    """The records that may take the place of `record` in the batch of `step`, in their order: at most 64, never it."""
    others = num_examples - 1
    start, *strides = map(int, np.random.Philox(np.random.SeedSequence((seed, step, record))).random_raw(TRIES))
    stride = next((word for word in strides if math.gcd(word, others) == 1), 1)
    for k in range(min(others, TRIES)):
        yield (record + 1 + (start + k * stride) % others) % num_examples


def replace(seed: int, step: int, indices: np.ndarray, bad: Container[int], num_examples: int) -> np.ndarray:
    """`indices`, the batch of `step`, with every record of `bad` replaced. Raises DataError where none is left."""

    def good(record: int) -> int:
        if record not in bad:
            return record
        for candidate in replacements(seed, step, record, num_examples):
            if candidate not in bad:
                return candidate
        raise DataError(f"record {record} cannot be used, nor any that might take its place. Repair the data set.")

    return np.asarray([good(int(record)) for record in indices], np.int32)


def read(source: Examples, seed: int, step: int, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
    """The batch of `step`: the indices with bad records replaced, the examples, and what is wrong with each bad one."""
    chosen, examples, bad = [], [], {}
    for record in map(int, indices):
        for candidate in (record, *replacements(seed, step, record, len(source))):
            fault = bad.get(candidate) or _try(source, candidate, examples)
            if fault is None:
                chosen.append(candidate)
                break
            bad[candidate] = fault
        else:
            raise DataError(f"{bad[record]} Nor can {len(bad) - 1} others that might take its place.")
    if len({example.shape for example in examples}) > 1:
        raise DataError(f"the records differ in shape: {sorted({e.shape for e in examples})}. Make them all alike.")
    return np.asarray(chosen, np.int32), np.stack(examples), bad


def _try(source: Examples, record: int, examples: list[np.ndarray]) -> str | None:
    """Append the record, or say what is wrong with it."""
    try:
        example = source[record]
        check_finite(example, f"record {record}")
    except DataError as error:
        return str(error)
    examples.append(example)
    return None


def check_finite(example: np.ndarray, name: str) -> None:
    """Raise DataError where a float example holds NaN or infinite values."""
    if example.dtype.kind == "f" and not np.isfinite(example).all():
        raise DataError(f"{name} holds NaN or infinite values. Repair or remove it.")


class Faults:
    """The bad records of one data set, each listed once: `found[record]` says what is wrong with it.

    `known` are those found before; where `path` is given, new ones are added to that file, one JSON object a line.
    Raises DataError, at birth and in `add`, when they are more than 0.1 % of the `num_examples` records and at least 5,
    or all of them.
    """

    def __init__(
        self, num_examples: int, path: str | os.PathLike | None = None, known: Mapping[int, str] | None = None
    ):
        self.num_examples, self.path = num_examples, None if path is None else Path(path)
        self.found = dict(known or {})
        self._check()

    def write(self) -> None:
        """Make the file anew, of those known so far: a run that begins does, and then adds to it."""
        if self.path is not None and (self.found or self.path.exists()):
            with replacing(self.path) as temporary:
                temporary.write_text("".join(map(_line, self.found.items())), encoding="utf-8")

    def add(self, bad: Mapping[int, str]) -> None:
        """List those records of `bad` that are new. Warns when their number reaches 1, 2, 4, ..."""
        new = {record: fault for record, fault in bad.items() if record not in self.found}
        if new and self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write("".join(map(_line, new.items())))
        before = len(self.found)
        self.found |= new
        if len(self.found).bit_length() > before.bit_length():
            fault = next(iter(new.values()))
            many = f"{len(self.found)} of {self.num_examples:,} records skipped, others take their place"
            warnings.warn(f"{many}: {fault}{self._listed()}", stacklevel=2)
        self._check()

    def _check(self) -> None:
        count, total = len(self.found), self.num_examples
        if 0 < count == total or (count >= LEAST and count > SHARE * total):
            shown = "".join(f"\n  {record}: {fault}" for record, fault in list(self.found.items())[:LEAST])
            raise DataError(
                f"{count} of {total:,} records cannot be used; at most {SHARE:.1%}, or {LEAST - 1}, are skipped."
                f"{self._listed()} Repair or remove them, and start again. The first:{shown}"
            )

    def _listed(self) -> str:
        return f" They are listed in {self.path}." if self.path else ""


def still_bad(source: Examples, path: str | os.PathLike) -> dict[int, str]:
    """The records that an earlier run listed in `path` and that are bad today; no file, none."""
    bad = {}
    for record in _listed(Path(path), len(source)):
        fault = _try(source, record, [])
        if fault is not None:
            bad[record] = fault
    return bad


def _listed(path: Path, num_examples: int) -> list[int]:
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            record = json.loads(line)["record"]
        except (ValueError, KeyError, TypeError, RecursionError):
            continue  # the line that was being written when a run was killed; what it says is found again
        if type(record) is int and 0 <= record < num_examples:
            records.append(record)
    return records


def _line(item: tuple[int, str]) -> str:
    return json.dumps({"record": item[0], "fault": item[1]}) + "\n"
