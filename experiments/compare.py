"""A VAE, a GAN and a diffusion model on the same data, with the same parameters and minutes: one table, one figure.

    python -m experiments.compare --minutes 2 --seeds 5                                     emoji at 16 x 16
    python -m experiments.compare --config=folder --config.data.path=DIR --minutes 30 --workdir runs/mine

A fifth of the pictures is held out. The rivals are the narrowest with at least the parameters of the config's
network; the minutes become numbers of steps once, from the times of a few steps of each, taken in turn, so
that a busy machine is busy for all. Every seed is another initialisation and order. Beside the models stand two floors:
the held-out pictures themselves, and draws from a Gaussian with the mean and covariance of the training pictures.
All are compared with the training pictures by as many samples as are held out, in the features of Inception where
--inception names its weights, else in the first 64 principal components of the training pictures; FD is the Frechet
distance there, and the FID only with the former.

What is done is kept: started again with the same --workdir, the command goes on. There it leaves compare.md,
compare.json, compare.png (rows of real pictures and of each model's), and one JSON file for each model and seed.
"""

import bisect
import dataclasses
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from experiments import check, cli, inputs, pictures, rivals, workdir
from experiments import model as models
from experiments.configs import Config
from experiments.train import keep_memory, use_compile_cache
from jaxdiff import data, metrics, train
from jaxdiff.errors import ConfigError

SHOWN = 12  # pictures of each model in the figure
COLUMNS = ("FD", "precision", "recall", "density", "coverage")


def diffusion(config: Config, info: dict[str, Any]) -> rivals.Rival:
    """The config's own model, sampled without guidance by its own solver."""
    model = models.build(config, info, None)
    draw = models.sampler(model, config.sample)
    c = config.optimizer
    adam = {"learning_rate": c.learning_rate, "b1": c.b1, "b2": c.b2}
    return rivals.Rival(model.init, model.loss, lambda params, keys: draw(params, keys, {}, {}), adam)


def size(rival: rivals.Rival) -> int:
    """How many parameters are trained."""
    return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(rival.init, jax.random.key(0))))


def as_large(make: Callable[..., rivals.Rival], target: int, shape: tuple[int, ...]) -> rivals.Rival:
    """The rival of the smallest width that has at least `target` parameters."""
    widths = range(1, 1024)
    place = bisect.bisect_left(widths, target, key=lambda width: size(make(width, shape)))
    return make(widths[min(place, len(widths) - 1)], shape)


@dataclasses.dataclass
class Contestant:
    """One model in training: `advance` makes one step, at a learning rate that falls to zero after `steps`."""

    rival: rivals.Rival
    config: Config
    images: np.ndarray
    steps: int
    seed: int

    def __post_init__(self) -> None:
        c = self.config.optimizer
        optimizer = train.adam(
            **self.rival.adam, warmup_steps=c.warmup, decay=c.decay, total_steps=self.steps, clip_norm=c.clip or None
        )
        key_init, key_train = jax.random.split(jax.random.key(self.seed))
        ema = models.averages(self.config)
        self.state = jax.jit(lambda: train.create_state(self.rival.init(key_init), optimizer, ema=ema))()
        self.step = train.make_step(self.rival.loss, optimizer, key=key_train, ema=ema)
        self.done = 0

    def advance(self) -> None:
        """One step."""
        size = self.config.train.batch_size
        rows = data.order(self.seed, self.done, batch_size=size, num_examples=len(self.images))
        self.state, _ = self.step(self.state, {"image": self.images[rows][None]})
        self.done += 1

    def draw(self, count: int, batch: int = 64) -> np.ndarray:
        """`count` samples of the averaged parameters, in [-1, 1]."""
        sample = jax.jit(self.rival.sample)
        keys = jax.vmap(jax.random.key)(jnp.arange(-(-count // batch) * batch, dtype=jnp.uint32))
        parts = [sample(self.state.ema_params["ema"], keys[i : i + batch]) for i in range(0, count, batch)]
        return np.concatenate(parts)[:count]


def pace(contestants: dict[str, Contestant], rounds: int = 5, steps: int = 4) -> dict[str, float]:
    """Seconds a step takes, the median over rounds in which all take their turn; compilation is left out."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for i in range(rounds + 1):
        for name, one in contestants.items():
            started = time.perf_counter()
            for _ in range(steps):
                one.advance()
            jax.block_until_ready(one.state)
            if i:
                times[name].append((time.perf_counter() - started) / steps)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


@dataclasses.dataclass(frozen=True)
class Judge:
    """The training pictures in features, and what samples are measured by."""

    features: Callable[[np.ndarray], np.ndarray]
    real: np.ndarray

    def measure(self, samples: np.ndarray) -> dict[str, float]:
        """The columns of the table for pictures in [-1, 1]. A model that makes NaN has infinite distance."""
        if not np.isfinite(samples).all():
            return dict.fromkeys(COLUMNS, 0.0) | {"FD": float("inf")}
        fake = self.features(np.clip(samples, -1, 1))
        stats = [metrics.stats.of(x) for x in (self.real, fake)]
        distance = {"FD": metrics.frechet(*stats, min_count=min(s.count for s in stats))}
        return distance | metrics.precision_recall(self.real, fake) | metrics.density_coverage(self.real, fake)


def principal(images: np.ndarray, count: int = 64) -> Callable[[np.ndarray], np.ndarray]:
    """The projection on the first `count` principal components of pictures (n, ...)."""
    flat = images.reshape(len(images), -1).astype(np.float64)
    _, _, axes = np.linalg.svd(flat - flat.mean(0), full_matrices=False)
    return lambda x: (x.reshape(len(x), -1) - flat.mean(0)) @ axes[:count].T


def gaussian(images: np.ndarray, count: int) -> np.ndarray:
    """Draws from the Gaussian fitted to pictures (n, ...) in [-1, 1], clipped to them."""
    flat = images.reshape(len(images), -1).astype(np.float64)
    centred = (flat - flat.mean(0)) / np.sqrt(len(flat) - 1)
    noise = np.random.default_rng(0).standard_normal((count, len(flat)))
    return np.clip(flat.mean(0) + noise @ centred, -1, 1).reshape(count, *images.shape[1:]).astype(np.float32)


def split(dataset: data.Dataset) -> tuple[np.ndarray, np.ndarray]:
    """(training pictures, held-out pictures): four fifths and one, the same for every run."""
    order = np.random.default_rng(0).permutation(len(dataset))
    cut = len(order) * 4 // 5
    return dataset.images[order[:cut]], dataset.images[order[cut:]]


def entrants(config: Config, info: dict[str, Any]) -> dict[str, rivals.Rival]:
    """The three models, of one size. Raises ConfigError for data that are no pictures."""
    rivals.check_shape(tuple(info["shape"]))
    ours = diffusion(config, info)
    shape, target = tuple(info["shape"]), size(ours)
    return {"VAE": as_large(rivals.vae, target, shape), "GAN": as_large(rivals.gan, target, shape), "diffusion": ours}


def plan(config: Config, entered: dict[str, rivals.Rival], images: np.ndarray, args: Any) -> dict[str, Any]:
    """What all seeds have in common, made once and kept in plan.json. ConfigError where that is of other settings."""
    given = cli.flatten(json.loads(json.dumps(config.to_dict()))) | {"minutes": args.minutes}
    path = Path(args.workdir) / "plan.json"
    if path.exists():
        made = workdir.load_json(path)
        workdir.check_same(path.parent, made["settings"], given)
        return made
    seconds = pace({name: Contestant(rival, config, images, 1000, 0) for name, rival in entered.items()})
    made = {
        "settings": given,
        "seconds_per_step": seconds,
        "steps": {name: max(1, round(args.minutes * 60 / s)) for name, s in seconds.items()},
        "parameters": {name: size(rival) for name, rival in entered.items()},
    }
    workdir.write_json(path, made)
    return made


def compete(name: str, contestant: Contestant, judge: Judge, num: int) -> tuple[dict[str, Any], np.ndarray]:
    """Train one model to the end and measure it; its figures, and the pictures to show."""
    for _ in tqdm(range(contestant.steps), desc=f"{name}, seed {contestant.seed}", unit="step"):
        contestant.advance()
    samples = contestant.draw(num)
    return judge.measure(samples), samples[:SHOWN]


def table(results: dict[str, list[dict[str, float]]], made: dict[str, Any]) -> Iterator[str]:
    """Markdown: the mean over seeds and, where there are several, the standard deviation and the worst."""
    yield "| | parameters | steps | " + " | ".join(COLUMNS) + " | worst FD |"
    yield "|---" * (len(COLUMNS) + 4) + "|"
    for name, rows in results.items():
        cells = [f"{made['parameters'][name]:,}", f"{made['steps'][name]:,}"] if name in made["steps"] else ["", ""]
        for column in COLUMNS:
            values = [row[column] for row in rows]
            spread = f" ± {statistics.stdev(values):.3g}" if len(values) > 1 and np.isfinite(values).all() else ""
            cells.append(f"{statistics.fmean(values):.3g}{spread}")
        worst = f"{max(row['FD'] for row in rows):.3g}" if len(rows) > 1 else ""
        yield f"| {name} | " + " | ".join([*cells, worst]) + " |"


def run(argv: Sequence[str]) -> int:
    """The command line; returns the exit status."""
    parser = cli.Parser(
        prog="python -m experiments.compare",
        description="A VAE, a GAN and a diffusion model on the same data, with the same parameters and minutes.",
    )
    add = parser.add_argument
    add("--config", default="compare", help="data and diffusion model (default: compare); fields as for training")
    add("--workdir", default="runs/compare", help="where everything goes (default: runs/compare)")
    add("--minutes", type=float, default=2.0, help="of training for each model and seed (default: 2)")
    add("--seeds", type=int, default=5, help="(default: 5)")
    config, args = cli.parse(parser, argv)
    if not 0 < args.minutes < float("inf") or args.seeds < 1:
        raise ConfigError(f"--minutes must be > 0 and --seeds >= 1, got {args.minutes} and {args.seeds}.")
    config.condition, config.sample.scale = "none", 1.0
    check.config(config)
    keep_memory()
    use_compile_cache()
    dataset = inputs.load(config)
    if not isinstance(dataset, data.Dataset):
        raise ConfigError("the comparison holds its data in memory: raise --config.data.memory_gb.")
    entered = entrants(config, inputs.describe(dataset))
    Path(args.workdir).mkdir(parents=True, exist_ok=True)
    with workdir.locked(Path(args.workdir)):
        return hold(config, entered, dataset, args)


def hold(config: Config, entered: dict[str, rivals.Rival], dataset: data.Dataset, args: Any) -> int:
    """The comparison itself, from where it was left."""
    folder = Path(args.workdir)
    images, held_out = split(dataset)
    real = np.asarray(data.decode(images))
    features = principal(real)
    judge, made = Judge(features, features(real)), plan(config, entered, images, args)
    results = {
        "held-out pictures": [judge.measure(np.asarray(data.decode(held_out)))],
        "Gaussian": [judge.measure(gaussian(real, len(held_out)))],
    }
    shown = {"real": real[:SHOWN]}
    for seed, (name, rival) in itertools.product(range(args.seeds), entered.items()):
        path = folder / f"{name}_{seed}.json"
        if not path.exists():
            one = Contestant(rival, config, images, made["steps"][name], seed)
            figures, pictured = compete(name, one, judge, len(held_out))
            np.save(folder / f"{name}.npy", pictured)
            workdir.write_json(path, figures)
        results.setdefault(name, []).append(workdir.load_json(path))
        shown[name] = np.load(folder / f"{name}.npy", allow_pickle=False)
    lines = "\n".join(table(results, made))
    names = [name for name in shown for _ in range(SHOWN)]
    data.save_png(folder / "compare.png", pictures.sheet(np.concatenate(list(shown.values())), names), {})
    workdir.write_json(folder / "compare.json", {"plan": made, "results": results})
    (folder / "compare.md").write_text(lines + "\n", encoding="utf-8")
    print(lines)
    return 0


if __name__ == "__main__":
    cli.main(run)
