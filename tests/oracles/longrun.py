"""The promises of long runs, tried on real processes of `python -m experiments.train`, seen from outside.

    python -m tests.oracles.longrun                       about half an hour
    python -m tests.oracles.longrun --steps=500 --bits=20 --orphans=1

bits     200 steps in fresh processes, with 0, 1 and 2 data workers and 1, 4 and 16 batches read ahead, one of them with
         a worker killed on the way: the log and every leaf of the last checkpoint have the same bits
steady   10,000 steps for each of 0 and 2 workers: the training step is compiled once and nothing after the first steps;
         resident memory, threads and file descriptors stay where they were after a tenth of the steps
orphans  kill -9 of a run with two workers at a random instant: 5 s later none of its processes is there

The toy is a folder of 8 x 8 pictures, one of them damaged, streamed by Grain.
"""

import argparse
import collections
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mode

import numpy as np
from PIL import Image

from tests.oracles import reliability

ROOT = Path(__file__).parents[2]
CONFIG = """
from ml_collections import ConfigDict
from experiments.configs import folder

def get_config():
    c = folder.get_config()
    c.net = ConfigDict({"name": "dit", "patch_size": 4, "width": 8, "depth": 1, "heads": 1})
    c.condition, c.data.size, c.data.memory_gb = "label", 8, 0.0
    c.train.batch_size, c.train.steps_per_call, c.train.sample_every = 8, 5, 0
    c.train.log_every, c.train.checkpoint_every = 10, 100
    c.sample.num = c.sample.steps = 1
    return c
"""


def pictures(root: Path, count: int = 300) -> list[str]:
    """Write the toy, and return the arguments of a training on it."""
    rng = np.random.default_rng(0)
    for i in range(count):
        path = root / "pictures" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:80])
    (root / "toy.py").write_text(CONFIG)
    return [f"--config={root / 'toy.py'}", f"--config.data.path={root / 'pictures'}"]


def start(arguments: list[str], directory: Path) -> subprocess.Popen:
    """A training of its own; what it says goes beside its workdir."""
    settings = {"JAX_PLATFORMS": "cpu", "TQDM_DISABLE": "1", "JAX_LOG_COMPILES": "1", "PYTHONPATH": str(ROOT)}
    settings |= {"JAX_COMPILATION_CACHE_DIR": os.environ.get("JAX_COMPILATION_CACHE_DIR", f"{directory.parent}/cache")}
    command = [sys.executable, "-m", "experiments.train", *arguments, f"--workdir={directory}"]
    with directory.with_suffix(".txt").open("w") as out:
        return subprocess.Popen(command, stdout=out, stderr=out, env=os.environ | settings, cwd=directory.parent)


def said(directory: Path) -> str:
    """What the run of `directory` has printed."""
    return directory.with_suffix(".txt").read_text(errors="replace")


def logged(directory: Path) -> int:
    """The last step in its log."""
    log = directory / "metrics.jsonl"
    lines = log.read_bytes().split(b"\n") if log.exists() else []
    return json.loads(lines[-2])["step"] if len(lines) > 1 else 0


def processes() -> dict[int, tuple[int, str]]:
    """The parent and the command of every process that runs."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, parent = (folder / "stat").read_text().rsplit(")", 1)[1].split()[:2]
            if state != "Z":
                found[int(folder.name)] = int(parent), (folder / "cmdline").read_text().replace("\0", " ")
        except OSError:
            continue
    return found


def family(pid: int) -> set[int]:
    """The processes below `pid`, at any depth."""
    everyone, found, new = processes(), set(), {pid}
    while new:
        new = {child for child, (parent, _) in everyone.items() if parent in new}
        found |= new
    return found


def workers(pid: int) -> list[int]:
    """The data workers of the process `pid`."""
    return [child for child, (parent, words) in processes().items() if parent == pid and "spawn_main" in words]


def finish(run: subprocess.Popen, directory: Path) -> None:
    """Wait for a run that should succeed."""
    if run.wait():
        raise RuntimeError(f"{directory.name} ended with {run.returncode}:\n{said(directory)[-3000:]}")


def result(directory: Path) -> tuple[bytes, str]:
    """The log, and a digest of the last checkpoint's leaves."""
    return (directory / "metrics.jsonl").read_bytes(), reliability.digest(directory)


@dataclasses.dataclass(frozen=True)
class Reading:
    """How the pictures of a run are read."""

    workers: int
    ahead: int
    killed: bool = False

    @property
    def arguments(self) -> list[str]:
        return [f"--config.data.workers={self.workers}", f"--config.data.ahead={self.ahead}"]


READINGS = [Reading(0, 16), Reading(0, 1), Reading(1, 4), Reading(2, 1), Reading(2, 16), Reading(2, 4, killed=True)]


def same_bits(root: Path, toy: list[str], steps: int, readings: list[Reading]) -> bool:
    """Whether all readings end in the same bits."""
    found = collections.defaultdict(list)
    for i, reading in enumerate(readings):
        directory = root / f"bits{i}"
        run = start([*toy, *reading.arguments, f"--config.train.steps={steps}"], directory)
        while reading.killed and run.poll() is None:
            if logged(directory) >= steps // 4 and workers(run.pid):
                os.kill(workers(run.pid)[0], signal.SIGKILL)
                break
            time.sleep(0.001)
        finish(run, directory)
        if reading.killed and "started again" not in said(directory):
            print("note: the worker was killed too late to be missed")
        found[result(directory)].append(reading)
    print(f"bits: {len(readings)} runs of {steps} steps end in {len(found)} result(s):")
    print(*found.values(), sep="\n", flush=True)
    return len(found) == 1


@dataclasses.dataclass(frozen=True)
class Sample:
    """What a run is using at one moment."""

    step: int
    resident: float  # MiB
    threads: int
    files: int
    compiled: int


def sample(pid: int, directory: Path) -> Sample | None:
    """Look at a run; None when it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        files = len(os.listdir(f"/proc/{pid}/fd"))
        resident, threads = (int(re.search(rf"{name}:\s+(\d+)", status)[1]) for name in ("VmRSS", "Threads"))
    except (OSError, TypeError):
        return None
    return Sample(logged(directory), resident / 1024, threads, files, len(compiled(directory)))


def compiled(directory: Path) -> list[str]:
    """The names of the programs that a run has compiled, in their order."""
    return re.findall(r"Finished XLA compilation of (?:jit\()?([\w<>.]+)", said(directory))


def steady(root: Path, toy: list[str], steps: int, count: int) -> bool:
    """Whether a long run with `count` workers stays as it is after its first tenth."""
    directory, samples = root / f"steady{count}", []
    every = [f"--config.train.{name}={max(10, steps // 20)}" for name in ("log_every", "checkpoint_every")]
    began = time.monotonic()
    run = start([*toy, *every, f"--config.train.steps={steps}", f"--config.data.workers={count}"], directory)
    while run.poll() is None:
        now = sample(run.pid, directory)
        samples += [now] if now and steps // 10 <= now.step < steps else []
        time.sleep(0.05)
    finish(run, directory)
    print(f"steady: {steps} steps with {count} workers, {time.monotonic() - began:.0f} s, {len(samples)} looks")
    return steady_samples(samples, compiled(directory))


def steady_samples(samples: list[Sample], programs: list[str]) -> bool:
    """Print what a long run used after its first tenth; returns whether it was steady.

    A checkpoint being written takes threads and files for as long as that lasts, and batches that workers have ready
    are files; so what counts is the usual number of them in the first fifth of the looks and in the last, and that the
    largest does not grow by a tenth.
    """
    resident = [one.resident for one in samples]
    first, last = samples[: len(samples) // 5], samples[-(len(samples) // 5) :]
    passed = max(resident) - min(resident) <= 32 and samples[0].compiled == samples[-1].compiled
    print(f"  resident memory {min(resident):.1f} to {max(resident):.1f} MiB")
    for what in ("threads", "files"):
        usual, most = ([of([getattr(one, what) for one in part]) for part in (first, last)] for of in (mode, max))
        passed &= usual[0] == usual[1] and most[1] <= 1.1 * most[0]
        print(f"  {what} between saves: {usual[0]} at first, {usual[1]} at last; in a save {most[0]}, {most[1]}")
    own, late = programs[: samples[0].compiled], samples[-1].compiled - samples[0].compiled
    print(f"  compiled: {len(own)} programs, the step {own.count('run')} time(s); after the first tenth: {late}")
    sys.stdout.flush()
    return passed and own.count("run") == 1


def orphans(root: Path, toy: list[str], trials: int, rng: np.random.Generator) -> bool:
    """Whether nothing is left of a run 5 s after it was killed."""
    left = set()
    for i in range(trials):
        directory = root / f"orphans{i}"
        run = start([*toy, "--config.data.workers=2", "--config.train.steps=100000"], directory)
        while (not workers(run.pid) if i % 2 else logged(directory) == 0) and run.poll() is None:
            time.sleep(0.01)  # until its workers begin to import what they need, or until it trains
        time.sleep(rng.uniform(0, 2))
        step, below = logged(directory), family(run.pid)
        run.kill()
        run.wait()
        time.sleep(5)
        still = processes()
        left |= below & set(still)
        print(f"orphans: killed after step {step}, {len(below)} processes below it, {len(below & set(still))} left")
        print(*(still[pid][1] for pid in below & set(still)), sep="\n", end="", flush=True)
    for pid in left & set(processes()):
        os.kill(pid, signal.SIGKILL)
    return not left


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000, help="of the steady runs; 0 = none")
    parser.add_argument("--bits", type=int, default=200, help="steps of the runs that are compared; 0 = none")
    parser.add_argument("--readings", type=int, default=len(READINGS), help="how many of them")
    parser.add_argument("--orphans", type=int, default=10, help="runs that are killed")
    args = parser.parse_args()
    passed = True
    with tempfile.TemporaryDirectory() as folder:
        toy = pictures(Path(folder))
        if args.bits:
            passed &= same_bits(Path(folder), toy, args.bits, READINGS[-args.readings :])
        passed &= orphans(Path(folder), toy, args.orphans, np.random.default_rng(0))
        for count in (0, 2) if args.steps else ():
            passed &= steady(Path(folder), toy, args.steps, count)
    sys.exit(not passed)


if __name__ == "__main__":
    main()
