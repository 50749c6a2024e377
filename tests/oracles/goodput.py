"""Goodput: how much of the wall time of a run that is killed again and again moves it on.

    python -m tests.oracles.goodput --minutes 16 --every 300

    lost      from a kill until the run, started at once by the same command, is again at the step where it was killed
    goodput = 1 - sum lost / wall time
    blocked = time that the loop spends in saving / (wall time - sum lost)

The run is --config=swissroll as it is, but that it does not end. The time before its first line of the log, with the
only compilation, is not counted.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments import cli
from experiments import train as job
from experiments.saving import Saver

CHILD = "from tests.oracles import goodput; goodput.train()"
SAVES = "saves.jsonl"


def train() -> None:
    """The command of the training, which also writes down how long each save holds it up."""
    save = Saver.save

    def timed(self: Saver, carry: Any, done: int, **options: Any) -> None:
        started = time.perf_counter()
        save(self, carry, done, **options)
        with (self.checkpoints.directory.parent / SAVES).open("a") as file:
            file.write(json.dumps({"step": done, "seconds": time.perf_counter() - started}) + "\n")

    Saver.save = timed
    cli.main(job.run)


class Run:
    """The process of a run, started again where it has been killed."""

    def __init__(self, workdir: Path):
        self.workdir, self.log = workdir, workdir / "metrics.jsonl"
        self.start()

    def start(self) -> None:
        """Give it a life."""
        argv = ["--config=swissroll", "--config.train.steps=100000000", f"--workdir={self.workdir}"]
        words = (self.workdir.parent / "words").open("a")
        self.process = subprocess.Popen([sys.executable, "-c", CHILD, *argv], stdout=words, stderr=words)

    def step(self) -> int:
        """The last one in the log."""
        lines = self.log.read_bytes()[-4096:].split(b"\n") if self.log.exists() else []
        return json.loads(lines[-2])["step"] if len(lines) > 1 else 0

    def wait_until(self, true: Callable[[], bool]) -> float:
        """When that became so."""
        while not true():
            if self.process.poll() is not None:
                raise RuntimeError(f"it ended:\n{(self.workdir.parent / 'words').read_text()}")
            time.sleep(0.01)
        return time.monotonic()

    def so_far(self) -> float:
        """The processor time that this life has used."""
        times = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        return sum(map(int, times)) / os.sysconf("SC_CLK_TCK")

    def killed(self) -> tuple[float, float, float]:
        """Kill it: the time until it moved again and until it was where it had been, and that of the processor."""
        step, old, then = self.step(), self.log.stat().st_ino, time.monotonic()
        self.process.kill()
        self.process.wait()
        self.start()
        self.wait_until(lambda: self.log.stat().st_ino != old)  # cut to what the checkpoint holds
        first = self.step()
        moved = self.wait_until(lambda: self.step() > first)
        return moved - then, self.wait_until(lambda: self.step() >= step) - then, self.so_far()


def measure(workdir: Path, seconds: float, every: float) -> None:
    """Print what there is to know."""
    run, lost = Run(workdir), []
    started = run.wait_until(lambda: run.step() > 0)
    for n in range(1, int(seconds / every) + 1):
        time.sleep(max(0.0, started + n * every - time.monotonic()))
        lost.append(run.killed())
        moved, back, spent = lost[-1]
        print(
            f"kill {n}: moves after {moved:.1f} s, is back after {back:.1f} s ({spent:.1f} of the processor)",
            flush=True,
        )
    time.sleep(max(0.0, started + seconds - time.monotonic()))
    run.process.send_signal(signal.SIGTERM)
    status, wall = run.process.wait(), time.monotonic() - started
    saves = [json.loads(line)["seconds"] for line in (workdir / SAVES).read_text().splitlines()]
    dead, spent = sum(back for _, back, _ in lost), sum(spent for _, _, spent in lost)
    print(f"{run.step()} steps, {len(saves)} saves, {len(lost)} kills in {wall:.0f} s; ended with {status}")
    print(f"goodput: {1 - dead / wall:.4f}; at one such kill every 300 s: {1 - dead / len(lost) / 300:.4f}")
    print(f"and where nothing else ran, as far as processor time tells: {1 - spent / len(lost) / 300:.4f}")
    share, median = sum(saves) / (wall - dead), 1e3 * sorted(saves)[len(saves) // 2]
    print(f"blocked by saves: {share:.4f} of the time; {median:.0f} ms in the median, {max(saves):.1f} s at most")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=16)
    parser.add_argument("--every", type=float, default=300, help="seconds from kill to kill")
    args = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ["TQDM_DISABLE"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{folder}/cache")
        measure(Path(folder) / "run", 60 * args.minutes, args.every)


if __name__ == "__main__":
    main()
