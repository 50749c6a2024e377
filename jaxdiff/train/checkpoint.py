"""Checkpoints of a pytree by step number, through Orbax v1, which nothing else here touches.

    DIRECTORY/120/          one folder a step, renamed into place when complete, so a kill costs no earlier step
    DIRECTORY/120.damaged/  a step that could not be read, set aside by the first save after a fallback

Beside the arrays each folder holds a dictionary of the caller (`meta`) and the name, dtype and shape of every leaf,
by which a template of another model is refused before anything is read.
"""

import contextlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from jaxdiff.errors import CheckpointError, ConfigError
from jaxdiff.types import PyTree

T = TypeVar("T")
_SHOWN = 5


class _DamagedError(CheckpointError):
    """This step cannot be read; another one may."""


def _leaves(tree: PyTree) -> dict[str, str]:
    """Name -> 'float32[8, 4]' of every leaf."""
    flat = jax.tree_util.tree_leaves_with_path(tree)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in flat]
    return {name: f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}" for name, (_, leaf) in zip(names, flat, strict=True)}


def _difference(saved: dict[str, str], wanted: dict[str, str]) -> list[str]:
    """One line for each leaf that is not the same on both sides."""
    lines = [f"{k} is {saved[k]} there and {wanted[k]} here" for k in saved if k in wanted and saved[k] != wanted[k]]
    lines += [f"{k} {saved[k]} is only there" for k in saved if k not in wanted]
    return lines + [f"{k} {wanted[k]} is only here" for k in wanted if k not in saved]


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _json(meta: dict[str, Any]) -> dict[str, Any]:
    try:
        return json.loads(json.dumps(meta))
    except TypeError as error:
        raise CheckpointError(
            f"meta must be what JSON can hold: {error}. Convert it to numbers and strings."
        ) from error


def _ours(path: Path) -> bool:
    """Whether a folder is a finished step of ours, whole or damaged, and not another program's."""
    try:
        custom = json.loads((path / "_CHECKPOINT_METADATA").read_text())["custom_metadata"]
    except (OSError, ValueError, KeyError, TypeError):
        return (path / "state").is_dir()
    return isinstance(custom, dict) and "leaves" in custom


class Checkpoints:
    """The checkpoints in one directory. Nothing is written, not even the directory, before `prepare` or `save`.

    Keeps the `keep` newest steps. Saves run in the background: `wait` for them, or use it as a context manager.
    One process writes to a directory at a time; any number may read. Raises ConfigError for keep < 1.
    """

    def __init__(self, directory: str | os.PathLike[str], *, keep: int = 3):
        if keep < 1:
            raise ConfigError(f"keep must be an integer >= 1, got {keep}. To keep only the newest step, pass 1.")
        self.directory = Path(directory).expanduser().absolute()
        self._keep = keep
        self._writer: Any = None
        self._damaged: set[int] = set()
        self._started: int | None = None

    def prepare(self) -> None:
        """Makes the directory and tries to write in it: call it before an expensive compile.

        Raises CheckpointError where that is not possible, or where a foreign folder has a number for a name.
        """
        with self._writing():
            self.directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.directory):
                pass
        for path in self._numbered():
            if not _ours(path):  # Orbax would take it for an old step and delete it
                raise CheckpointError(
                    f"{path} is not a checkpoint of jaxdiff, and in the place of one. Move it away, or choose another "
                    "directory."
                )

    def steps(self) -> list[int]:
        """The steps here, oldest first; interrupted saves and foreign folders are not among them."""
        return sorted(int(path.name) for path in self._numbered() if _ours(path))

    def latest(self) -> int | None:
        """The newest step, or None."""
        return max(self.steps(), default=None)

    def save(self, state: PyTree, step: int, meta: dict[str, Any] | None = None) -> bool:
        """Saves in the background; the state may be donated at once. False if `step` is there.

        `meta` is anything JSON can hold. Raises CheckpointError for a leaf name with a '.', for a directory that
        cannot be written, a full disk, and for a failure of the save before this one.
        """
        if step == self._started or (step in self.steps() and step not in self._damaged):
            return False
        record = {"leaves": _leaves(state), "meta": _json(meta or {})}
        for name in record["leaves"]:
            if "." in name:
                raise CheckpointError(f"cannot save the leaf {name!r}: a '.' is read back as nesting. Rename it.")
        with self._writing():
            self._check_space(state)
            self._open().save_async(step, state, force=True, custom_metadata=record)
            self._started = step
        return True

    def meta(self, step: int | None = None) -> dict[str, Any]:
        """The dictionary saved with `step` (default: the newest). Raises CheckpointError as `restore` does."""
        return self._record(self._existing(step)[-1])["meta"]

    def restore(self, template: T, step: int | None = None) -> tuple[T, dict[str, Any]]:
        """(state, meta) of `step`; by default of the newest step that can be read, with a warning for each other.

        `template` has the shapes, dtypes and shardings wanted: a state, or `jax.eval_shape` of one.
        Raises CheckpointError where there is none, where all are damaged, or where the template is of another model.
        """
        candidates = self._existing(step)
        while True:
            candidate = candidates.pop()
            try:
                return self._read(template, candidate)
            except _DamagedError as error:
                self._damaged.add(candidate)
                if not candidates:
                    raise
                warnings.warn(f"{error} Falling back to step {candidates[-1]}.", stacklevel=2)

    def wait(self) -> None:
        """Returns when the save under way is on disk. Raises CheckpointError if it failed."""
        if self._writer is not None:
            with self._writing():
                self._writer.wait()

    def close(self) -> None:
        """`wait`, then lets go of threads and files; a later `save` opens them again."""
        writer, self._writer = self._writer, None
        if writer is not None:
            with self._writing():
                writer.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _numbered(self) -> list[Path]:
        if not self.directory.is_dir():
            return []
        return [path for path in self.directory.iterdir() if path.name.isdecimal() and path.is_dir()]

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turns what goes wrong while writing into a CheckpointError that says where and what to do."""
        try:
            yield
        except CheckpointError:
            raise
        except (OSError, RuntimeError, ValueError) as error:
            self._writer = self._started = (
                None  # it may count the failed step as kept; the next one reads the directory afresh
            )
            raise CheckpointError(
                f"cannot write a checkpoint in {self.directory}: {error}. Steps saved before are untouched. Free some "
                "disk space there or make it writable, or choose another directory."
            ) from error

    def _existing(self, step: int | None) -> list[int]:
        """The steps to try, oldest first."""
        steps = self.steps()
        if not steps:
            raise CheckpointError(f"no checkpoint of jaxdiff in {self.directory}. Train first, or check the path.")
        if step is not None and step not in steps:
            raise CheckpointError(f"no checkpoint of step {step} in {self.directory}; there are {steps}. Pick one.")
        return steps if step is None else [step]

    def _record(self, step: int) -> dict[str, Any]:
        path = self.directory / str(step)
        try:
            record = json.loads((path / "_CHECKPOINT_METADATA").read_text())["custom_metadata"]
            return {"leaves": dict(record["leaves"]), "meta": dict(record["meta"])}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _DamagedError(
                f"{path} is damaged, or no checkpoint of jaxdiff: its _CHECKPOINT_METADATA cannot be read "
                f"({type(error).__name__}: {error})."
            ) from error

    def _read(self, template: T, step: int) -> tuple[T, dict[str, Any]]:
        from orbax.checkpoint import v1 as ocp

        path, record = self.directory / str(step), self._record(step)
        different = _difference(record["leaves"], _leaves(template))
        if different:
            more = f"; and {len(different) - _SHOWN} more" if len(different) > _SHOWN else ""
            raise CheckpointError(
                f"{path} is of another model: {'; '.join(different[:_SHOWN])}{more}. "
                "Restore it with the configuration it was trained with, or start in an empty directory."
            )
        try:
            return ocp.load(str(path), jax.tree.map(_abstract, template)), record["meta"]
        except Exception as error:  # for a damaged array Orbax raises Exception itself, so nothing narrower catches it
            cause = str(error.__cause__ or error).splitlines()[0][:200]
            raise _DamagedError(f"{path} is damaged and cannot be read ({cause}).") from error

    def _open(self) -> Any:
        from orbax.checkpoint import v1 as ocp

        if self._damaged:
            self.close()
            for path in (self.directory / str(step) for step in self._damaged):
                path.rename(path.with_name(f"{path.name}.damaged"))
            self._damaged.clear()
        if self._writer is None:
            self.prepare()
            newest: Any = ocp.training.preservation_policies.LatestN(self._keep)
            self._writer = ocp.training.Checkpointer(
                str(self.directory), preservation_policy=newest, cleanup_tmp_directories=True
            )
        return self._writer

    def _check_space(self, state: PyTree) -> None:
        needed = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
        home = next(path for path in (self.directory, *self.directory.parents) if path.exists())
        free = shutil.disk_usage(home).free
        if free < needed:
            raise OSError(f"the state takes {needed / 1e6:.0f} MB and the disk has {free / 1e6:.0f} MB left")
