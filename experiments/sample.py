"""Make pictures with a trained model.

python -m experiments.sample --workdir=runs/emoji --prompt "red heart" --num 16 --seed 0 --out grid.png
python -m experiments.sample --workdir=runs/emoji --prompt "cat" "dog" --num 4 --each pictures/
python -m experiments.sample --workdir=runs/mnist --label 7 --num 16
python -m experiments.sample --pretrained DIR --prompt "a red house" --solver unipc --steps 20 --scale 7.5 --out x.png
python -m experiments.sample --pretrained DIR --controlnet DIR --control edges.png --prompt "a red house"
python -m experiments.sample --pretrained DIR --ip_adapter FILE --image photo.png --ip_scale 0.6 --prompt "a red house"
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
from ml_collections import ConfigDict

from experiments import cli, pictures, pretrained, trained
from experiments import model as models
from experiments.configs import Config
from experiments.train import use_compile_cache
from jaxdiff import data
from jaxdiff.errors import ConfigError, DataError
from jaxdiff.types import Array


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog="python -m experiments.sample",
        description="Make pictures with a trained model. The same seed gives the same picture at any --num.",
    )
    add = parser.add_argument
    add("--workdir", help="the directory of the training run")
    add("--pretrained", help="instead: a Stable Diffusion or FLUX, as the folder that diffusers writes")
    add("--variant", help="with --pretrained: the files to read, e.g. fp16")
    add("--half", action="store_true", help="with --pretrained: compute in bfloat16")
    add("--size", nargs=2, type=int, help="with --pretrained: height and width (default: as it was trained)")
    add("--lora", nargs="+", action="extend", default=[], help="with --pretrained: files of LoRAs to add")
    add("--lora_scale", nargs="+", type=float, default=[1.0], help="how much of each is added (default: 1)")
    add("--inversion", nargs="+", action="extend", default=[], help="with --pretrained: files of learned words to know")
    add("--controlnet", nargs="+", action="extend", default=[], help="with --pretrained: folders of ControlNets")
    add("--control", nargs="+", action="extend", default=[], help="a picture for each --controlnet")
    add("--control_scale", nargs="+", type=float, default=[1.0], help="how strongly they control (default: 1)")
    add("--ip_adapter", help="with --pretrained: the file of an IP-Adapter, its image_encoder/ beside it")
    add("--image", help="the picture for --ip_adapter")
    add("--ip_scale", type=float, default=1.0, help="how much of that picture is taken (default: 1)")
    add("--prompt", nargs="+", action="extend", default=[], help="what to draw; several prompts give a row each")
    add("--negative", default="", help="what not to draw: guidance goes away from it")
    add("--label", nargs="+", type=int, action="extend", default=[], help="classes to draw, for a model of classes")
    add("--num", type=int, help="pictures per prompt or class (default: 16, of --pretrained 1)")
    add("--seed", type=int, default=0, help="the seed of the first picture; the next ones count up (default: 0)")
    add("--seeds", nargs="+", type=int, help="the seed of every picture, instead of --seed and --num")
    add("--steps", type=int, help="solver steps (default: as the config)")
    add("--solver", help="name or 'name(option=value)' (default: as the config)")
    add("--grid", help="time grid, name or 'name(option=value)' (default: as the config)")
    add("--scale", type=float, help="guidance; 1 is off; FLUX is told it (default: as the config)")
    add("--batch", type=int, help="pictures at once (default: 16, of --pretrained 1)")
    add("--checkpoint", type=int, help="the training step to use (default: the newest)")
    add("--out", default="grid.png", help="the picture of all samples (default: grid.png)")
    add("--each", help="a directory to write every sample to, as a file of its own")
    return parser


def check_numbers(args: argparse.Namespace) -> None:
    """Raise ConfigError for numbers that are too small or too large."""
    for name, least in (("num", 1), ("steps", 1), ("batch", 1), ("seed", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name} must be an integer >= {least}, got {value}.")
    if args.num is not None and args.num > 100_000:
        raise ConfigError(
            f"--num must be at most 100000, got {args.num}. Make them in several calls with other --seed."
        )


def settings(args: argparse.Namespace, config: Config) -> Config:
    """The sampling settings of the run, with those of the command line put over them."""
    check_numbers(args)
    chosen = ConfigDict(config.sample.to_dict())
    for name in ("steps", "solver", "grid", "scale"):
        if getattr(args, name) is not None:
            chosen[name] = getattr(args, name)
    if not args.prompt and not args.label and not args.negative:
        chosen.scale = 1.0  # nothing to guide towards
    if args.negative and chosen.scale == 1:
        raise ConfigError("--negative has no effect without guidance. Type --scale 4.")
    return chosen


def conditions(run: trained.Trained, args: argparse.Namespace, per: int) -> tuple[dict[str, Array], list[str | int]]:
    """The condition of every picture, `per` in a row for each prompt or class, and its name."""
    kind = run.model.condition
    if (kind != "caption" and (args.prompt or args.negative)) or (kind != "label" and args.label):
        takes = {"caption": "--prompt", "label": "--label"}.get(kind, "neither --prompt nor --label")
        raise ConfigError(f"this model ({run.info['name']}) has condition={kind}: it takes {takes}.")
    if not args.prompt and not args.label:
        return run.model.null(per), [""] * per
    if kind == "caption":
        words = [prompt for prompt in args.prompt for _ in range(per)]
        return run.model.captions(words), words
    names = run.info["label_names"]
    for label in args.label:
        if not 0 <= label < run.model.num_classes:
            listed = ", ".join(f"{i} {name}" for i, name in enumerate(names)) or f"0 to {run.model.num_classes - 1}"
            raise ConfigError(f"--label must be one of: {listed}; got {label}.")
    labels = [label for label in args.label for _ in range(per)]
    return {"label": jnp.asarray(labels, jnp.int32)}, labels


def note_unknown_words(run: trained.Trained, prompts: Sequence[str]) -> None:
    """Say which words the model never saw: they do not steer it."""
    for prompt in prompts:
        unknown = run.model.tokenizer.unknown_words(prompt) if run.model.tokenizer else ()
        if unknown:
            shown = ", ".join(word[:40] for word in unknown[:10])
            print(f"note: not in this model's vocabulary, so of little effect: {shown}")


def check_outputs(args: argparse.Namespace) -> None:
    """Raise before anything runs when a picture could not be written."""
    parent = Path(args.out).absolute().parent
    if not parent.is_dir():
        raise DataError(f"--out {args.out}: the directory {parent} does not exist. Make it, or give another path.")
    if Path(args.out).suffix.lower() != ".png":
        raise ConfigError(f"--out must end in .png, got {args.out}.")
    cli.try_to_write(parent)
    if args.each:
        Path(args.each).mkdir(parents=True, exist_ok=True)
        cli.try_to_write(Path(args.each))


def run(argv: Sequence[str]) -> int:
    """The command line; returns the exit status."""
    args = cli.parse_args(_parser(), argv)
    use_compile_cache()
    if (args.workdir is None) == (args.pretrained is None):
        raise ConfigError("give either --workdir, of a training run, or --pretrained, a published model.")
    if args.pretrained is not None:
        check_numbers(args)
        pretrained.check(args)
        check_outputs(args)
        return pretrained.run(args)
    for name in ("lora", "inversion", "controlnet", "ip_adapter"):
        if getattr(args, name):
            raise ConfigError(f"--{name} is for --pretrained, not for the model of a --workdir.")
    loaded = trained.load(Path(args.workdir), args.checkpoint)
    chosen = settings(args, loaded.config)
    per = args.seeds or list(range(args.seed, args.seed + (args.num or 16)))
    cond, words = conditions(loaded, args, len(per))
    note_unknown_words(loaded, [*args.prompt, args.negative])
    seeds = per * (len(words) // len(per))
    trained.check_seeds(seeds)
    check_outputs(args)
    null = loaded.model.captions([args.negative] * len(words)) if args.negative else loaded.model.null(len(words))
    x0 = trained.draw(loaded, chosen, cond, null, seeds, args.batch or 16)
    write(args, loaded, chosen, x0, words, seeds)
    return 0


def write(args, loaded: trained.Trained, chosen: Config, x0, words: list[str | int], seeds: list[int]) -> None:
    """Write the grid, and every picture where asked, with what made it inside the file."""
    common = {"negative": args.negative, "checkpoint": loaded.step, "data": loaded.info["name"]}
    common |= {name: chosen[name] for name in ("solver", "grid", "steps", "scale", "clip")}
    common["nfe"] = models.evaluations(loaded.model, chosen)
    info = {"prompts": json.dumps(words), "seeds": json.dumps(seeds)} | common
    data.save_png(args.out, pictures.sheet(x0, words), info)
    print(f"wrote {args.out}: {len(x0)} samples, {common['nfe']} network evaluations each")
    if not args.each:
        return
    for i, (word, seed) in enumerate(zip(words, seeds, strict=True)):
        path = Path(args.each) / f"{i:05d}_seed{seed}.png"
        data.save_png(path, pictures.sheet(x0[i : i + 1]), {"prompt": word, "seed": seed} | common)
    print(f"wrote {len(x0)} files to {args.each}")


if __name__ == "__main__":
    cli.main(run)
