"""The promises of training, tried on real processes that are really killed, and on files that are really damaged.

    python -m tests.oracles.reliability --trials 100

The toy run is the Swiss roll: 60 steps, a checkpoint every 3, a line of the log every step. A trial interrupts it and
starts it again by the same command until it ends; it passes where every leaf of the last checkpoint and every loss in
the log are, bit for bit, those of the run that was left alone. The processes are forked from this one, which has
imported everything and touched no device: that saves each of them three seconds.
"""

import argparse
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TQDM_DISABLE", "1")

import jax
import numpy as np
from orbax.checkpoint import v1  # noqa: F401  (so that no fork has to import it)

from experiments import cli, workdir
from experiments import train as job
from jaxdiff.train import Checkpoints

STEPS, EVERY = 60, 3
TOY = [
    "--config=swissroll", "--config.net.width=16", "--config.net.depth=1", "--config.train.batch_size=16",
    "--config.train.steps_per_call=1", "--config.train.log_every=1", "--config.train.sample_every=0",
    "--config.sample.num=16", "--config.sample.steps=2", "--config.data.points=100", f"--config.train.steps={STEPS}",
    f"--config.train.checkpoint_every={EVERY}",
]  # fmt: skip


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


class Run:
    """The toy run in a directory, and the process in which it lives."""

    def __init__(self, root: Path, name: str):
        self.root, self.name, self.directory, self.pid = root, name, root / name, 0

    def start(self, prepare: Callable[[], object] = lambda: None, then: Callable[[], int] = lambda: 0) -> None:
        """Give it a life, with something before it and something after it."""

        def act() -> int:
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

    def wait_for(self, step: int) -> None:
        """Until it has finished `step`, or has ended."""
        while self.logged() < step and os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            time.sleep(0.001)

    def end(self) -> int:
        """Wait for the end of the process: its exit status, or the negative number of the signal that killed it."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def finish(self) -> tuple[bytes, str]:
        """Live to the end, and say what is compared: the log, and the digest of all leaves."""
        result = self.root / f"{self.name}.sha256"
        self.start(then=lambda: 0 * result.write_text(digest(self.directory)))
        if status := self.end():
            raise RuntimeError(f"{self.name} ended with {status}:\n{(self.root / f'{self.name}.txt').read_text()}")
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


def killed(run: Run, rng: np.random.Generator, kills: int = 2) -> None:
    """Kill it `kills` times: near a random step, or in the first second of its life."""
    while kills:
        run.start()
        if rng.random() < 0.25:
            time.sleep(rng.uniform(0, 1))
        else:
            run.wait_for(int(rng.integers(min(run.logged(), STEPS - 2), STEPS)))
            time.sleep(rng.uniform(0, 0.02))
        os.kill(run.pid, signal.SIGKILL)
        kills -= run.end() == -signal.SIGKILL


def signalled(run: Run, rng: np.random.Generator, number: int, again: bool) -> list[str]:
    """Send it a signal, and where `again` a second one in the next 50 ms; returns what went wrong."""
    run.start()
    run.wait_for(int(rng.integers(1, STEPS - 20)))
    os.kill(run.pid, number)
    sent = time.monotonic()
    if again:
        time.sleep(rng.uniform(0, 0.05))
        os.kill(run.pid, number)
    status, took = run.end(), time.monotonic() - sent
    if again:
        return [] if status in (128 + number, -number) else [f"status {status}"]
    wrong = [] if status == 128 + number else [f"status {status}"]
    wrong += [] if run.saved() == run.logged() else [f"saved at step {run.saved()} of {run.logged()}"]
    return wrong + ([] if took <= 3 else [f"took {took:.1f} s"])


class Events:
    """Counts what the process does to the file system, and ends it there and then at number `last`."""

    def __init__(self, last: int = sys.maxsize):
        self.count, self.last = 0, last
        for name in ("rename", "replace", "fsync", "mkdir", "unlink", "rmdir"):
            setattr(os, name, self.around(getattr(os, name)))

    def around(self, act: Callable) -> Callable:
        """`act` between two events."""

        def wrapped(*args: object, **kwargs: object) -> object:
            self.tick()
            result = act(*args, **kwargs)
            self.tick()
            return result

        return wrapped

    def tick(self) -> None:
        """One more event."""
        self.count += 1
        if self.count >= self.last:
            os._exit(9)


def damaged(root: Path, trials: int, rng: np.random.Generator) -> dict[str, int]:
    """Damage the newer of two steps `trials` times: how often that was seen, and the older one was used."""
    values = np.random.default_rng(1).normal(size=(2, 2000)).astype(np.float32)
    with Checkpoints(root / "good") as checkpoints:
        for n in range(2):
            checkpoints.save({"w": values[n]}, n)
    kinds = list(damages(root / "good" / "1", rng, flips=2 + trials // 12))
    template = {"w": jax.ShapeDtypeStruct((2000,), np.float32)}
    seen = 0
    for i in rng.permutation(len(kinds))[:trials]:
        copy = shutil.copytree(root / "good", root / "copy")
        kinds[i].apply(copy / "1")
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            tree, _ = Checkpoints(copy).restore(template)
        fell_back = any("Falling back to step 0" in str(w.message) for w in said)
        if fell_back and np.array_equal(tree["w"], values[0]):
            seen += 1
        else:
            print(f"not seen: {kinds[i].name}")
        shutil.rmtree(copy)
    return {"damages": min(trials, len(kinds)), "seen": int(seen)}


def dead_at_a_file_operation(run: Run, rng: np.random.Generator) -> None:
    """End it before or after one of its renames, syncs and deletions: in a save, between two, or in a deletion."""
    run.start(functools.partial(Events, int(rng.integers(1, 40 * STEPS // EVERY))))
    if run.end() != 9:  # it had ended before
        shutil.rmtree(run.directory)
        dead_at_a_file_operation(run, rng)


def attempt(run: Run, interrupt: Callable[[Run], list[str] | None], wanted: tuple[bytes, str]) -> list[str]:
    """Interrupt a run and let it finish; returns what went wrong."""
    wrong = interrupt(run) or []
    wrong += [] if run.finish() == wanted else ["the log or the state is not the same"]
    shutil.rmtree(run.directory)
    return wrong


def trials(root: Path, count: int, rng: np.random.Generator) -> bool:
    """Print one line for each kind of trial; returns whether all passed."""
    wanted, passed = Run(root, "whole").finish(), True
    numbers = itertools.cycle((signal.SIGTERM, signal.SIGINT))
    kinds: dict[str, tuple[int, Callable[[Run], list[str] | None]]] = {
        "killed twice at random instants": (count, lambda run: killed(run, rng)),
        "killed at a file operation": (max(1, count * 7 // 10), lambda run: dead_at_a_file_operation(run, rng)),
        "one signal": (max(2, count // 5), lambda run: signalled(run, rng, next(numbers), again=False)),
        "two signals": (max(1, count // 5), lambda run: signalled(run, rng, next(numbers), again=True)),
    }
    for name, (number, interrupt) in kinds.items():
        good = 0
        for i in range(number):
            wrong = attempt(Run(root, f"{name} {i}"), interrupt, wanted)
            good += not wrong
            if wrong:
                print(f"{name} {i}: {'; '.join(wrong)}", flush=True)
        print(f"{name}: {good} of {number} passed", flush=True)
        passed &= good == number
    out = root / "damages"
    os.waitpid(fork(lambda: 0 * out.write_text(json.dumps(damaged(root, 10 * count, rng))), root / "words"), 0)
    made, seen = json.loads(out.read_text()).values()
    print((root / "words").read_text(), end="")
    print(f"damages to a step: {seen} of {made} seen, and the step before used", flush=True)
    return passed and seen == made


def quick(folder: str) -> None:
    """Have everything compiled kept in `folder`, and write no curves: each process lives for seconds only."""
    jax.config.update("jax_compilation_cache_dir", os.environ.get("JAX_COMPILATION_CACHE_DIR", folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    workdir._tensorboard = lambda path, step: None
    job.use_compile_cache = lambda: None


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=100, help="of SIGKILL; the others in proportion")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None  # a kill loses nothing written, here or there
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        quick(f"{folder}/cache")
        passed = trials(Path(folder), args.trials, np.random.default_rng(args.seed))
    sys.exit(not passed)


if __name__ == "__main__":
    main()
