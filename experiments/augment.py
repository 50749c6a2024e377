"""Do synthetic pictures help a classifier? Real, augmented and synthetic ones, for equal steps, told honestly.

    python -m experiments.train   --config=mnist --config.data.path=few.npz --workdir=runs/few
    python -m experiments.augment --workdir=runs/few --held-out=test.npz --synthetic 500 2000

The run is a class-conditional model, and its own training pictures are the N real ones, so that nothing else has been
seen. Each classifier trains for the same number of steps, on each of these:

    real                  the N pictures
    real, augmented       the same, each time shifted at random (and mirrored, where the run was trained with data.flip)
    + k synthetic         with k samples of the model, in the proportions of the real classes; both ways
    k synthetic alone     the classification accuracy score (Ravuri and Vinyals 2019)

With every seed another classifier, another order and other samples. The table has the mean accuracy on the held-out
pictures and, in points, what is gained over `real, augmented` with its 95 % interval (Student's t, of the differences
seed by seed): an interval that holds 0 shows no gain. Written to augment.md and augment.json in the workdir.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from scipy import stats

from experiments import cli, evaluate, generate, inputs, trained, workdir
from experiments.configs import Config
from experiments.train import use_compile_cache
from jaxdiff import data, train
from jaxdiff.errors import ConfigError, DataError
from jaxdiff.metrics import classify
from jaxdiff.types import Array, Key

BASELINE = "real, augmented"


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Pictures uint8 (n, h, w, c) and their labels (n,)."""

    images: np.ndarray
    labels: np.ndarray

    def with_(self, other: "Pictures") -> "Pictures":
        """Both."""
        return Pictures(np.concatenate([self.images, other.images]), np.concatenate([self.labels, other.labels]))


def shifts(pad: int, flip: bool) -> Callable[[Key, Array], Array]:
    """The usual augmentation of small pictures: a shift by up to `pad` pixels and, where asked, a mirror image."""

    def augment(key: Key, x: Array) -> Array:
        key_crop, key_flip = jax.random.split(key)
        x = data.augment.crop(key_crop, x, pad=pad)
        return data.augment.flip(key_flip, x) if flip else x

    return augment


def arms(real: Pictures, synthetic: Pictures, counts: Sequence[int]) -> dict[str, tuple[Pictures, bool]]:
    """What each classifier is trained on, by name, and whether its pictures are augmented."""
    result = {"real": (real, False), BASELINE: (real, True)}
    for count in counts:
        some = Pictures(synthetic.images[:count], synthetic.labels[:count])
        result[f"real + {count:,} synthetic"] = (real.with_(some), False)
        result[f"real + {count:,} synthetic, augmented"] = (real.with_(some), True)
        result[f"{count:,} synthetic alone"] = (some, False)
    return result


def interval(differences: np.ndarray) -> tuple[float, float]:
    """The 95 % confidence interval of the mean of some differences, by Student's t."""
    half = stats.t.ppf(0.975, len(differences) - 1) * differences.std(ddof=1) / np.sqrt(len(differences))
    return float(differences.mean() - half), float(differences.mean() + half)


def table(accuracies: dict[str, list[float]]) -> str:
    """Markdown: accuracy in percent, and points over the baseline with their interval."""
    lines = ["| trained on | accuracy, % | over the baseline, points (95 %) |", "|---|---|---|"]
    baseline = np.asarray(accuracies[BASELINE])
    for name, values in accuracies.items():
        shown = f"{100 * np.mean(values):.2f} ± {100 * np.std(values, ddof=1):.2f}"
        gain = 100 * (np.asarray(values) - baseline)
        low, high = interval(gain)
        verdict = "" if name == BASELINE else f"{gain.mean():+.2f} ({low:+.2f} to {high:+.2f})"
        lines.append(f"| {name} | {shown} | {verdict} |")
    return "\n".join(lines)


def verdict(accuracies: dict[str, list[float]]) -> str:
    """One sentence: whether adding synthetic pictures to the baseline gained, lost, or showed nothing."""
    sentences = []
    for name, values in accuracies.items():
        if name.startswith("real +") and name.endswith("augmented"):
            low, high = interval(np.asarray(values) - np.asarray(accuracies[BASELINE]))
            found = "helps" if low > 0 else "hurts" if high < 0 else "makes no difference that these seeds can show"
            sentences.append(f"{name}: {found}.")
    return " ".join(sentences)


def _parser() -> cli.Parser:
    parser = cli.Parser(
        prog="python -m experiments.augment", description="Do synthetic pictures help a classifier? Told honestly."
    )
    add = parser.add_argument
    add("--workdir", required=True, help="the directory of a run with condition=label")
    add("--held-out", help="test pictures: a split, an array file or a directory (default: test, where there is one)")
    add("--synthetic", type=int, nargs="+", help="how many samples to add; several are several rows (default: N)")
    add("--seeds", type=int, default=5, help="classifiers of each kind (default: 5)")
    add("--classifier-steps", type=int, default=500, help="training steps of a classifier (default: 500)")
    add("--pad", type=int, default=2, help="largest shift of the usual augmentation, in pixels (default: 2)")
    add("--steps", type=int, help="solver steps (default: as the config)")
    add("--scale", type=float, help="guidance (default: as the config)")
    add("--batch", type=int, default=64, help="samples at once (default: 64)")
    return parser


def examine(run: trained.Trained, args: Any) -> tuple[Pictures, Pictures, data.Dataset]:
    """The real pictures and the held-out ones. Raises ConfigError or DataError where the study cannot be made."""
    if run.config.condition != "label":
        raise ConfigError(f"this study needs a model of classes, got condition={run.config.condition}.")
    counts = args.synthetic or [1]
    if min(*counts, args.classifier_steps, args.batch, args.pad) < 1 or args.seeds < 2:
        raise ConfigError("--synthetic, --classifier-steps, --batch and --pad must be at least 1, --seeds at least 2.")
    dataset, other = inputs.load(run.config), evaluate.held_out_set(run.config, args.held_out)
    if other is None or other.labels is None:
        raise DataError("there are no held-out pictures with labels. Type --held-out=FILE.npz (images, labels).")
    if not isinstance(dataset, data.Dataset) or dataset.labels is None or dataset.images.dtype != np.uint8:
        raise DataError(f"{run.info['name']} is not held in memory as uint8 pictures with labels.")
    if other.shape != dataset.shape:
        raise DataError(f"held-out pictures are of {other.shape}, those of the run of {dataset.shape}.")
    return Pictures(dataset.images, dataset.labels), Pictures(other.images, other.labels), dataset


def study(run: trained.Trained, args: Any, chosen: Config) -> tuple[str, dict[str, list[float]]]:
    """What was done, in a line, and the accuracy of every arm with every seed."""
    real, test, dataset = examine(run, args)
    counts, mesh = args.synthetic or [len(real.labels)], train.mesh.make()
    train.mesh.check_batch_size(mesh, args.batch)
    augment, net = shifts(args.pad, run.config.data.flip), classify.Classifier(run.model.num_classes)
    accuracies: dict[str, list[float]] = {}
    for seed in range(args.seeds):
        drawn = generate.draw(
            run, dataset, chosen, seed, max(counts), folder=Path(args.workdir) / "augment", mesh=mesh, batch=args.batch
        )
        synthetic = Pictures(drawn.x, real.labels[drawn.own])
        for name, (pictures, augmented) in arms(real, synthetic, counts).items():
            params = classify.fit(
                jax.random.key(seed), net, pictures.images, pictures.labels, steps=args.classifier_steps,
                augment=augment if augmented else None,
            )  # fmt: skip
            accuracies.setdefault(name, []).append(classify.accuracy(net, params, test.images, test.labels))
    head = (
        f"{len(real.labels):,} real pictures of {run.info['name']}, {len(test.labels):,} held out; "
        f"{args.seeds} seeds, {args.classifier_steps:,} steps each; model at step {run.step}, scale {chosen.scale:g}"
    )
    return head, accuracies


def run(argv: Sequence[str]) -> int:
    """The command line; returns the exit status."""
    args = cli.parse_args(_parser(), argv)
    use_compile_cache()
    folder = Path(args.workdir)
    loaded = trained.load(folder)
    cli.try_to_write(folder)
    chosen = ConfigDict(loaded.config.sample.to_dict())
    chosen.steps, chosen.scale = args.steps or chosen.steps, chosen.scale if args.scale is None else args.scale
    head, accuracies = study(loaded, args, chosen)
    text = f"{head}.\n\n{table(accuracies)}\n\n{verdict(accuracies)}\n"
    workdir.write_json(folder / "augment.json", {"protocol": head, "accuracy": accuracies})
    (folder / "augment.md").write_text(text, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    cli.main(run)
