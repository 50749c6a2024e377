"""How good are the samples of a trained model? Every figure beside its floors, measured the same way.

    python -m experiments.evaluate --workdir=runs/emoji
    python -m experiments.evaluate --workdir=runs/mnist --num=2000 --seed 0 1 2 --steps 5 10 20 --scale 1 2 4
    python -m experiments.evaluate --workdir=runs/cifar10 --num=10000 --inception=inception_v3_2015.safetensors
    python -m experiments.evaluate --config=cifar10 --config.data.path=DIR --workdir=floors --num=2800 --inception=...

Samples come from the averaged parameters, at the given steps, solver and guidance, with the conditions of training
examples. Reference: the training set. Rows beside the samples: held-out examples, and a Gaussian fitted to the data.
With --config there is no model: the floors alone. Written to evaluate.json, evaluate.md and evaluate.png in the
workdir; what takes long is kept in evaluate/ there, so that the same command goes on where it was stopped, and so are
the mean and covariance of the reference, with what they are of (jaxdiff.metrics.stats).
"""

import argparse
import copy
import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from experiments import cli, density, features, generate, inputs, prompts, report, scores, trained, workdir
from experiments import model as models
from experiments.configs import Config
from experiments.train import use_compile_cache
from jaxdiff import data, metrics, train
from jaxdiff.errors import ConfigError, DataError
from jaxdiff.metrics import classify, stats


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(prog="python -m experiments.evaluate", description="Measure the samples of a trained model.")
    add = parser.add_argument
    add("--workdir", required=True, help="the directory of the training run; with --config, one to write to")
    add("--config", help="measure the floors of this config's data, without a model")
    add("--num", type=int, default=1000, help="samples in a row of the table (default: 1000)")
    add("--seed", type=int, nargs="+", default=[0], help="of the samples; several give a mean and a spread")
    add("--steps", type=int, nargs="+", help="solver steps; several are a sweep (default: as the config)")
    add("--scale", type=float, nargs="+", help="guidance; several are a sweep (default: as the config)")
    add("--solver", help="(default: as the config)")
    add("--grid", help="(default: as the config)")
    add("--checkpoint", type=int, help="the training step to use (default: the newest)")
    add("--batch", type=int, default=64, help="examples at once (default: 64)")
    add("--reference", type=int, help="training examples to compare with (default: all)")
    add("--held-out", help="a split, an array file or a directory not trained on (default: test, where there is one)")
    add("--inception", help="weights of the Inception of the FID, a safetensors file")
    add("--bits", type=int, default=64, help="examples to measure bits per dimension on; 0 is off (default: 64)")
    add(
        "--classifier",
        type=int,
        default=500,
        help="steps of the classifier trained on samples; 0 is off (default: 500)",
    )
    add("--prompts", type=int, default=64, help="captions, of each set, whose picture is looked for; 0 is off")
    add("--top", type=int, default=5, help="how many of the nearest pictures count there (default: 5)")
    return parser


@dataclasses.dataclass(frozen=True)
class Real:
    """Real examples in random order: what is compared with, and others; labels where there are some."""

    x: np.ndarray
    labels: np.ndarray | None
    held_out: np.ndarray
    held_out_labels: np.ndarray | None
    kind: str


def held_out_set(config: Config, name: str | None) -> data.Dataset | None:
    """The examples that were not trained on: what --held-out names, or the test split of a data set with splits."""
    path = Path(config.data.path).expanduser()
    idx = path.is_dir() and any(path.glob("*-idx3-ubyte*"))
    splits = idx or (config.data.name == "tfds" and path.suffix not in (".npy", ".npz"))
    name = name or ("test" if splits else "none")
    if name == "none":
        return None
    other = ConfigDict(copy.deepcopy(config.to_dict()))
    if Path(name).expanduser().exists():
        cli.override(other, "data.path", name)
    elif splits:
        cli.override(other, "data.split", name)
    else:
        raise DataError(f"--held-out {name}: there is no such file, and the training set has no splits.")
    return _in_memory(inputs.load(other))


def _in_memory(dataset: inputs.Examples) -> data.Dataset:
    return dataset if isinstance(dataset, data.Dataset) else dataset.in_memory()


def real_examples(dataset: data.Dataset, other: data.Dataset | None) -> Real:
    """The reference and the held-out examples; halves of the training set where nothing was held out."""

    def shuffled(given: data.Dataset) -> tuple[np.ndarray, np.ndarray | None]:
        order = data.order(0, 0, batch_size=len(given), num_examples=len(given))
        order = order[~np.isin(order, list(given.skipped))]
        return given.images[order], None if given.labels is None else given.labels[order]

    x, labels = shuffled(dataset)
    if other is not None:
        return Real(x, labels, *shuffled(other), "held-out")
    half = len(x) // 2
    parts = (None, None) if labels is None else (labels[:half], labels[half:])
    return Real(x[:half], parts[0], x[half:], parts[1], "the other half of the data")


def variants(args: argparse.Namespace, config: Config, condition: str) -> list[Config]:
    """The sampling settings of every row: each of --steps with each of --scale."""
    unguided = condition == "none"
    steps, scales = args.steps or [config.sample.steps], args.scale or [1.0 if unguided else config.sample.scale]
    if min(steps) < 1:
        raise ConfigError(f"--steps must be integers >= 1, got {min(steps)}.")
    chosen = []
    for count, scale in itertools.product(dict.fromkeys(steps), dict.fromkeys(scales)):
        one = ConfigDict(config.sample.to_dict())
        one.steps, one.scale = count, scale
        for name in ("solver", "grid"):
            if getattr(args, name) is not None:
                one[name] = getattr(args, name)
        chosen.append(one)
    return chosen


def check(args: argparse.Namespace) -> None:
    """Raise ConfigError for numbers that cannot be, before anything is read or made."""
    for name, least in (("num", 6), ("batch", 1), ("reference", 6), ("bits", 0), ("prompts", 0), ("classifier", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name} must be an integer >= {least}, got {value}.")
    for seed in args.seed:
        if not 0 <= seed < 4096:
            raise ConfigError(f"--seed must be integers from 0 to 4095, got {seed}.")


class Evaluation:
    """One evaluation: the real examples, the features of everything, and the rows of the tables as they come."""

    def __init__(self, args: argparse.Namespace, config: Config):
        self.args, self.config, self.folder = args, config, Path(args.workdir) / "evaluate"
        self.dataset = inputs.load(config)
        shape = tuple(self.dataset.shape)
        chosen = [features.pixels(shape)] + ([features.inception(args.inception, shape)] if args.inception else [])
        self.mesh = train.mesh.make()
        train.mesh.check_batch_size(self.mesh, args.batch)
        self.held_out = held_out_set(config, args.held_out)
        self.real = real_examples(_in_memory(self.dataset), self.held_out)
        self.count = min(args.reference or len(self.real.x), len(self.real.x))
        self.extractors = [features.Extractor(self.folder, one, self.mesh, args.batch) for one in chosen]
        self.references: list[scores.Reference] = []
        self.tables: list[dict[str, Any]] = []

    def floors(self) -> None:
        """The rows that no model made: held-out examples, and a Gaussian."""
        real, num = self.real, self.args.num
        normal = scores.gaussian(real.x[: self.count], num)
        for extract in self.extractors:
            held = extract("held-out examples", real.held_out, num)
            trained_on = extract("training examples", real.x, self.count)
            given = scores.reference(trained_on, held, extract.chosen.contract)
            self.references.append(given)
            stats.save(self.folder / f"reference-{extract.chosen.name.replace(' ', '')}.safetensors", given.stats)
            sets = {real.kind: held, "Gaussian fit": extract("draws of the Gaussian", normal)}
            rows = [
                {"name": name, "n": len(x), "figures": scores.over_seeds([scores.score(given, x)])}
                for name, x in sets.items()
            ]
            title, contract = extract.chosen.title, extract.chosen.contract
            self.tables.append({"name": extract.chosen.name, "title": title, "contract": contract, "rows": rows})

    def row(self, run: trained.Trained, chosen: Config) -> list[generate.Samples]:
        """Measure the samples of one setting, for every seed; returns them."""
        args = self.args
        made = [
            generate.draw(
                run, self.dataset, chosen, seed, args.num, folder=self.folder, mesh=self.mesh, batch=args.batch
            )
            for seed in args.seed
        ]
        head = {"steps": chosen.steps, "scale": chosen.scale, "nfe": models.evaluations(run.model, chosen)}
        head |= {"solver": chosen.solver, "grid": chosen.grid, "seeds": args.seed, "n": args.num}
        guided = f", scale {chosen.scale:g}" if run.model.condition != "none" else ""
        head["name"] = f"samples, {head['nfe']} network calls{guided}"
        for extract, given, table in zip(self.extractors, self.references, self.tables, strict=True):
            parts = [extract("samples", samples.x) for samples in made]
            figures = scores.over_seeds([scores.score(given, x) for x in parts])
            table["rows"].append(head | {"figures": figures, "by_class": self._by_class(given, parts[0], made[0])})
        return made

    def _by_class(self, given: scores.Reference, x: np.ndarray, made: generate.Samples) -> dict[str, float] | None:
        """The distance in each class, where each has more examples than there are features."""
        if self.real.labels is None or self.dataset.labels is None or self.config.condition != "label":
            return None
        labels = self.dataset.labels[made.own]
        real = self.real.labels[: self.count]
        if min(np.bincount(y, minlength=self.dataset.num_classes).min() for y in (labels, real)) <= x.shape[1]:
            return None
        found = metrics.frechet_by_class(given.features, real, x, labels)
        return {str(label): value for label, value in found.items()}

    def bits(self, run: trained.Trained) -> dict[str, Any] | None:
        """Bits per dimension of held-out pictures: both estimates, and those of the Gaussian."""
        images = self.real.held_out[: self.args.bits]
        if not len(images) or images.dtype != np.uint8 or run.model.condition == "caption" or run.model.coder:
            return None
        cond = {}
        if run.model.condition == "label" and self.real.held_out_labels is not None:
            cond = {"label": jax.numpy.asarray(self.real.held_out_labels[: self.args.bits])}
        found: dict[str, Any] = density.model(run, images, cond, mesh=self.mesh, batch=min(self.args.batch, 16))
        return found | {"gaussian": density.gaussian(self.real.x, images), "of": self.real.kind}

    def accuracy(self, made: generate.Samples, name: str) -> dict[str, float] | None:
        """The classification accuracy score of the samples called `name`, and of as many real training pictures."""
        real, labels, count = self.real, self.dataset.labels, len(made.x)
        if self.config.condition != "label" or not self.args.classifier or labels is None or real.labels is None:
            return None
        sets = {f"{count:,} {name}": (made.x, labels[made.own])}
        sets |= {f"{min(count, len(real.x)):,} real ones": (real.x[:count], real.labels[:count])}
        return {
            name: classify.classification_accuracy(
                jax.random.key(0), x, y, real.held_out, real.held_out_labels, steps=self.args.classifier
            )
            for name, (x, y) in sets.items()
        }


def protocol(given: Evaluation, step: int | None) -> str:
    """What was measured against what, in words."""
    real, args = given.real, given.args
    model = f"Averaged parameters of step {step}; seeds {', '.join(map(str, args.seed))}. " if step is not None else ""
    return (
        f"{model}Reference: {given.count:,} training examples of {given.dataset.name}. "
        f"Floors: {real.kind}, and a Gaussian with the data's mean and covariance. Distances depend on the number n of "
        "examples in a row: compare rows of one n."
    )


def run(argv: Sequence[str]) -> int:
    """The command line; returns the exit status."""
    args, config, loaded = _open(argv)
    cli.try_to_write(Path(args.workdir))
    given = Evaluation(args, config)
    result: dict[str, Any] = {"name": given.dataset.name, "protocol": protocol(given, loaded.step if loaded else None)}
    result |= {"command": list(argv), "features": given.tables}
    if loaded is None:
        given.floors()
    else:
        result |= measure(given, loaded)
    write(Path(args.workdir), result)
    return 0


def measure(given: Evaluation, run: trained.Trained) -> dict[str, Any]:
    """The rows of the samples, and the figures that are no rows. Names and numbers that cannot be are found first."""
    args, seed = given.args, given.args.seed[0]
    chosen = variants(args, given.config, run.model.condition)
    for one in chosen:
        models.sampler(run.model, one)
    captioned = run.model.condition == "caption" and args.prompts > 0
    sets = {"prompts": given.dataset} | ({"held_out_prompts": given.held_out} if given.held_out else {})
    for dataset in sets.values() if captioned else ():
        prompts.check(dataset, args.top)
    given.floors()
    made = [given.row(run, one)[0] for one in chosen]
    name = next(row["name"] for row in given.tables[0]["rows"] if "nfe" in row)
    result: dict[str, Any] = {"bits_per_dim": given.bits(run), "classification_accuracy": given.accuracy(made[0], name)}
    for key, dataset in sets.items() if captioned else ():
        result[key] = prompts.control(run, dataset, chosen[0], args.prompts, seed=seed, top=args.top)
    if captioned and given.held_out:
        silent = {"seed": seed, "top": args.top, "told": False}
        result["held_out_without"] = prompts.control(run, given.held_out, chosen[0], args.prompts, **silent)
    return result


def _open(argv: Sequence[str]) -> tuple[argparse.Namespace, Config, trained.Trained | None]:
    """The options, the config, and the run, None where --config asks for the floors alone."""
    use_compile_cache()
    if any(word.startswith("--config") for word in argv):
        config, args = cli.parse(_parser(), argv)
        check(args)
        Path(args.workdir).mkdir(parents=True, exist_ok=True)
        return args, config, None
    args = cli.parse_args(_parser(), argv)
    check(args)
    loaded = trained.load(Path(args.workdir), args.checkpoint)
    return args, loaded.config, loaded


def write(directory: Path, result: dict[str, Any]) -> None:
    """Write evaluate.json and evaluate.md, and evaluate.png for a sweep; print the tables."""
    workdir.write_json(directory / "evaluate.json", result)
    text = report.markdown(result)
    (directory / "evaluate.md").write_text(text, encoding="utf-8")
    print(text)
    sweep = sum("nfe" in row for row in result["features"][0]["rows"]) > 1
    if sweep and not report.plot(directory / "evaluate.png", result["features"]):
        print("note: no plot without matplotlib. Type: pip install matplotlib")


if __name__ == "__main__":
    cli.main(run)
