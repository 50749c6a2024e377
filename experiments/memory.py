"""What a step of fine-tuning a whole Stable Diffusion takes of each device, by the compiled program's own account.

    python -m experiments.memory --model sd15 --devices 1 4 8
    python -m experiments.memory --model sdxl --devices 8 --batch 8 --dtype bfloat16 --remat none

The step is that of `--config=finetune` with Adam and one average, its parameters divided over the devices (fsdp). Only
shapes are given: nothing is allocated but the program, and where there are fewer devices CPU devices are made up.
"""

import argparse
import contextlib
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from experiments import cli, tuning
from experiments import model as models
from jaxdiff import loss, schedule, target, train
from jaxdiff.denoise import time_index
from jaxdiff.errors import ConfigError
from jaxdiff.nets import AutoencoderKL, SDUNet
from jaxdiff.nets.conditioning import REMAT
from jaxdiff.pipelines import LatentDiffusion
from jaxdiff.pretrained import unet
from jaxdiff.types import PyTree

XL: dict[str, Any] = {
    "channels": (320, 640, 1280), "attention": ("none", "cross", "cross"), "heads": (5, 10, 20), "depth": (1, 2, 10),
    "token_dim": 2048, "vector_dim": 1280, "linear_projection": True,
}  # fmt: skip
MODELS = {"sd15": (SDUNet(), 64), "sdxl": (SDUNet(**XL), 128)}
"""Name -> the U-Net, and the side of its latents."""
TOKENS = 77


def tuned(net: SDUNet) -> tuning.Tuned:
    """The full fine-tuning of `net`, as --config=finetune makes it."""
    chain = schedule.scaled_linear()
    model = LatentDiffusion(net, AutoencoderKL(), chain, target.eps, time_index(1000))
    return tuning.Tuned(model, tuning.full(), None, loss.simple, loss.discrete(1000), 0.1, 0.0, 1.0)


def lowered(net: SDUNet, side: int, devices: int, batch: int) -> jax.stages.Lowered:
    """The step on `devices`, for a batch of all of them."""
    mesh = train.mesh.make(data=1, fsdp=devices, devices=jax.devices()[:devices])
    job, optimizer = tuned(net), train.adam(1e-5, clip_norm=1.0)

    def init() -> PyTree:
        params = {"unet": net.init(jax.random.key(0), **jax.tree.map(_zeros, unet.example(net)))}
        return train.create_state(params, optimizer, ema=("ema",))

    step = train.make_step(
        job.loss, optimizer, key=jax.random.key(1), ema={"ema": 0.9999}, mesh=mesh,
        summary=train.logsnr_buckets(**models.BUCKETS),
    )  # fmt: skip
    rows = train.mesh.batch_sharding(mesh, leading=1)
    batches = {
        "image": jax.ShapeDtypeStruct((1, batch, side, side, net.in_channels), jnp.float32, sharding=rows),
        "text": jax.ShapeDtypeStruct((1, batch), jnp.int32, sharding=rows),
    }
    texts = unet.example(net) | {"tokens": jax.ShapeDtypeStruct((1, TOKENS, net.token_dim), jnp.float32)}
    texts = {name: row for name, row in texts.items() if name not in ("x", "time")}
    frozen = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=train.mesh.replicated(mesh)), texts)
    state = train.mesh.template(mesh, init)
    return step.jitted.lower(state, step.key, batches, None, {"params": {}, "texts": frozen})


def _zeros(shape: jax.ShapeDtypeStruct) -> jax.Array:
    return jnp.zeros(shape.shape, shape.dtype)


def line(lower: jax.stages.Lowered) -> dict[str, float]:
    """GB of each device: what the step is given, its temporaries, and what it returns beside what it was given."""
    start = time.perf_counter()
    found: Any = lower.compile().memory_analysis()
    return {
        "arguments": found.argument_size_in_bytes / 1e9,
        "temporaries": found.temp_size_in_bytes / 1e9,
        "new outputs": (found.output_size_in_bytes - found.alias_size_in_bytes) / 1e9,
        "program": found.generated_code_size_in_bytes / 1e9,
        "seconds": time.perf_counter() - start,
    }


def run(argv: Sequence[str]) -> int:
    """The command line; returns the exit status."""
    parser = cli.Parser(
        prog="python -m experiments.memory",
        description="Tell what a training step of Stable Diffusion takes of each device. Nothing is trained.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", default="sd15", choices=MODELS, help="whose U-Net trains")
    add("--devices", nargs="+", type=int, default=[1, 4, 8], help="numbers of devices to divide the parameters over")
    add("--batch", type=int, default=1, help="examples on each device")
    add("--remat", default="full", choices=REMAT, help="what is computed again to spare memory")
    add("--dtype", default="bfloat16", choices=models.DTYPES, help="what the network computes in")
    add("--side", type=int, help="height and width of the latents (default: as it was trained)")
    args = cli.parse_args(parser, argv)
    if min(args.devices) < 1 or args.batch < 1:
        raise ConfigError(f"--devices and --batch must be >= 1, got {args.devices} and {args.batch}.")
    make_up_devices(max(args.devices))
    net, side = MODELS[args.model]
    net = net.clone(remat=args.remat, dtype=models.DTYPES[args.dtype])
    print(f"{args.model}, {args.batch} example(s) a device, {args.dtype}, remat {args.remat}, {jax.default_backend()}")
    print(
        "| devices | arguments | temporaries | new outputs | together, GB a device | compiled in |\n" + "|---" * 6 + "|"
    )
    for devices in args.devices:
        found = line(lowered(net, args.side or side, devices, devices * args.batch))
        parts = [found[name] for name in ("arguments", "temporaries", "new outputs")]
        cells = [f"{part:.2f}" for part in (*parts, sum(parts))]
        print(f"| {devices} | {' | '.join(cells)} | {found['seconds']:.0f} s |", flush=True)
    return 0


def make_up_devices(count: int) -> None:
    """Have at least `count` CPU devices, where this process has not begun to use JAX."""
    with contextlib.suppress(RuntimeError):  # the devices are there already; the mesh says where they are too few
        jax.config.update("jax_num_cpu_devices", max(count, jax.config.values["jax_num_cpu_devices"]))


if __name__ == "__main__":
    cli.main(run)
