"""What a run writes: one directory that says what it is, refuses to become another run, and resumes by itself.

config.json     the resolved config              data.json      shape, number of examples, class names
versions.json   what made it                     tokenizer.json the text vocabulary, where there is one
metrics.jsonl   one line per logged step         speed.jsonl    time per logged step (differs from run to run)
samples/        PNG grids                        checkpoints/   the state
skipped_records.jsonl   the examples that cannot be used, where there are any
frozen.json     which weights it stands on and does not train, where there are any (see experiments/latents.py)
vae/            of an autoencoder, when its training has ended: itself, as diffusers reads it
tensorboard/    the metrics again, where tensorboardX is installed
"""

import contextlib
import fcntl
import functools
import importlib.metadata
import json
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from experiments import check as check_settings
from experiments import cli
from experiments.configs import Config
from experiments.configs._base import base
from experiments.saving import tolerated
from jaxdiff.atomic import replacing
from jaxdiff.errors import CheckpointError, ConfigError, DataError

MAX_JSON = 2**24  # bytes
# Settings that do not change what is learned up to a step: a run may be resumed with others.
FREE = (
    "data.memory_gb",
    "data.ahead",
    "data.workers",
    "frozen.cache",
    "train.log_every",
    "train.sample_every",
    "train.checkpoint_every",
    "train.keep",
    "train.remat",
    "sample.",
    "mesh.",
)


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that the file appears whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1), encoding="utf-8")


def versions() -> dict[str, Any]:
    """The software and the devices of this process."""
    packages = {}
    for name in ("jaxdiff", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"):
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            packages[name] = "not installed"
    devices = [str(d.device_kind) for d in jax.devices()]
    return {"python": platform.python_version(), "packages": packages, "devices": devices, "command": sys.argv}


def check(workdir: Path, config: Config, info: dict[str, Any]) -> None:
    """Raise before anything is written: the directory must be writable, and not hold another run.

    Raises CheckpointError for a directory that cannot be used, ConfigError for one made with another config, DataError
    for one made with other data (`info` is of inputs.describe).
    """
    parent = _existing(workdir)
    if not parent.is_dir():
        raise CheckpointError(f"workdir {workdir} cannot be made: {parent} is a file. Give another --workdir.")
    try:
        cli.try_to_write(parent)
    except OSError as error:
        raise CheckpointError(
            f"workdir {workdir} cannot be written: {error.strerror} ({parent}). Give another --workdir."
        ) from error
    if (workdir / "config.json").exists():
        check_same(workdir, lasting(_stored_config(workdir).to_dict()), lasting(config.to_dict()))
        _check_data(workdir, config, info)
    elif workdir.exists() and any(not path.name.startswith("config.json.") for path in workdir.iterdir()):
        raise CheckpointError(
            f"workdir {workdir} holds files but no run of ours (no config.json). Give another --workdir."
        )


def check_space(workdir: Path, needed: int) -> None:
    """Raise CheckpointError when the disk of `workdir` has less than `needed` bytes left."""
    free = shutil.disk_usage(_existing(workdir)).free
    if free < needed:
        raise CheckpointError(
            f"workdir {workdir} has {free / 1e9:.3f} GB free and this run needs about {needed / 1e9:.3f} GB for "
            "its checkpoints. Free some space, keep fewer (--config.train.keep=2), or give another --workdir."
        )


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Hold the directory; the system lets go of it however this process ends. CheckpointError when another holds it."""
    handle = os.open(workdir, os.O_RDONLY)
    try:
        _lock(handle, workdir)
        yield
    finally:
        os.close(handle)


def _lock(handle: int, workdir: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise CheckpointError(
            f"another training is running in workdir {workdir}. Wait for it, stop it, or give another --workdir."
        ) from error
    except OSError:  # some network file systems have no locks
        print(f"note: {workdir} cannot be locked; do not start a second training in it.")


def _existing(workdir: Path) -> Path:
    """The directory, or the nearest one above it that exists."""
    absolute = workdir.absolute()
    return next(path for path in (absolute, *absolute.parents) if path.exists())


def lasting(config: dict[str, Any]) -> dict[str, Any]:
    """The settings that decide what is learned up to a step, flat and as JSON values: every checkpoint holds them."""
    free = FREE if config["optimizer"]["decay"] == "cosine" else (*FREE, "train.steps")  # cosine ends at the last step
    flat = cli.flatten(json.loads(json.dumps(config)))
    return {key: value for key, value in flat.items() if not key.startswith(free)}


def check_same(where: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Raise ConfigError where the `lasting` settings of what lies at `where`, `old`, are not those of this run.

    A setting of the base config that `old` is too old to have had is at its default there.
    """
    default = cli.flatten(json.loads(json.dumps(base().to_dict())))
    old = {k: default[k] for k in new.keys() & default.keys() if not k.startswith("net.")} | old
    changed = [k for k in sorted(old | new) if old.get(k) != new.get(k)]
    if changed:
        lines = "".join(f"\n  {k}: was {old.get(k)!r}, now {new.get(k)!r}" for k in changed[:8])
        more = f"\n  and {len(changed) - 8} more" if len(changed) > 8 else ""
        raise ConfigError(
            f"{where} holds a run with another config:{lines}{more}\n"
            f"To resume it, give its settings again; to start anew, give another --workdir, such as {where}-2."
        )


def _check_data(workdir: Path, config: Config, info: dict[str, Any]) -> None:
    old = _stored_info(workdir) if (workdir / "data.json").exists() else info
    for key in ("shape", "num_classes", "label_names") if config.condition == "label" else ("shape",):
        if old[key] != info[key]:
            raise DataError(
                f"workdir {workdir} holds a run on other data: {key} was {old[key]}, now {info[key]}. Give the data it "
                "was trained on, or another --workdir."
            )
    if old["num_examples"] != info["num_examples"]:
        print(f"note: the data had {old['num_examples']:,} examples and has {info['num_examples']:,} now.")


def load_json(path: Path) -> Any:
    """Read a JSON file of a run; CheckpointError when it is damaged."""
    if path.stat().st_size > MAX_JSON:
        raise CheckpointError(f"{path} has {path.stat().st_size:,} bytes; at most {MAX_JSON:,} are read. Is it ours?")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, what: object) -> CheckpointError:
    return CheckpointError(f"{path} is damaged: {what!s:.300}. Restore it, or give another --workdir.")


def load(workdir: Path) -> tuple[Config, dict[str, Any]]:
    """The config and the data description of a trained run.

    Raises CheckpointError when `workdir` holds no run.
    """
    if not (workdir / "config.json").is_file() or not (workdir / "data.json").is_file():
        raise CheckpointError(
            f"{workdir} is not the workdir of a run (no config.json or data.json). Train one first: "
            "python -m experiments.train --config=emoji, or give --workdir=DIR."
        )
    return _stored_config(workdir), _stored_info(workdir)


def _stored_config(workdir: Path) -> Config:
    """That of config.json: every setting known and of its type; those that it is too old to have, at their defaults."""
    path = workdir / "config.json"
    values, config = _tuples(load_json(path)), base()
    flat, known = cli.flatten(values if isinstance(values, dict) else {}), cli.flatten(config)
    if not isinstance(flat.get("net.name"), str):
        raise _damaged(path, "it names no network")
    config.net = ConfigDict({"name": flat["net.name"]})
    for key, value in flat.items():
        *parents, leaf = key.split(".")
        if parents == ["net"] and isinstance(value, int | float | str | tuple):
            config.net[leaf] = value
        elif key not in known or not check_settings.fits(value, known[key]):
            raise _damaged(path, f"{key} = {value!r:.100} is no setting, or not of its type")
        else:
            functools.reduce(getattr, parents, config)[leaf] = value
    return config


def _stored_info(workdir: Path) -> dict[str, Any]:
    """That of data.json, as inputs.describe made it."""
    info = load_json(workdir / "data.json")
    if not (
        isinstance(info, dict)
        and isinstance(info.get("name"), str)
        and _counts(info.get("shape"), 1, 2**16)
        and _counts([info.get("num_examples"), info.get("num_classes")], 0, 2**48)
        and isinstance(info.get("label_names"), list)
        and all(isinstance(name, str) for name in info["label_names"])
    ):
        raise _damaged(workdir / "data.json", "it is no description of data")
    return info


def _counts(values: Any, least: int, most: int) -> bool:
    """Whether `values` is a short list of integers in that range."""
    fit = isinstance(values, list) and all(type(value) is int and least <= value <= most for value in values)
    return fit and 0 < len(values) <= 5


def _tuples(value: Any) -> Any:
    """JSON has lists where configs have tuples."""
    if isinstance(value, dict):
        return {k: _tuples(v) for k, v in value.items()}
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


class Log:
    """The metrics of a run: metrics.jsonl is reproduced bit for bit by a repeated run, speed.jsonl holds times."""

    def __init__(self, workdir: Path, step: int):
        """Open for appending after `step`; lines after it, from a run that was killed, are dropped."""
        self.files = {}
        for name in ("metrics", "speed"):
            path = workdir / f"{name}.jsonl"
            _truncate(path, step)
            self.files[name] = path.open("ab", buffering=0)
        self.unwritten = dict.fromkeys(self.files, b"")
        self.board = _tensorboard(workdir / "tensorboard", step)

    def write(self, name: str, step: int, values: dict[str, Any]) -> None:
        """Add one line to metrics or speed. Floats are written so that they read back exactly.

        What a full disk does not take is kept, and written with the next line.
        """
        self.unwritten[name] += (json.dumps({"step": step} | values) + "\n").encode()
        self._flush(name)
        if self.board:
            for key, value in values.items():
                parts = {f"{key}/{i}": v for i, v in enumerate(value)} if isinstance(value, list) else {key: value}
                for name, part in parts.items():
                    if part is not None:
                        self.board.add_scalar(name, part, step)

    def _flush(self, name: str) -> None:
        with tolerated(f"{name}.jsonl"):
            while self.unwritten[name]:
                self.unwritten[name] = self.unwritten[name][self.files[name].write(self.unwritten[name]) :]

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        for name, file in self.files.items():
            self._flush(name)
            file.close()
        if self.board:
            self.board.close()


def _truncate(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] > step:
                break
        except ValueError:
            break  # the line that was being written when the run was killed
        kept.append(line + "\n")
    with replacing(path) as temporary:
        temporary.write_text("".join(kept), encoding="utf-8")


def _tensorboard(path: Path, step: int) -> Any:
    try:
        from tensorboardX import SummaryWriter  # optional: the JSONL files hold the same
    except ImportError:
        return None
    return SummaryWriter(str(path), purge_step=step + 1)
