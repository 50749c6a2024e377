"""A VAE, a GAN and a diffusion model on the same data, with the same parameters and minutes: one table, one figure.

    python -m experiments.compare --minutes 2 --seeds 5                                     emoji at 16 x 16
    python -m experiments.compare --config=folder --config.data.path=DIR --minutes 30 --workdir runs/mine

A fifth of the pictures is held out. The rivals are the narrowest with at least the parameters of the config's
network; the minutes become numbers of steps once, from the times of a few steps of each, taken in turn, so
that a busy machine is busy for all. Every seed is another initialisation and order. Beside the models stand two floors:
the held-out pictures themselves, and draws from a Gaussian with the mean and covariance of the training pictures.
All are compared with the training pictures by as many samples as are held out, and by the features and figures of
`experiments.evaluate`; coverage is the share of the modes that are met. A seed whose samples are not finite or of one
colour has failed, which the name of the row says.

What is done is kept: started again with the same --workdir, the command goes on. There it leaves compare.md,
compare.json, compare.png (rows of real pictures and of each model's), and the samples of each model and seed.
"""

import bisect
import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from experiments import check, cli, features, inputs, pictures, report, rivals, scores, workdir
from experiments import model as models
from experiments.configs import Config
from experiments.train import keep_memory, use_compile_cache
from jaxdiff import data, train
from jaxdiff.errors import ConfigError, DataError

SHOWN = 12  # pictures of each model in the figure
Figures: TypeAlias = dict[str, float | None]


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

    def start(self) -> None:
        """Make the parameters."""
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
    for one in contestants.values():
        one.start()
    for i in range(rounds + 1):
        for name, one in contestants.items():
            started = time.perf_counter()
            for _ in range(steps):
                one.advance()
            jax.block_until_ready(one.state)
            if i:
                times[name].append((time.perf_counter() - started) / steps)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def measure(extract: features.Extractor, given: scores.Reference, samples: np.ndarray) -> Figures | None:
    """The figures of samples (n, h, w, c); None where they are not finite, or all of one colour."""
    if not np.isfinite(samples).all():
        return None
    try:
        return scores.score(given, extract("samples", np.asarray(data.encode(samples))))
    except DataError:
        return None


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


def row(name: str, count: int, seeds: Sequence[Figures | None]) -> dict[str, Any]:
    """A row of the table: the mean and the spread over the seeds that did not fail."""
    sound = [figures for figures in seeds if figures is not None]
    failed = f" ({len(seeds) - len(sound)} of {len(seeds)} failed)" if len(sound) < len(seeds) else ""
    nothing = {figure: {"mean": None, "std": None} for figure in report.COLUMNS}
    return {"name": name + failed, "n": count, "figures": scores.over_seeds(sound) if sound else nothing}


def markdown(title: str, rows: Sequence[dict[str, Any]], made: dict[str, Any]) -> str:
    """The table, and what the models have in common and not."""
    budget = "; ".join(
        f"{name}: {made['parameters'][name]:,} parameters, {steps:,} steps" for name, steps in made["steps"].items()
    )
    return (
        f"{report.table(title, rows)}\n\n{made['settings']['minutes']:g} minutes each. {budget}.\n\n{report.LEGEND}\n"
    )


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
    add("--inception", help="weights of the Inception of the FID, a safetensors file (default: features of the pixels)")
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
    folder, shape = Path(args.workdir), tuple(dataset.shape)
    images, held_out = split(dataset)
    chosen = features.inception(args.inception, shape) if args.inception else features.pixels(shape)
    extract = features.Extractor(folder / "features", chosen, train.mesh.make(), 64)
    given = scores.reference(extract("training pictures", images), extract("held out", held_out), chosen.contract)
    made, num = plan(config, entered, images, args), len(held_out)
    floors = {"held out": given.held_out, "Gaussian fit": extract("Gaussian", scores.gaussian(images, num))}
    rows = [row(name, num, [scores.score(given, x)]) for name, x in floors.items()]
    shown = {"real": np.asarray(data.decode(images[:SHOWN]))}
    for name, rival in entered.items():
        seeds = [
            finished(Contestant(rival, config, images, made["steps"][name], seed), folder / f"{name}_{seed}", num)
            for seed in range(args.seeds)
        ]
        rows.append(row(name, num, [measure(extract, given, samples) for samples in seeds]))
        shown[name] = seeds[0][:SHOWN]
    text, names = markdown(chosen.title, rows, made), [name for name in shown for _ in range(SHOWN)]
    data.save_png(folder / "compare.png", pictures.sheet(np.concatenate(list(shown.values())), names), {})
    workdir.write_json(folder / "compare.json", {"plan": made, "contract": chosen.contract, "rows": rows})
    (folder / "compare.md").write_text(text, encoding="utf-8")
    print(text)
    return 0


def finished(contestant: Contestant, path: Path, num: int) -> np.ndarray:
    """`num` samples of the trained model: those kept at `path`, or made by training it now."""

    def samples(_: np.ndarray) -> np.ndarray:
        contestant.start()
        for _i in tqdm(range(contestant.steps), desc=path.name, unit="step"):
            contestant.advance()
        return contestant.draw(num)

    return features.in_parts(path, num, num, samples)


if __name__ == "__main__":
    cli.main(run)
