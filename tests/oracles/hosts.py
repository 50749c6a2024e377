"""Many devices and many hosts, tried: real meshes, real processes, real kills.

    python -m tests.oracles.hosts --trials 6

    meshes    a U-Net, 200 steps on 8 devices against 1; saved on 8, restored on 1, 2 and 4, and back
    hosts     two processes of two devices each, over loopback, against one process of four; one of the two killed or
              halted at a random instant, or sent a signal; both started again by the same command

The devices are those that XLA makes of one CPU. A trial passes where the one that lives ends by itself within 60 s,
with its status and the name of the other, and where the run that went on has every bit of the one left alone.
"""

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

import jaxdiff as jd
from experiments import workdir
from jaxdiff import nets, train
from jaxdiff.train import Checkpoints
from tests.oracles import reliability

MESHES = {"data": (8, 1, 1), "fsdp": (1, 8, 1), "data x tensor": (2, 1, 4), "data x fsdp x tensor": (2, 2, 2)}
STEPS, BATCH = 200, 16
PORTS = 2**16 - 2**12  # JAX takes PORTS + the job's number mod 2^12
TOY = [
    "--config=swissroll", "--config.net.width=64", "--config.net.depth=1", "--config.train.batch_size=16",
    "--config.train.steps_per_call=1", "--config.train.log_every=5", "--config.train.sample_every=0",
    "--config.sample.num=16", "--config.sample.steps=2", "--config.data.points=100", "--config.mesh.fsdp=2",
    "--config.optimizer.decay=constant", "--config.train.checkpoint_every=20",
]  # fmt: skip


class Training:
    """A network trained by the real step: the same numbers on any mesh."""

    def __init__(self, net: Any, shape: tuple[int, ...] = (8, 8, 3)):
        self.shape, self.net, self.optimizer = shape, net, train.adam(1e-3, clip_norm=1.0)
        rng = np.random.default_rng(0)
        self.data = rng.uniform(-1, 1, (256, *shape)).astype(np.float32)
        self.rows = rng.integers(0, 256, (STEPS, 1, BATCH)).astype(np.int32)

    def init(self) -> Any:
        """The state before the first step."""
        params = self.net.init(jax.random.key(0), jnp.zeros((1, *self.shape)), jnp.zeros((1,)))
        return train.create_state(params, self.optimizer, ema={"ema": 0.99})

    def loss(self, params: Any, key: Any, x0: Any) -> Any:
        """The squared error of v."""
        schedule, target = jd.schedule.cosine(), jd.target.v
        return jd.loss.diffusion(
            key, lambda x, t: self.net.apply(params, x, t), x0, schedule=schedule, target=target
        ), {}

    def run(self, sizes: tuple[int, int, int], *, steps: int = STEPS, accumulate: int = 1) -> tuple[Any, np.ndarray]:
        """The state after `steps` steps on a mesh of those sizes, and the losses."""
        mesh = train.mesh.make(*sizes, devices=jax.devices()[: np.prod(sizes)])
        step = train.make_step(
            self.loss, self.optimizer, key=jax.random.key(1), ema={"ema": 0.99}, mesh=mesh, accumulate=accumulate
        )
        state, losses = train.mesh.born_sharded(mesh, self.init), []
        data = train.mesh.place(self.data, train.mesh.replicated(mesh))
        for rows in self.rows[:steps]:
            state, metrics = step(state, rows, data)
            losses.append(float(metrics["loss"][0]))
        return state, np.array(losses)


def distance(one: Any, other: Any) -> float:
    """The largest difference between two trees."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return max(float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in pairs)


def restored(init: Callable[[], Any], sizes: tuple[int, int, int], fewer: tuple[int, int, int], folder: Path) -> bool:
    """Whether a state saved on one mesh is the same after a restore on the second, and after one back on the first."""
    meshes = [train.mesh.make(*s, devices=jax.devices()[: np.prod(s)]) for s in (sizes, fewer)]
    first = state = train.mesh.born_sharded(meshes[0], init)
    for step, mesh in enumerate((meshes[1], meshes[0])):
        with Checkpoints(folder) as checkpoints:
            checkpoints.save(state, step)
        state, _ = Checkpoints(folder).restore(train.mesh.template(mesh, init))
        placed = jax.tree.map(lambda leaf: leaf.sharding, state) == train.mesh.state_sharding(mesh, state)
        same = jax.tree.map(lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes(), first, state)
        if not (placed and all(jax.tree.leaves(same))):
            return False
    return True


def fewer(sizes: tuple[int, int, int], count: int) -> tuple[int, int, int]:
    """The mesh of `count` devices with the same axes, as far as they go: the last ones first."""
    tensor = min(sizes[2], count)
    fsdp = min(sizes[1], count // tensor)
    return count // tensor // fsdp, fsdp, tensor


def free_port() -> int:
    """One that nobody listens on, among those that SLURM's job numbers lead to."""
    for port in np.random.default_rng().permutation(np.arange(PORTS, 2**16)).tolist():
        with contextlib.suppress(OSError), socket.socket() as free:
            free.bind(("127.0.0.1", port))
            return port
    raise RuntimeError("no free port")


class Pair:
    """A run of two processes of two devices each, in a directory; started again, it resumes."""

    def __init__(self, directory: Path, *extra: str):
        self.directory, self.extra, self.processes = directory, extra, []
        self.words = [directory.with_name(f"{directory.name}.{i}.txt") for i in range(2)]

    def start(self, count: int = 2, devices: int = 2, *, slurm: bool = False) -> None:
        """Start the processes: by explicit arguments, or as SLURM would; one alone needs neither."""
        environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "TQDM_DISABLE": "1"}
        environment["JAX_COMPILATION_CACHE_DIR"] = str(jax.config.values["jax_compilation_cache_dir"])
        port = free_port()
        self.processes = []
        for i in range(count):
            joined = [f"--coordinator=127.0.0.1:{port}", f"--num_processes={count}", f"--process_id={i}"]
            if slurm:
                joined = ["--distributed"]
                environment |= {"SLURM_JOB_ID": f"{port - PORTS}", "SLURM_STEP_NODELIST": "127.0.0.1"}
                environment |= {"SLURM_NTASKS": f"{count}", "SLURM_PROCID": f"{i}", "SLURM_LOCALID": f"{i}"}
            command = [sys.executable, "-m", "experiments.train", *TOY, *self.extra, f"--workdir={self.directory}"]
            command += joined if count > 1 else []
            with self.words[i].open("w") as words:
                self.processes.append(subprocess.Popen(command, env=environment, stdout=words, stderr=words))

    def saved(self) -> int:
        """The newest step that is saved."""
        folder = self.directory / "checkpoints"
        return max((int(path.name) for path in folder.glob("*") if path.name.isdecimal()), default=0)

    def wait_for(self, step: int, patience: float = 900) -> None:
        """Until that step is saved, or a process has ended."""
        end = time.monotonic() + patience
        while self.saved() < step and all(p.poll() is None for p in self.processes) and time.monotonic() < end:
            time.sleep(0.01)

    def end(self, patience: float = 900) -> list[int]:
        """The statuses, once all have ended; who does not is killed."""
        deadline = time.monotonic() + patience
        for process in self.processes:
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
        return [process.wait() for process in self.processes]

    def log(self) -> list[dict[str, Any]]:
        """The lines of its log."""
        return [json.loads(line) for line in (self.directory / "metrics.jsonl").read_text().splitlines()]

    def params(self) -> Any:
        """The parameters it ended with."""
        config, _ = workdir.load(self.directory)
        abstract = reliability.job.Job(config, self.directory).abstract
        return Checkpoints(self.directory / "checkpoints").restore(abstract)[0]["state"].params

    def said(self, i: int) -> str:
        """The words of one process."""
        return self.words[i].read_text()


def interrupted(pair: Pair, rng: np.random.Generator, number: int, which: int) -> tuple[list[str], float]:
    """Send a signal to one of the two, SIGSTOP for one that hangs; what went wrong, and how long the other lived."""
    pair.start()
    pair.wait_for(20 * int(rng.integers(1, 4)))
    time.sleep(rng.uniform(0, 0.5))
    pair.processes[which].send_signal(number)
    sent = time.monotonic()
    with contextlib.suppress(subprocess.TimeoutExpired):
        pair.processes[1 - which].wait(300)
    took = time.monotonic() - sent
    if number == signal.SIGSTOP:
        pair.processes[which].kill()
    statuses = pair.end(patience=300)
    if number in (signal.SIGKILL, signal.SIGSTOP):
        wrong = [] if statuses[1 - which] == 75 else [f"statuses {statuses}"]
        wrong += [] if f"HostError: process {which}" in pair.said(1 - which) else ["the other does not name it"]
        wrong += [] if took < 60 else [f"the other lived for {took:.0f} s"]
    else:
        wrong = [] if statuses == [128 + number] * 2 else [f"statuses {statuses}"]
    return wrong, took


def try_meshes(root: Path) -> bool:
    """Print a line for each mesh; returns whether all passed."""
    training = Training(nets.small(channels=32, multipliers=(1,), attention_levels=(0,), groups=8, head_channels=8))
    alone, losses = training.run((1, 1, 1))
    good, passed = 0, True
    for name, sizes in MESHES.items():
        state, others = training.run(sizes)
        first, params = abs(others - losses)[0], distance(alone.params, state.params)
        passed &= bool(first <= 1e-6 and params <= 1e-4)
        print(f"8 devices against 1, {name} {sizes}: first loss {first:.1e}, parameters {params:.1e}", flush=True)
        folders = {count: root / f"{name} {count}" for count in (1, 2, 4)}
        good += sum(restored(training.init, sizes, fewer(sizes, count), folder) for count, folder in folders.items())
    print(f"saved on 8, restored on 1, 2, 4, and back: {good} of 12 bit-exact", flush=True)
    return passed and good == 12


def try_hosts(root: Path, trials: int, rng: np.random.Generator) -> bool:
    """Print a line for each kind of trial; returns whether all passed."""
    steps = "--config.train.steps=100"
    pairs = [Pair(root / name, steps) for name in ("one process", "two processes")]
    for count, pair in enumerate(pairs, 1):
        pair.start(count, 4 // count)
        if any(pair.end()):
            raise RuntimeError(pair.said(0))
    losses = [np.array([line["loss"] for line in pair.log()]) for pair in pairs]
    apart, params = abs(losses[0] - losses[1]).max(), distance(*(pair.params() for pair in pairs))
    passed = bool(apart <= 1e-6 and params <= 1e-4)
    print(f"two processes against one, 100 steps: losses {apart:.1e}, parameters {params:.1e}", flush=True)
    wanted = pairs[1].log(), reliability.digest(pairs[1].directory)
    numbers = [signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM, signal.SIGINT]
    good, longest = 0, 0.0
    for i in range(trials):
        pair, number = Pair(root / f"trial {i}", steps), numbers[i // 2 % 4]
        wrong, took = interrupted(pair, rng, number, i % 2)
        longest = max(longest, took if number in (signal.SIGKILL, signal.SIGSTOP) else 0)
        pair.start()
        if any(pair.end()):
            wrong.append(f"the resumed run failed: {pair.said(0)[-500:]}")
        elif (pair.log(), reliability.digest(pair.directory)) != wanted:
            wrong.append("the log or the state is not the same")
        good += not wrong
        print(
            f"trial {i}, signal {number} to process {i % 2}, {took:.1f} s: {'; '.join(wrong) or 'passed'}", flush=True
        )
    print(f"interrupted, resumed, the same bits: {good} of {trials}; killed or halted, noticed in {longest:.1f} s")
    return passed and good == trials


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=8, help="interruptions of a run of two processes")
    parser.add_argument("--part", choices=["meshes", "hosts", "both"], default="both")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 8)
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{folder}/cache")
        jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
        passed = args.part == "hosts" or try_meshes(Path(folder))
        passed &= args.part == "meshes" or try_hosts(Path(folder), args.trials, np.random.default_rng(args.seed))
    sys.exit(not passed)


if __name__ == "__main__":
    main()
