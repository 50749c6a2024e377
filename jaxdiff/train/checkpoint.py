"""Checkpoints of a pytree by step number, through Orbax v1, which nothing else here touches.

    DIRECTORY/120.saving/    being written; then sealed (jaxdiff.train.seal); then renamed to
    DIRECTORY/120/           so a folder with a number for a name is whole and sealed, at whatever instant a kill comes
    DIRECTORY/90.deleting/   renamed before it is deleted, for the same reason
    DIRECTORY/120.damaged/   a step that was not what was sealed, set aside by the first save after a fallback

Beside the arrays each folder holds a dictionary of the caller (`meta`) and the name, dtype and shape of every leaf,
by which a template of another model is refused before the arrays are read.
"""

import contextlib
import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.errors import CheckpointError, ConfigError
from jaxdiff.train import hosts, seal
from jaxdiff.train.seal import DamagedError
from jaxdiff.types import Array, PyTree

T = TypeVar("T")
_SHOWN = 5
# What a kill leaves: a save or a deletion cut short, of this version or (last) of format 1.
_STALE = re.compile(r"\d+\.(saving(\..+)?|deleting|orbax-checkpoint-tmp.*)")


class SaveError(CheckpointError):
    """The disk did not take this save; the steps saved before are untouched, and the next save may succeed."""


def _leaves(tree: PyTree) -> dict[str, str]:
    """Name -> 'float32[8, 4]' of every leaf."""
    flat = jax.tree_util.tree_leaves_with_path(tree)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in flat]
    return {name: f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}" for name, (_, leaf) in zip(names, flat, strict=True)}


def _same(saved: str, wanted: str, cast: bool) -> bool:
    """Whether 'float32[8, 4]' will do for the other: with `cast`, in any precision of floats."""
    (one, shape), (other, other_shape) = saved.split("["), wanted.split("[")
    return saved == wanted or (cast and shape == other_shape and "float" in one and "float" in other)


def _difference(saved: dict[str, str], wanted: dict[str, str], cast: bool) -> list[str]:
    """One line for each leaf that is not the same on both sides."""
    common = [k for k in saved if k in wanted and not _same(saved[k], wanted[k], cast)]
    lines = [f"{k} is {saved[k]} there and {wanted[k]} here" for k in common]
    lines += [f"{k} {saved[k]} is only there" for k in saved if k not in wanted]
    return lines + [f"{k} {wanted[k]} is only here" for k in wanted if k not in saved]


def _refuse_another_model(path: Path, saved: dict[str, str], wanted: dict[str, str], cast: bool) -> None:
    different = _difference(saved, wanted, cast)
    if different:
        more = f"; and {len(different) - _SHOWN} more" if len(different) > _SHOWN else ""
        fix = "Restore it with the configuration it was trained with, or start in an empty directory."
        if not _difference(saved, wanted, cast=True):
            fix = "To have its numbers converted, pass cast=True."
        raise CheckpointError(f"{path} is of another model: {'; '.join(different[:_SHOWN])}{more}. {fix}")


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
    if (path / seal.NAME).exists():
        return True
    try:
        custom = json.loads((path / "_CHECKPOINT_METADATA").read_text())["custom_metadata"]
    except (OSError, ValueError, KeyError, TypeError):
        return (path / "state").is_dir()
    return isinstance(custom, dict) and "leaves" in custom


def _all_finite(leaves: list[Array]) -> Array:
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]).all()


def _finite(state: PyTree) -> Any:
    """Whether every number of `state` is: begun now, before the state is donated, and read when the save is done."""
    leaves = [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return jax.jit(_all_finite)(leaves) if leaves else True


def _save_async(ocp: Any, folder: Path, state: PyTree, record: dict[str, Any]) -> Any:
    context = ocp.Context()
    # A folder that cannot be made is an error at once, and not one that threads of Orbax wait five minutes for.
    context.asynchronous.create_directories_asynchronously = False
    with context:
        return ocp.save_async(str(folder), state, custom_metadata=record)


class Checkpoints:
    """The checkpoints in one directory. Nothing is written, not even the directory, before `prepare` or `save`.

    Keeps the `keep` newest sound steps (they are what was sealed, and finite), and the newest one that is a multiple
    of `every`. Saves run in the background: `wait` for them, or use it as a context manager. One run writes to a
    directory at a time; any number may read. In a run of several processes (`hosts`) all call every method, each writes
    its own shards, and process 0 alone seals, renames and deletes. Raises ConfigError for keep < 2.
    """

    def __init__(self, directory: str | os.PathLike[str], *, keep: int = 3, every: int = 1):
        if keep < 2:
            raise ConfigError(
                f"keep must be an integer >= 2, got {keep}. The newest step may be damaged, and then the one before "
                "it is needed: pass 2."
            )
        self.directory = Path(directory).expanduser().absolute()
        self._keep, self._every = keep, every
        self._thread: ThreadPoolExecutor | None = None
        self._saving: Future[None] | None = None
        self._started: int | None = None
        self._sound: dict[int, bool] = {}  # what this process has sealed or compared with its seal
        self._damaged: set[int] = set()  # what restore passed over

    def prepare(self) -> None:
        """Makes the directory, tries to write in it and clears what a kill left: call it before an expensive compile.

        Raises SaveError where that is not possible, CheckpointError where a foreign folder has a number for a name.
        """
        self.wait()
        with self._writing():
            hosts.first("clear the checkpoints", self._clear)
        for path in self._numbered():
            if not _ours(path):
                raise CheckpointError(
                    f"{path} is not a checkpoint of jaxdiff, and in the place of one. Move it away, or choose another "
                    "directory."
                )

    def _clear(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=self.directory):
            pass
        for path in self.directory.iterdir():
            if _STALE.fullmatch(path.name) and path.is_dir():
                shutil.rmtree(path)

    def steps(self) -> list[int]:
        """The steps here, oldest first; interrupted saves and foreign folders are not among them."""
        return sorted(int(path.name) for path in self._numbered() if _ours(path))

    def latest(self) -> int | None:
        """The newest step, or None."""
        return max(self.steps(), default=None)

    def save(self, state: PyTree, step: int, meta: dict[str, Any] | None = None) -> bool:
        """Saves in the background; the state may be donated at once. False if `step` is there.

        `meta` is anything JSON can hold. Raises CheckpointError for a leaf name with a '.', and SaveError for a
        directory that cannot be written, a full disk, and for a failure of the save before this one.
        """
        if step not in self._damaged and (step == self._started or step in self.steps()):
            return False
        record = {"format": seal.FORMAT, "leaves": _leaves(state), "meta": _json(meta or {})}
        for name in record["leaves"]:
            if "." in name:
                raise CheckpointError(f"cannot save the leaf {name!r}: a '.' is read back as nesting. Rename it.")
        from orbax.checkpoint import v1 as ocp

        self.wait()
        with self._writing():
            hosts.first("look at the space left", lambda: self._check_space(state))
            thread, finite = self._open(), _finite(state)
            response = _save_async(ocp, self._folder(step, "saving"), state, record)
            self._saving = thread.submit(self._complete, response, step, finite, seal.digest(record["meta"]))
            self._started = step
        return True

    def meta(self, step: int | None = None) -> dict[str, Any]:
        """The dictionary saved with `step` (default: the newest). Raises CheckpointError as `restore` does."""
        return self._record(self._existing(step)[-1])["meta"]

    def restore(
        self, template: T, step: int | None = None, *, among: Sequence[int] | None = None, cast: bool = False
    ) -> tuple[T, dict[str, Any]]:
        """(state, meta) of `step`; by default of the newest sound step, with a warning for each that was passed over.

        `template` has the shapes, dtypes and shardings wanted: a state, or `jax.eval_shape` of one. `among` are the
        steps to choose from (default: all). A `step` that was asked for need not be finite. `cast` rounds floats to
        the dtypes of the template, which is refused otherwise.
        Raises CheckpointError where there is none, where all are damaged, or where the template is of another model.
        """
        existing = hosts.first("list the checkpoints", lambda: self._existing(step))
        candidates = [there for there in existing if among is None or there in among]
        if not candidates:
            raise CheckpointError(f"none of the steps {among} is in {self.directory}. Give one of {self.steps()}.")
        while True:
            candidate = candidates.pop()
            try:
                return self._read(template, candidate, any_number=step is not None, cast=cast)
            except DamagedError as error:
                self._damaged.add(candidate)
                if not candidates:
                    raise
                warnings.warn(
                    f"{error} Falling back to step {candidates[-1]}: what came after it is done again.", stacklevel=2
                )

    def wait(self) -> None:
        """Returns when the save under way is sealed. Raises SaveError if it failed."""
        if self._saving is not None:
            with self._writing():
                self._saving.result()
            self._saving = None

    def close(self) -> None:
        """`wait`, then lets go of the thread; a later `save` starts it again."""
        try:
            self.wait()
        finally:
            thread, self._thread = self._thread, None
            if thread is not None:
                thread.shutdown()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _folder(self, step: int, state: str = "") -> Path:
        return self.directory / (f"{step}.{state}" if state else str(step))

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
            self._saving = self._started = self._thread = None  # so that the next save clears what this one has left
            raise SaveError(
                f"cannot write a checkpoint in {self.directory}: {error}. Steps saved before are untouched. Free some "
                "disk space there or make it writable, or choose another directory."
            ) from error

    def _open(self) -> ThreadPoolExecutor:
        """The thread that completes saves, after what lies in their way has been moved."""
        hosts.first("move what is damaged", self._set_aside)
        self._damaged.clear()
        if self._thread is None:
            self.prepare()
            self._thread = ThreadPoolExecutor(1, "checkpoint")
        return self._thread

    def _set_aside(self) -> None:
        for step in self._damaged:
            shutil.rmtree(self._folder(step, "damaged"), ignore_errors=True)
            self._folder(step).rename(self._folder(step, "damaged"))
            self._sound.pop(step, None)

    def _complete(self, response: Any, step: int, finite: Any, config: str) -> None:
        """What follows when Orbax has written all: seal, rename, and only then delete old steps."""
        response.result()
        hosts.first("seal a checkpoint", lambda: self._seal(step, bool(finite), config))

    def _seal(self, step: int, finite: bool, config: str) -> None:
        seal.write(self._folder(step, "saving"), step, finite=finite, config=config)
        self._folder(step, "saving").rename(self._folder(step))
        seal.sync(self.directory)
        self._sound[step] = finite
        self._delete_old()

    def _delete_old(self) -> None:
        kept, multiple = 0, False
        for step in reversed(self.steps()):
            wanted = kept < self._keep or not (multiple or step % self._every)
            if not wanted:
                self._folder(step).rename(self._folder(step, "deleting"))
                shutil.rmtree(self._folder(step, "deleting"))
            elif self._is_sound(step):
                kept, multiple = kept + 1, multiple or step % self._every == 0

    def _is_sound(self, step: int) -> bool:
        if step not in self._sound:
            try:
                self._sound[step] = self._check(step)
            except CheckpointError:
                self._sound[step] = False
        return self._sound[step]

    def _existing(self, step: int | None) -> list[int]:
        """The steps to try, oldest first."""
        steps = self.steps()
        if not steps:
            raise CheckpointError(f"no checkpoint of jaxdiff in {self.directory}. Train first, or check the path.")
        if step is not None and step not in steps:
            raise CheckpointError(f"no checkpoint of step {step} in {self.directory}; there are {steps}. Pick one.")
        return steps if step is None else [step]

    def _record(self, step: int) -> dict[str, Any]:
        path = self._folder(step)
        try:
            record = json.loads((path / "_CHECKPOINT_METADATA").read_text())["custom_metadata"]
            return {"format": 1, **record, "leaves": dict(record["leaves"]), "meta": dict(record["meta"])}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DamagedError(
                f"{path} is damaged, or no checkpoint of jaxdiff: its _CHECKPOINT_METADATA cannot be read "
                f"({type(error).__name__}: {error})."
            ) from error

    def _check(self, step: int) -> bool:
        """Compare the step with its seal; returns whether it is finite, which format 1 does not tell."""
        path = self._folder(step)
        if not (path / seal.NAME).exists() and self._record(step)["format"] == 1:
            return True
        finite, config = seal.check(path, step)
        if config is not None and config != seal.digest(self._record(step)["meta"]):
            raise DamagedError(f"{path} is damaged: the config in it is not the one that was sealed.")
        return finite

    def _checked(self, step: int) -> bool:
        """What process 0 found in `_check`, in all, so that all fall back to the same step."""
        finite, damage = hosts.first("check a checkpoint", lambda: self._verdict(step))
        if damage:
            raise DamagedError(damage)
        return finite

    def _verdict(self, step: int) -> tuple[bool, str]:
        try:
            return self._check(step), ""
        except DamagedError as error:
            return False, str(error)

    def _read(self, template: T, step: int, *, any_number: bool, cast: bool) -> tuple[T, dict[str, Any]]:
        from orbax.checkpoint import v1 as ocp

        path, finite = self._folder(step), self._checked(step)
        record = self._record(step)
        if record["format"] == 1:
            warnings.warn(f"{path} is of an earlier version, without a seal: damage would not be seen.", stacklevel=3)
        _refuse_another_model(path, record["leaves"], _leaves(template), cast)
        if not (finite or any_number):
            raise DamagedError(f"{path} holds numbers that are not finite.")
        try:
            state = ocp.load(str(path), jax.tree.map(_abstract, template))
        except Exception as error:  # for a damaged array Orbax raises Exception itself, so nothing narrower catches it
            cause = str(error.__cause__ or error).splitlines()[0][:200]
            if record["format"] == 1:
                raise DamagedError(f"{path} is damaged and cannot be read ({cause}).") from error
            raise CheckpointError(
                f"{path} is what was sealed, and yet cannot be read ({cause}). Look at the memory that is free, and at "
                "the versions of jax and orbax-checkpoint that wrote it."
            ) from error
        self._sound[step] = finite
        return state, record["meta"]

    def _check_space(self, state: PyTree) -> None:
        needed = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
        home = next(path for path in (self.directory, *self.directory.parents) if path.exists())
        free = shutil.disk_usage(home).free
        if free < needed:
            raise OSError(f"the state takes {needed / 1e6:.0f} MB and the disk has {free / 1e6:.0f} MB left")
