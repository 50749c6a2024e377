"""The promises of training, tried on real processes that are really killed.

    python -m tests.oracles.reliability              the long part
    python -m tests.oracles.reliability --short      the one that the tests run

The toy run is the Swiss roll: 45 steps, a checkpoint every 3, a line of the log every step. A trial interrupts it and
starts it again by the same command until it ends; it passes where every leaf of the last checkpoint and every loss in
the log are, bit for bit, those of the run that was left alone. The processes are forked from this one, which has
imported everything and touched no device: that saves each of them three seconds.
"""

import argparse
import contextlib
import errno
import functools
import hashlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TQDM_DISABLE", "1")

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1  # noqa: F401  (so that no fork has to import it)

from experiments import cli, workdir
from experiments import model as models
from experiments import train as job
from jaxdiff.train import Checkpoints, seal
from tests.oracles.damage import damaged

STEPS, EVERY = 45, 3
TOY = [
    "--config=swissroll", "--config.net.width=16", "--config.net.depth=1", "--config.train.batch_size=16",
    "--config.train.steps_per_call=1", "--config.train.log_every=1", "--config.train.sample_every=0",
    "--config.sample.num=16", "--config.sample.steps=2", "--config.data.points=100", f"--config.train.steps={STEPS}",
    f"--config.train.checkpoint_every={EVERY}",
]  # fmt: skip
NOW_AND_THEN = range(2, 21, 2)  # ten bad gradients: back at step 21, to the checkpoint of step 18
POINTS = {  # of a save, in the order in which they come
    "after the temporary folder": r"after mkdir .*/\d+\.saving\.[^/]*$",
    "while the arrays are written": r"after mkdir .*/\d+\.saving\.[^/]*/state$",
    "before the seal": r"before rename .*/seal\.json\.tmp$",
    "after the seal": r"after rename .*/seal\.json\.tmp$",
    "before the rename": r"before rename .*/\d+\.saving$",
    "after the rename": r"after rename .*/\d+\.saving$",
    "during retention": r"(after unlink [^/]*|(before|after) rename .*/checkpoints/\d+)$",
}


class Run:
    """The toy run in a directory, and the process in which it lives. `prepare` comes first in each of its lives."""

    kills, slowest = 0, (0.0, 0.0)  # of all runs; (processor seconds, seconds) from a signal to the end

    def __init__(self, root: Path, name: str, prepare: Callable[[], object] = lambda: None):
        self.root, self.name, self.directory, self.pid = root, name, root / name, 0
        self.prepare = prepare

    def start(self, prepare: Callable[[], object] = lambda: None, then: Callable[[], int] = lambda: 0) -> None:
        """Give it a life, with something before it and something after it."""

        def act() -> int:
            self.prepare()
            prepare()
            return job.run([*TOY, f"--workdir={self.directory}"]) or then()

        self.pid = fork(act, self.root / f"{self.name}.txt")

    def logged(self) -> int:
        """The lines in its log: the last step that it has finished."""
        log = self.directory / "metrics.jsonl"
        return log.read_bytes().count(b"\n") if log.exists() else 0

    def saved(self) -> int:
        """The newest step that it has saved."""
        return max((int(p.name) for p in (self.directory / "checkpoints").iterdir() if p.name.isdecimal()), default=0)

    def said(self) -> str:
        """All that it has printed in all its lives."""
        return (self.root / f"{self.name}.txt").read_text()

    def lives(self) -> bool:
        """Whether it has not ended."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def wait_for(self, step: int) -> None:
        """Until it has finished `step`, or has ended."""
        while self.logged() < step and self.lives():
            time.sleep(0.002)

    def wait_for_word(self, word: str) -> None:
        """Until it has said it, or has ended."""
        while word not in self.said() and self.lives():
            time.sleep(0.002)

    def end(self) -> int:
        """Wait for the end of the process: its exit status, or the negative number of the signal that killed it."""
        _, status, usage = os.wait4(self.pid, 0)
        self.spent = usage.ru_utime + usage.ru_stime
        Run.kills += os.waitstatus_to_exitcode(status) == -signal.SIGKILL
        return os.waitstatus_to_exitcode(status)

    def so_far(self) -> float:
        """The processor time that this life has used."""
        times = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        return sum(map(int, times)) / os.sysconf("SC_CLK_TCK")

    def finish(self) -> tuple[bytes, str]:
        """Live to the end, and say what is compared: the log, and the digest of all leaves."""
        result = self.root / f"{self.name}.sha256"
        self.start(then=lambda: 0 * result.write_text(digest(self.directory)))
        if status := self.end():
            raise RuntimeError(f"{self.name} ended with {status}:\n{self.said()}")
        return (self.directory / "metrics.jsonl").read_bytes(), result.read_text()


def fork(act: Callable[[], int], out: Path) -> int:
    """Run `act` in a process of its own, which ends as our commands do, its words in `out`; returns the id."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        words = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(words, 1)
        os.dup2(words, 2)
        cli.main(lambda argv: act())
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def digest(directory: Path) -> str:
    """sha256 over the name and the bytes of every leaf of the newest checkpoint of a run."""
    config, _ = workdir.load(directory)
    carry, _ = Checkpoints(directory / "checkpoints").restore(job.Job(config, directory).abstract)
    total = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(carry):
        total.update(jax.tree_util.keystr(path).encode() + np.asarray(leaf).tobytes())
    return total.hexdigest()


def poison(bad: Any, patch: Callable[[Any, str, Any], object] = setattr) -> None:
    """Have the losses and the gradients of the steps `bad` be NaN."""
    batches, loss = job.inputs.batches, models.Model.loss

    def marked(dataset: Any, *, step: int, batch_size: int, steps: int, **kwargs: Any) -> Iterator[dict[str, Any]]:
        for batch in batches(dataset, step=step, batch_size=batch_size, steps=steps, **kwargs):
            yield batch | {"bad": np.full((steps, batch_size), step in bad)}
            step += steps

    def poisoned(self: models.Model, params: Any, key: Any, batch: Any) -> tuple[Any, Any]:
        losses, aux = loss(self, params, key, batch)
        return losses * jnp.where(batch["bad"], jnp.nan, 1.0), aux  # the gradients, too

    patch(job.inputs, "batches", marked)
    patch(models.Model, "loss", poisoned)


def forget() -> None:
    """Have it begin with the first of the data in each of its lives."""
    batches = job.inputs.batches
    job.inputs.batches = lambda *args, step, **kwargs: batches(*args, step=0, **kwargs)


def watch(seen: Callable[[str], None], patch: Callable[[Any, str, Any], object] = setattr) -> None:
    """Call `seen` before and after all that is done to the file system from here: "before rename a/3.saving"."""

    def around(name: str, act: Callable) -> Callable:
        def watched(*args: Any, **kwargs: Any) -> Any:
            seen(f"before {name} {args[0]}")
            result = act(*args, **kwargs)
            seen(f"after {name} {args[0]}")
            return result

        return watched

    for name in ("rename", "replace", "fsync", "mkdir", "unlink", "rmdir"):
        patch(os, name, around(name, getattr(os, name)))


def die(pattern: str, number: int) -> None:
    """Have the process killed at the event of this number among those that match."""
    count = itertools.count(1)

    def seen(event: str) -> None:
        if re.match(pattern, event) and next(count) == number:
            if pattern == POINTS["while the arrays are written"]:
                threading.Thread(target=_die_while_written, args=[Path(event.split(" ", 2)[2])]).start()
            else:
                os.kill(os.getpid(), signal.SIGKILL)

    watch(seen)


def _die_while_written(folder: Path) -> None:
    while folder.exists():
        with contextlib.suppress(OSError):
            if any(path.stat().st_size for path in folder.rglob("d/*")):
                os.kill(os.getpid(), signal.SIGKILL)


def refuse(number: int, first: int, count: int, patch: Callable[[Any, str, Any], object] = setattr) -> None:
    """Have the disk refuse `count` operations on checkpoints from the `first` one on, with the error `number`."""
    place = itertools.count(1)

    def seen(event: str) -> None:
        if re.match(r"before (\w+ .*/checkpoints/.*|\w+ [^/]*)$", event) and first <= next(place) < first + count:
            raise OSError(number, os.strerror(number))

    watch(seen, patch)


def killed(run: Run, rng: np.random.Generator, within: int = STEPS // 3) -> list[str]:
    """Kill it near one of its next steps, or in the first second of its life."""
    while True:
        run.start()
        if rng.random() < 0.25:
            time.sleep(rng.uniform(0, 1))
        else:
            run.wait_for(int(rng.integers(min(run.logged(), STEPS - 2), min(run.logged() + within, STEPS))))
            time.sleep(rng.uniform(0, 0.02))
        os.kill(run.pid, signal.SIGKILL)
        if run.end() == -signal.SIGKILL:  # and had not ended before
            return []


def killed_at(run: Run, rng: np.random.Generator, pattern: str, within: int = 3) -> list[str]:
    """Kill it at one of the next `within` events of a kind."""
    while True:
        run.start(functools.partial(die, pattern, int(rng.integers(1, within + 1))))
        if run.end() == -signal.SIGKILL:
            return []
        shutil.rmtree(run.directory)  # it had ended before


def signalled(run: Run, rng: np.random.Generator, number: int, again: bool = False, within: int = 10) -> list[str]:
    """Send it a signal, and where `again` a second one in the next 50 ms; returns what went wrong.

    The three seconds are of processor time, as on a machine with nothing else to do.
    """
    run.start()
    run.wait_for(run.logged() + int(rng.integers(1, within)))
    spent, sent = run.so_far(), time.monotonic()
    os.kill(run.pid, number)
    if again:
        time.sleep(rng.uniform(0, 0.05))
        os.kill(run.pid, number)
    status = run.end()
    if again:
        return [] if status in (128 + number, -number) else [f"status {status}"]
    took = (run.spent - spent, time.monotonic() - sent)
    Run.slowest = max(Run.slowest, took)
    wrong = [] if status == 128 + number else [f"status {status}"]
    wrong += [] if run.saved() == run.logged() else [f"saved at step {run.saved()} of {run.logged()}"]
    return wrong + ([] if took[0] <= 3 else [f"took {took[0]:.1f} s"])


def refused(run: Run, rng: np.random.Generator, number: int, within: int = 100) -> list[str]:
    """Have the disk refuse one to six operations from one of the next `within` on: it must say so and go on."""
    run.start(functools.partial(refuse, number, int(rng.integers(1, within)), int(rng.integers(1, 7))))
    return _went_on(run, number)


def full(run: Run, rng: np.random.Generator) -> list[str]:
    """A real disk that is full until it has said so: it must go on."""
    run.directory.mkdir()
    with disk(run.directory):
        run.start()
        run.wait_for(int(rng.integers(EVERY, STEPS // 2)))
        with (run.directory / "ballast").open("wb", buffering=0) as ballast, contextlib.suppress(OSError):
            while ballast.write(b"0" * 4096):
                pass
        run.wait_for_word("The run goes on")
        (run.directory / "ballast").unlink()
        return _went_on(run, errno.ENOSPC)


def read_only(run: Run, rng: np.random.Generator) -> list[str]:
    """Checkpoints on a real disk that is read-only until it has said so: it must go on."""
    signalled(run, rng, signal.SIGTERM, within=5)
    with disk(run.directory / "checkpoints") as checkpoints:
        run.start()
        run.wait_for(run.logged() + int(rng.integers(1, STEPS // 2)))
        while subprocess.run(["mount", "-o", "remount,ro", checkpoints], check=False, capture_output=True).returncode:
            time.sleep(0.001)  # while a file there is open
        run.wait_for_word("The run goes on")
        subprocess.run(["mount", "-o", "remount,rw", checkpoints], check=True)
        return _went_on(run, errno.EROFS)


def _went_on(run: Run, number: int) -> list[str]:
    """What went wrong in a run whose disk failed; that it was the last save which did is told by its status."""
    status, said = run.end(), run.said()
    if status == 2 and f"error: cannot write a checkpoint in {run.directory}" in said:
        return []
    wrong = [f"status {status}"] if status else []
    return wrong + ([] if os.strerror(number) in said and "The run goes on" in said else ["no warning"])


@contextlib.contextmanager
def disk(folder: Path, size: str = "4m") -> Iterator[Path]:
    """Put `folder` on a disk of its own for a while. Raises PermissionError where this user cannot mount one."""
    spare = folder.with_name(f"{folder.name}.spare")
    shutil.move(folder, spare)
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=False)
    if mounted.returncode:
        raise PermissionError("a disk of a few megabytes can be mounted by root only.")
    try:
        shutil.copytree(spare, folder, dirs_exist_ok=True)
        yield folder
        shutil.rmtree(spare)
        shutil.copytree(folder, spare)
    finally:
        subprocess.run(["umount", folder], check=True)
    folder.rmdir()
    shutil.move(spare, folder)


Interruption = Callable[[Run], list[str]]


def attempt(run: Run, interruptions: Iterable[Interruption], wanted: tuple[bytes, str]) -> list[str]:
    """Interrupt a run, again and again, and let it finish; returns what went wrong."""
    wrong = [f"{i}. {what}" for i, interrupt in enumerate(interruptions) for what in interrupt(run)]
    wrong += [] if run.finish() == wanted else ["the log or the state is not the same"]
    shutil.rmtree(run.directory)
    return wrong


def long(root: Path, count: int, rng: np.random.Generator) -> bool:
    """Print one line for each kind of trial; returns whether all passed."""
    wanted = Run(root, "whole").finish()
    passed = tried(root, "killed and signalled", count, lambda i: interruptions(i, rng), wanted)
    tenth = max(1, count // 10)
    passed &= tried(root, "disk full", tenth, lambda i: [lambda run: full(run, rng)], wanted)
    passed &= tried(root, "disk read-only", tenth, lambda i: [lambda run: read_only(run, rng)], wanted)
    bad = functools.partial(poison, NOW_AND_THEN)
    wanted = Run(root, "whole, with bad gradients", bad).finish()
    twice = [lambda run: killed(run, rng)] * 2
    passed &= tried(root, "killed twice, with bad gradients", tenth, lambda i: twice, wanted, bad)
    print(f"SIGKILLs: {Run.kills}; the slowest answer to a signal took {Run.slowest[0]:.2f} processor seconds", end=" ")
    print(f"(and {Run.slowest[1]:.1f} s)", flush=True)
    passed &= damages(root, 10 * count, rng)
    print("now with the seal switched off, which must be seen to fail:")
    return not damages(root, count, rng, sealed=False) and passed


def interruptions(i: int, rng: np.random.Generator) -> list[Interruption]:
    """What happens in trial `i`, in any order.

    Two kills at random instants and one at a point of a save, of which ten trials see all seven and three file
    operations at random; in every fifth a signal; in every tenth two signals, and a disk that refuses.
    """
    number = (signal.SIGTERM, signal.SIGINT)[i // 10 % 2]
    error = (errno.ENOSPC, errno.EROFS)[i // 10 % 2]
    point = [*POINTS.values(), "", "", ""][i % 10]
    within = {"": 100, POINTS["during retention"]: 24}.get(point, 3)
    acts: list[Interruption] = [lambda run: killed(run, rng)] * 2
    acts += [lambda run: killed_at(run, rng, point, within)]
    acts += [lambda run: signalled(run, rng, number)] * (i % 5 == 0)
    acts += [lambda run: signalled(run, rng, number, again=True)] * (i % 10 == 1)
    acts = [acts[k] for k in rng.permutation(len(acts))]
    return acts + [lambda run: refused(run, rng, error)] * (i % 10 == 2)


def tried(
    root: Path, name: str, number: int, acts: Callable[[int], list[Interruption]], wanted: tuple[bytes, str],
    prepare: Callable[[], object] = lambda: None,
) -> bool:  # fmt: skip
    """Make `number` trials of one kind, and print how many passed; returns whether all did."""
    good, started = 0, time.monotonic()
    for i in range(number):
        wrong = attempt(Run(root, f"{name} {i}", prepare), acts(i), wanted)
        good += not wrong
        if wrong:
            print(f"{name} {i}: {'; '.join(wrong)}", flush=True)
        if i % 10 == 9 or i == number - 1:
            print(f"{name}: {good} of {i + 1} passed ({time.monotonic() - started:.0f} s)", flush=True)
    return good == number


def short(root: Path, rng: np.random.Generator) -> bool:
    """One run through everything, another that must be seen to fail, and a few damages; returns whether all is well."""
    wanted = Run(root, "whole").finish()
    near = 2 * EVERY
    wrong = attempt(
        Run(root, "interrupted"),
        [
            lambda run: signalled(run, rng, signal.SIGTERM, within=near),
            lambda run: killed(run, rng, near),
            lambda run: killed_at(run, rng, POINTS["before the rename"]),
            lambda run: signalled(run, rng, signal.SIGINT, within=near),
            lambda run: killed_at(run, rng, "", 100),
            lambda run: signalled(run, rng, signal.SIGINT, again=True, within=near),
            lambda run: refused(run, rng, errno.ENOSPC, 100),
        ],
        wanted,
    )
    print(f"one run through everything: {wrong or 'passed'}", flush=True)
    other = attempt(
        Run(root, "forgetful", forget), [lambda run: signalled(run, rng, signal.SIGTERM, within=near)], wanted
    )
    print(f"one that forgets its place in the data: {other}", flush=True)
    return damages(root, 20, rng) and not wrong and other == ["the log or the state is not the same"]


def damages(root: Path, count: int, rng: np.random.Generator, *, sealed: bool = True) -> bool:
    """Print how many of `count` damages to a step were seen; returns whether all were."""
    out, words = root / "damages", root / "words"

    def act() -> int:
        if not sealed:
            seal.check = lambda folder, step: (True, None)
        return 0 * out.write_text(json.dumps(damaged(root, count, rng)))

    os.waitpid(fork(act, words), 0)
    seen, made = json.loads(out.read_text())
    if sealed:
        print(words.read_text(), end="")
    print(f"damages to a step: {seen} of {made} seen, and the step before used", flush=True)
    return seen == made


def quick(folder: str) -> None:
    """Have everything compiled kept in `folder`, and draw nothing: each process lives for seconds only."""
    jax.config.update("jax_compilation_cache_dir", os.environ.get("JAX_COMPILATION_CACHE_DIR", folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    workdir._tensorboard = lambda path, step: None
    job.models.sampler = lambda model, settings: lambda *arguments: None
    job.save_grid = lambda *arguments: None
    job.use_compile_cache = lambda: None


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=100, help="with two SIGKILLs; the others in proportion")
    parser.add_argument("--short", action="store_true", help="one run through everything instead")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None  # a kill loses nothing written, here or there
    rng = np.random.default_rng(args.seed)
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        quick(f"{folder}/cache")
        passed = short(Path(folder), rng) if args.short else long(Path(folder), args.trials, rng)
    sys.exit(not passed)


if __name__ == "__main__":
    main()
