"""How one command becomes one run, alone or as one of several processes on several hosts.

    python -m experiments.train ... --distributed                                     SLURM, GKE, Cloud TPU, Open MPI
    python -m experiments.train ... --coordinator=HOST:PORT --num_processes=2 --process_id=0    by hand

Every process reads the data and the config, and works on its rows of every batch. Process 0 alone speaks, and writes
all but its own shards of the checkpoints.
"""

import argparse
import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from experiments import cli, workdir
from experiments.configs import Config
from jaxdiff.errors import CheckpointError
from jaxdiff.train import hosts


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that make this process one of several."""
    add = parser.add_argument
    add("--distributed", action="store_true", help="one of several processes: the cluster says which")
    add("--coordinator", help="host:port of process 0, where no cluster says so")
    add("--num_processes", type=int, help="how many there are, with --coordinator")
    add("--process_id", type=int, help="which one this is, from 0, with --coordinator")


@contextlib.contextmanager
def joined(args: argparse.Namespace, config: Config) -> Iterator[hosts.Watch]:
    """Join the other processes, where there are any, and watch over them to the end."""
    given = (args.coordinator, args.num_processes, args.process_id)
    if args.distributed or given != (None, None, None):
        hosts.start(*given)
    watch = hosts.Watch(dead_after=config.mesh.dead_after, slow_after=config.mesh.slow_after)
    with watch, contextlib.ExitStack() as stack:
        if not speaks():
            silence = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(silence))
        yield watch


def speaks() -> bool:
    """Whether this process writes the log, the pictures and the words: it is alone, or process 0."""
    return jax.process_index() == 0


@contextlib.contextmanager
def opened(directory: Path, config: Config, info: dict[str, Any], write_header: Callable[[], None]) -> Iterator[None]:
    """Hold the workdir, once all processes have looked at it and want the same run of the same data."""
    packages = {f"version of {name}": version for name, version in workdir.versions()["packages"].items()}
    hosts.same("config", cli.flatten(config.to_dict()) | {f"data {k}": v for k, v in info.items()} | packages)
    hosts.meet("the workdir")
    with contextlib.ExitStack() as stack:

        def act() -> int:
            directory.mkdir(parents=True, exist_ok=True)
            stack.enter_context(workdir.locked(directory))
            write_header()
            return (directory / "config.json").stat().st_mtime_ns

        _see_the_same(directory / "config.json", hosts.first("open the workdir", act))
        yield


def _see_the_same(path: Path, written: int, patience: float = 30.0) -> None:
    """Raise CheckpointError unless the file that process 0 wrote is here too, at the latest after some seconds."""
    end = time.monotonic() + patience
    while not path.exists() or path.stat().st_mtime_ns != written:
        if time.monotonic() > end:
            raise CheckpointError(
                f"{path}, which process 0 has written, is not here. All processes need the same --workdir, on a file "
                "system that their hosts share."
            )
        time.sleep(0.1)


class NoLog:
    """Takes the place of `workdir.Log` in the processes that do not write."""

    def __enter__(self) -> "NoLog":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def write(self, name: str, step: int, values: dict[str, Any]) -> None:
        """Write nothing."""


def log(directory: Path, step: int) -> Any:
    """The log of the run, in the process that writes it."""
    return workdir.Log(directory, step) if speaks() else NoLog()
