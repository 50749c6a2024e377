"""A trained sampler as one file that needs nothing but JAX to run: on CPU, CUDA and TPU.

    python -m experiments.export --workdir=runs/emoji --out=sampler

writes into the directory `sampler`
    sampler.jax        the compiled-to-StableHLO program  call(params, seeds, cond, null) -> samples in [-1, 1]
    params.npz         its parameters, flat: the arguments of the program, in order
    tokenizer.json     captions to ids (Hugging Face `tokenizers`), for a model of captions
    README.md          how to call it, with the code

and of a fine-tuned Stable Diffusion what diffusers loads (see `experiments.finetune`).

The batch size is fixed by --batch; the parameters are arguments and not constants, so that the file stays small.
"""

import importlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import cli, finetune, trained
from experiments import model as models
from experiments.configs import Config
from experiments.sample import settings
from jaxdiff.errors import CheckpointError, ConfigError

PLATFORMS = ("cpu", "cuda", "tpu")

README = """# A sampler exported by jaxdiff

Trained on {data}, checkpoint {step}; {count:,} parameters. Settings: {settings}.

```python
import jax, numpy as np
from jax import export

with open("sampler.jax", "rb") as file:
    sampler = export.deserialize(bytearray(file.read()))
params = [value for _, value in sorted(np.load("params.npz").items())]
seeds = np.arange({batch}, dtype=np.uint32)             # one picture per seed
{condition}samples = sampler.call(params, seeds{arguments})       # float32 {shape}, in [-1, 1]
pictures = np.asarray((samples + 1) * 127.5).clip(0, 255).round().astype(np.uint8)
```

It runs on {platforms}, with this jax ({version}) or a newer one.
"""

# condition -> the arguments of the call, and the code that makes them
CONDITIONS = {
    "none": ("", ""),
    "label": (
        ", cond, null",
        "cond = np.full({batch}, 0, np.int32)                    # one class per picture\n"
        "null = np.full({batch}, -1, np.int32)                   # no class\n",
    ),
    "caption": (
        ", cond, null",
        "import tokenizers\n\n"
        'tokenizer = tokenizers.Tokenizer.from_file("tokenizer.json")\n'
        'ids = tokenizer.encode("red heart", add_special_tokens=False).ids[:{length}]\n'
        "cond = np.zeros(({batch}, {length}), np.int32)               # token ids, padded with 0\n"
        "cond[:, : len(ids)] = ids\n"
        "null = np.zeros_like(cond)                              # or the ids of a negative prompt\n\n",
    ),
}


def program(run: trained.Trained, chosen: Config) -> tuple[Callable[..., jax.Array], list[Any]]:
    """`call(leaves, seeds, *conditions)`, and the leaves of the parameters it wants."""
    sample = models.sampler(run.model, chosen)
    leaves, tree = jax.tree.flatten(run.params)
    names = list(run.model.null(1))

    def call(leaves: list[jax.Array], seeds: jax.Array, *conditions: jax.Array) -> jax.Array:
        cond, null = ({name: c} for name, c in zip(names * 2, conditions, strict=True)) if names else ({}, {})
        return sample(jax.tree.unflatten(tree, leaves), jax.vmap(jax.random.key)(seeds), cond, null)

    return call, leaves


def export(run: trained.Trained, chosen: Config, directory: Path, batch: int) -> None:
    """Make the directory and the files. Raises ConfigError when jax.export's serializer is not installed."""
    try:
        importlib.import_module("flatbuffers")  # jax.export needs it to write, and does not declare it
    except ImportError as error:
        raise ConfigError(
            "writing an exported program needs flatbuffers. Type: pip install 'jaxdiff[export]'."
        ) from error
    directory.mkdir(parents=True)
    call, leaves = program(run, chosen)
    conditions = [*run.model.null(batch).values()] * 2
    exported = jax.export.export(jax.jit(call), platforms=PLATFORMS)(leaves, jnp.zeros(batch, jnp.uint32), *conditions)
    (directory / "sampler.jax").write_bytes(exported.serialize())
    arrays: dict[str, Any] = {f"{i:05d}": np.asarray(leaf) for i, leaf in enumerate(leaves)}
    np.savez(directory / "params.npz", **arrays)
    (directory / "README.md").write_text(_readme(run, chosen, batch, leaves), encoding="utf-8")


def _readme(run: trained.Trained, chosen: Config, batch: int, leaves: list[Any]) -> str:
    arguments, condition = CONDITIONS[run.model.condition]
    return README.format(
        data=run.info["name"],
        step=run.step,
        count=sum(leaf.size for leaf in leaves),
        settings=json.dumps({name: chosen[name] for name in ("solver", "grid", "steps", "scale", "clip")}),
        batch=batch,
        arguments=arguments,
        shape=(batch, *run.info["shape"]),
        condition=condition.format(batch=batch, length=run.model.max_len),
        platforms=", ".join(PLATFORMS),
        version=jax.__version__,
    )


def run(argv: Sequence[str]) -> int:
    """The command line; returns the exit status."""
    parser = cli.Parser(
        prog="python -m experiments.export",
        description="Write a trained sampler as a file that runs with jax alone, on CPU, CUDA and TPU.",
    )
    add = parser.add_argument
    add("--workdir", required=True, help="the directory of the training run")
    add("--out", required=True, help="the directory to write, which must not exist yet")
    add("--batch", type=int, default=16, help="pictures per call (default: 16)")
    add("--steps", type=int, help="solver steps (default: as the config)")
    add("--solver", help="(default: as the config)")
    add("--grid", help="(default: as the config)")
    add("--scale", type=float, help="guidance (default: as the config)")
    add("--checkpoint", type=int, help="the training step to use (default: the newest)")
    parser.set_defaults(prompt=True, label=(), negative="", num=1, seed=0)
    args = cli.parse_args(parser, argv)
    source, directory = Path(args.workdir), Path(args.out)
    if directory.exists():
        raise CheckpointError(f"--out {directory} exists already. Give another directory, or remove it.")
    if (source / finetune.WEIGHTS).exists():
        finetune.export(source, directory, args.checkpoint)
        print(f"wrote {directory}")
        return 0
    loaded = trained.load(source, args.checkpoint)
    chosen = settings(args, loaded.config)
    if loaded.model.told:
        raise ConfigError("a model that stands on a published text encoder cannot be exported without it, as it would.")
    models.sampler(loaded.model, chosen)  # refuses bad settings before anything is written
    export(loaded, chosen, directory, args.batch)
    if (source / "tokenizer.json").exists():
        shutil.copy(source / "tokenizer.json", directory)
    print(f"wrote {directory}: see its README.md")
    return 0


if __name__ == "__main__":
    cli.main(run)
