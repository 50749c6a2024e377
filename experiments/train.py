"""Train a diffusion model: one config, one directory, resumed by itself.

python -m experiments.train --config=emoji
python -m experiments.train --config=cifar10 --workdir=runs/a --config.train.batch_size=64
"""

import argparse
import contextlib
import ctypes
import signal
import sys
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from experiments import check, cli, finetune, inputs, launch, pictures, workdir
from experiments import model as models
from experiments.configs import Config
from experiments.job import Job
from experiments.saving import Saver, tolerated
from experiments.tuning import Tuned
from jaxdiff import data, train
from jaxdiff.errors import DataError
from jaxdiff.train import checkpoint, hosts


class Stop:
    """Remembers the first Ctrl-C or SIGTERM, so that training can save and leave; the second one acts at once."""

    def __init__(self, watch: hosts.Watch) -> None:
        self.watch = watch
        self.signal: int | None = None
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> "Stop":
        for number in (signal.SIGINT, signal.SIGTERM):
            self.previous[number] = signal.signal(number, self._take)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def agreed(self) -> int | None:
        """The signal for which all processes stop now; call it once a step."""
        self.signal = self.watch.agree(self.signal)
        return self.signal

    def _take(self, number: int, _: object) -> None:
        self.signal = number
        tqdm.write("stopping: saving after this step; press again to leave without")
        self.__exit__()


@jax.jit
def _accumulate(window: dict[str, Any], metrics: dict[str, Any]) -> dict[str, Any]:
    """Add the (k, ...) metrics of one call to the sums, step by step; those of a bad step are left out."""
    steps = {"steps": jnp.ones_like(metrics["loss"])} | {k: metrics[k] for k in window if k != "steps"}

    def add(total: dict[str, Any], one: dict[str, Any]) -> tuple[dict[str, Any], None]:
        good = jnp.isfinite(one["loss"]) & jnp.isfinite(one["grad_norm"])
        return jax.tree.map(lambda t, x: jnp.where(good, t + x, t), total, one), None

    return jax.lax.scan(add, window, steps)[0]


def _line(window: dict[str, Any], bad_steps: int) -> dict[str, Any]:
    """The averages since the last line: loss, its parts, grad_norm, or loss per bucket (null where none fell in it)."""
    w = {k: np.asarray(v, np.float64) for k, v in window.items()}
    line: dict[str, Any] = {"loss": None, "grad_norm": None, "bad_steps": bad_steps}
    line |= {k: _ratio(v, w["steps"]) for k, v in w.items() if not v.ndim and k != "steps"}
    if "bucket_sum" in w:
        buckets = zip(w["bucket_sum"], w["bucket_count"], strict=True)
        line["loss_per_logsnr"] = [_ratio(total, count) for total, count in buckets]
    return line


def _ratio(total: np.ndarray, count: np.ndarray) -> float | None:
    """total / count, or None, JSON's null, for 0 / 0."""
    return float(total / count) if count else None


def fit(job: Job, watch: hosts.Watch) -> int:
    """Train to the last step, or until a signal. Returns the exit status: 0, or 128 + the signal's number."""
    c = job.config.train
    with checkpoint.Checkpoints(job.directory / "checkpoints", keep=c.keep, every=c.checkpoint_every) as checkpoints:
        checkpoints.prepare()
        print(job.describe())
        job.prepare()
        done, carry = _start(job, checkpoints)
        where = None if launch.speaks() else sys.stdout  # which leads nowhere in the other processes
        bar = tqdm(total=c.steps, initial=done, unit="step", dynamic_ncols=True, file=where)
        with bar, launch.log(job.directory, done) as log, Stop(watch) as stop:
            done = _loop(job, carry, done, Saver(checkpoints, job.meta, done), log, stop, bar)
    if stop.signal is not None and done < c.steps:
        print(f"stopped at step {done}, saved in {job.directory}. The same command resumes from there.")
        return 128 + stop.signal
    print(f"done: step {done}. {job.ended()}")
    return 0


def _start(job: Job, checkpoints: checkpoint.Checkpoints) -> tuple[int, dict[str, Any]]:
    """The newest checkpoint, or fresh parameters."""
    if checkpoints.latest() is None:
        return 0, job.fresh()
    carry = _restore(job, checkpoints, checkpoints.steps())
    done = int(carry["state"].step)
    print(f"resuming from step {done} of {job.config.train.steps}")
    return done, carry


def _restore(job: Job, checkpoints: checkpoint.Checkpoints, among: Sequence[int]) -> dict[str, Any]:
    """The newest sound checkpoint among those: each device is given only its own share."""
    shardings = train.mesh.state_sharding(job.mesh, job.abstract)
    carry, meta = checkpoints.restore(
        jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), job.abstract, shardings),
        among=among,
    )
    if "config" in meta:  # a checkpoint carried here from another run may have the same shapes
        workdir.check_same(job.directory / "checkpoints", meta["config"], job.meta["config"])
    return carry


def _go_back(job: Job, state: Any, end: int, saver: Saver) -> dict[str, Any]:
    """The carry at step `end`, where the gradients are in trouble, with the parameters of the last good checkpoint.

    Only those at a multiple of checkpoint_every count, which every run makes, whenever it was interrupted: so the
    repeated run goes back to the same one.
    """
    saver.wait(end)
    steps, every = saver.checkpoints.steps(), job.config.train.checkpoint_every
    among = [step for step in steps if step < end and step % every == 0]
    good = _restore(job, saver.checkpoints, among) if among else job.fresh()
    tqdm.write(
        f"the gradients are not finite before step {end}: back to the parameters of step {int(good['state'].step)}, "
        "and on with the data that follow"
    )
    state = train.roll_back(good["state"], state, end)
    carry = {"state": state, "window": jax.tree.map(jnp.zeros_like, good["window"])}
    return jax.device_put(carry, train.mesh.state_sharding(job.mesh, carry))


def _make_step(job: Job, steps_per_call: int) -> Any:
    return train.make_step(
        job.model.loss,
        models.optimizer(job.config),
        key=job.key_train,
        ema=models.averages(job.config),
        accumulate=job.config.train.accumulate,
        steps_per_call=steps_per_call,
        get_batch=inputs.take,
        summary=job.model.summary,
        mesh=job.mesh,
    )


def _loop(job: Job, carry: dict[str, Any], done: int, saver: Saver, log: workdir.Log, stop: Stop, bar: tqdm) -> int:
    c, k = job.config.train, check.steps_per_call(job.config, done)
    step, rows = _make_step(job, k), train.mesh.place(job.rows, train.mesh.replicated(job.mesh))
    frozen = jax.tree.map(train.mesh.place, job.model.frozen, train.mesh.state_sharding(job.mesh, job.model.frozen))
    feed, draw = _feed(job, done, k), jax.jit(job.sampler, out_shardings=train.mesh.replicated(job.mesh))
    unheard, first, stopping, since = [], True, False, (time.perf_counter(), done)
    tqdm.write("compiling the training step, which can take a minute; Ctrl-C is answered after it")
    while done < c.steps and not stopping:
        try:
            batches = next(feed)
        except DataError:  # too many pictures that cannot be read, found only now
            if not hosts.started() and _trouble(unheard, ahead=0) is None:  # other processes know nothing of it
                saver.save(carry, done)
                saver.wait(done)
            raise
        state, metrics = step(carry["state"], batches, rows, frozen if isinstance(job.model, Tuned) else None)
        carry = {"state": state, "window": _accumulate(carry["window"], metrics)}
        done += k
        unheard.append((done, metrics["trouble"]))
        if first:
            first, since = False, _first_call(bar, metrics, since, k)
        stopping = stop.agreed() is not None
        end = _trouble(unheard, ahead=0 if stopping or any(_due(c, done).values()) else 1)
        if end is not None:
            carry, done, unheard = _go_back(job, carry["state"], end, saver), end, []
            feed, since = _feed(job, done, k), (time.perf_counter(), done)
        bar.update(done - bar.n)
        due = _due(c, done)
        if due["log"]:
            line = _line(carry["window"], int(carry["state"].bad_steps))
            carry["window"] = jax.tree.map(jnp.zeros_like, carry["window"])
            log.write("metrics", done, line)
            since = _speed(log, bar, line, done, since, c.batch_size)
        if due["sample"]:
            started = time.perf_counter()
            save_grid(job, draw, carry["state"].ema_params["ema"] | frozen, done)
            since = since[0] + time.perf_counter() - started, since[1]
        if stopping or due["checkpoint"]:
            saver.save(carry, done, last=stopping or done == c.steps)
    return done


def _feed(job: Job, done: int, steps: int) -> Generator[dict[str, Any]]:
    """What each call is given, from step `done` on; of streamed pictures every process reads its own rows alone."""
    c, reading = job.config, {name: job.config.data[name] for name in ("ahead", "workers")}
    size = c.train.batch_size
    alone = "image" in job.rows or not hosts.started()
    rows = slice(None) if alone else train.mesh.own_rows(job.mesh, size)
    sizes: Any = {"seed": c.seed, "batch_size": size, "steps": steps}
    feed = inputs.batches(job.examples, step=done, along=job.along, **sizes, **reading, rows=rows, faults=job.faults)
    with contextlib.closing(feed):
        for batch in feed:
            yield batch if alone else train.mesh.assemble(job.mesh, batch, size)


def _due(c: Config, done: int) -> dict[str, bool]:
    """What is to be done after step `done`; all of it after the last one."""
    every = {"log": c.log_every, "sample": c.sample_every, "checkpoint": c.checkpoint_every}
    return {name: done == c.steps or (steps > 0 and done % steps == 0) for name, steps in every.items()}


def _trouble(unheard: list[tuple[int, Any]], ahead: int) -> int | None:
    """Wait until the device is `ahead` calls behind, not more; returns the end of the first call in trouble."""
    while len(unheard) > ahead:
        end, trouble = unheard.pop(0)
        if np.any(trouble):
            return end
    return None


def _first_call(bar: tqdm, metrics: dict[str, Any], since: tuple[float, int], steps: int) -> tuple[float, int]:
    """Wait for it and say how long it took; speed, and the time left on the bar, are measured from here."""
    jax.block_until_ready(metrics)
    bar.initial = bar.last_print_n = bar.n = since[1] + steps
    bar.unpause()
    now = time.perf_counter()
    tqdm.write(f"first {steps} step(s), compilation included: {now - since[0]:.1f} s")
    return now, since[1] + steps


def _speed(
    log: workdir.Log, bar: tqdm, line: dict[str, Any], done: int, since: tuple[float, int], batch: int
) -> tuple[float, int]:
    """Show and log the speed since (time, step) `since`; returns the new one."""
    now, steps = time.perf_counter(), done - since[1]
    text = f"loss {line['loss']:.4f}" if line["loss"] is not None else "loss not finite"
    if steps:  # not after the first call alone, whose time is that of the compiler
        rate = steps * batch / (now - since[0])
        log.write("speed", done, {"images_per_second": rate, "seconds": now - since[0]})
        text += f", {rate:,.0f} images/s"
    if line["bad_steps"]:
        text += f", {line['bad_steps']} bad steps"
    bar.set_postfix_str(text)
    return now, done


def save_grid(job: Job, draw: Any, params: Any, done: int) -> None:
    """Draw the sample grid of the config with the averaged parameters, to samples/step_NNNNNNNN.png."""
    c = job.config.sample
    cond, words = models.grid_conditions(job.model, c.prompts, job.dataset, c.num)
    keys = jax.vmap(jax.random.key)(jnp.arange(c.seed, c.seed + c.num, dtype=jnp.uint32))
    x0 = draw(params, keys, cond, job.model.null(c.num))
    text = {"step": done, "conditions": words, "solver": c.solver, "steps": c.steps, "scale": c.scale, "seed": c.seed}
    path = job.directory / "samples" / f"step_{done:08d}.png"
    if not launch.speaks():
        return
    with tolerated(str(path)):
        data.save_png(path, pictures.sheet(x0, words), text)
        tqdm.write(f"samples: {path}")


def use_compile_cache() -> None:
    """Keep compiled programs between runs, in JAX_COMPILATION_CACHE_DIR or ~/.cache/jaxdiff: a restart is fast."""
    if not jax.config.values["jax_compilation_cache_dir"]:
        jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "jaxdiff" / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


def keep_memory() -> None:
    """Have glibc keep the memory that is freed: every step on a CPU asks for the same large buffers again.

    Given back to the system, they return page by page, which took a fifth of the processor time of training.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for option, value in ((-8, 1), (-4, 0), (-1, 2**31 - 1)):  # M_ARENA_MAX, M_MMAP_MAX, M_TRIM_THRESHOLD
            mallopt(option, value)


def run(argv: Sequence[str]) -> int:
    """The command line; returns the exit status."""
    parser = cli.Parser(
        prog="python -m experiments.train",
        description="Train a diffusion model. Started again with the same workdir, it resumes.",
        epilog="configs:\n" + cli.describe() + "\n\nAny field of a config: --config.train.batch_size=64. All fields "
        "and their meaning: experiments/configs/_base.py.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", default="emoji", help="a name below, or a path to a .py file (default: emoji)")
    parser.add_argument("--workdir", default="", help="where everything goes (default: runs/CONFIG)")
    launch.add_options(parser)
    config, args = cli.parse(parser, argv)
    keep_memory()
    use_compile_cache()
    with launch.joined(args, config) as watch:
        kind = finetune.Tuning if config.pretrained else Job
        job = kind(config, Path(args.workdir or Path("runs") / Path(args.config).stem))
        with launch.opened(job.directory, config, job.info, job.write_header):
            return fit(job, watch)


if __name__ == "__main__":
    cli.main(run)
