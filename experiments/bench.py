"""Speed on this machine, measured interleaved so that a noisy machine is noisy for both sides.

    python -m experiments.bench step   --net ddpm_cifar10 --batch 16 --rounds 5    training step against eager PyTorch
    python -m experiments.bench sample --net small --batch 16 --rounds 5           one network call without gradients
    python -m experiments.bench step   --net edm_ddpmpp --batch 512 --dtype bfloat16 --jax-only    on a GPU or TPU
    python -m experiments.bench matmul                                             matrix-product rate of the device

`step` is forward, backward and Adam in float32 without dropout: the same network, weights and batch on both sides, and
the outputs must agree before anything is timed. It needs torch, once in its default memory layout and once in
channels_last; `--jax-only` does without. Both sides run with malloc set as training sets it; `--system-malloc` leaves
it alone. The share of the device's matrix-product rate is by the operations of the textbook convolution, as in papers.
"""

import argparse
import os
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.train import keep_memory
from jaxdiff.nets import unet

NETS = {
    "ddpm_cifar10": lambda **settings: unet.ddpm_cifar10(dropout=0.0, **settings),
    "edm_ddpmpp": lambda **settings: unet.edm_ddpmpp(dropout=0.0, **settings),
    "small": unet.small,
}


def random_params(net: unet.UNet, size: int) -> Any:
    """Parameters of the right shapes, all of them non-zero, so that every part of the network shows in its output."""
    shapes = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, size, size, 3)), jnp.zeros((1,)))
    rng = np.random.default_rng(0)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        base = 1.0 if path[-1].key == "scale" else 0.0
        spread = 0.1 if leaf.ndim == 1 else float(np.prod(leaf.shape[:-1])) ** -0.5
        return (base + spread * rng.standard_normal(leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes["params"])


def batch(size: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(x, time, noise) for a network of any time scale."""
    rng = np.random.default_rng(1)
    x, noise = rng.standard_normal((2, count, size, size, 3)).astype(np.float32)
    return x, rng.uniform(size=count).astype(np.float32), noise


def jax_trainer(net: unet.UNet, params: Any, data: tuple) -> tuple[Callable, Callable, float, float]:
    """(predict, step, seconds to compile the step, operations of a step), with the state of the step held inside."""
    optimizer = optax.adam(1e-4)

    def apply(params: Any, x: jax.Array, t: jax.Array) -> Any:
        return net.apply({"params": params}, x, t)

    def update(params: Any, state: Any, x: jax.Array, t: jax.Array, noise: jax.Array) -> tuple[Any, Any, jax.Array]:
        loss, grads = jax.value_and_grad(lambda p: jnp.mean(jnp.square(apply(p, x, t) - noise)))(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    params = jax.tree.map(jnp.array, params)
    held = [jax.tree.map(jnp.copy, params), optimizer.init(params)]
    traced = jax.jit(update, donate_argnums=(0, 1)).trace(*held, *data)
    # Counted as lowered for a GPU, where no convolution is done by fewer operations than the textbook's.
    operations = float(cast(dict, traced.lower(lowering_platforms=("cuda",)).cost_analysis())["flops"])
    start = time.perf_counter()
    compiled = traced.lower().compile()
    seconds = time.perf_counter() - start

    def step(*data: np.ndarray) -> float:
        held[0], held[1], loss = compiled(*held, *data)
        return float(loss)

    predict = jax.jit(apply)
    return lambda x, t: np.asarray(predict(params, x, t)), step, seconds, operations


def interleave(sides: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """(wall, CPU) seconds of each side in each round, after one untimed call each.

    The pause lets the threads of the side before go to sleep: those of OpenMP spin for 0.2 s in wait of more work, and
    whoever came next would share the processors with them.
    """
    for side in sides.values():
        side()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            time.sleep(0.5)
            wall, cpu = time.perf_counter(), time.process_time()
            side()
            times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return times


def report(times: dict[str, list[tuple[float, float]]], count: int) -> None:
    """Print images/s of each side and the ratios of jax to it, round by round: median, lowest, highest."""
    for name, pairs in times.items():
        wall, cpu = (statistics.median(column) for column in zip(*pairs, strict=True))
        print(f"{name:22s} {wall:8.3f} s   {count / wall:8.2f} images/s   CPU {cpu:8.3f} s")
    for name, pairs in times.items():
        for kind, column in (("wall", 0), ("CPU", 1)):
            ratios = [ours[column] / theirs[column] for ours, theirs in zip(times["jax"], pairs, strict=True)]
            if name != "jax":
                low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
                print(f"jax / {name:16s} {middle:.3f}  ({low:.3f} to {high:.3f})  {kind}")


def compare(args: argparse.Namespace) -> None:
    """Time the training step or the network call of both sides."""
    if not args.jax_only and (args.dtype != "float32" or args.net == "edm_ddpmpp"):
        raise SystemExit("the PyTorch side has ddpm_cifar10 and small in float32 only. Add --jax-only.")
    if not args.system_malloc:
        keep_memory()
    net, data = NETS[args.net](dtype=jnp.dtype(args.dtype)), batch(args.size, args.batch)
    params = random_params(net, args.size)
    trainers: dict[str, tuple] = {}
    predict, step, seconds, operations = jax_trainer(net, params, data)
    trainers["jax"] = (predict, step)
    if not args.jax_only:
        from experiments import bench_torch

        flat = {jax.tree_util.keystr(k, simple=True, separator="/"): v for k, v in jax.tree.leaves_with_path(params)}
        for layout in ("torch", "torch channels_last"):
            last = layout.endswith("last")
            trainers[layout] = bench_torch.trainer(net, flat, channels_last=last, threads=args.threads)
    outputs = {name: predict(*data[:2]) for name, (predict, _) in trainers.items()}
    for name, output in outputs.items():
        error = np.abs(output - outputs["jax"]).max() / np.abs(outputs["jax"]).max()
        print(f"{name}: largest difference of the output {error:.1e}")
        if error > 1e-4:
            raise SystemExit(f"{name} computes another function than jax: difference {error:.1e} > 1e-4")
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(f"{args.net}: {count} parameters, batch {args.batch}, {args.size} x {args.size}, {args.dtype}")
    print(f"step compiled in {seconds:.1f} s")
    kind = 1 if args.command == "step" else 0
    inputs = data if kind else data[:2]
    sides = {name: (lambda f=pair[kind]: f(*inputs)) for name, pair in trainers.items()}
    times = interleave(sides, args.rounds)
    report(times, args.batch)
    if args.command == "step":
        rate = operations / statistics.median(wall for wall, _ in times["jax"]) * 1e-12
        peak = matmul_rate(jnp.dtype(args.dtype))
        print(f"{operations / args.batch * 1e-9:.1f} GFLOP an image: {rate:.2f} TFLOP/s, {rate / peak:.0%} of", end=" ")
        print(f"the {peak:.2f} of a matrix product on {jax.devices()[0].device_kind}")
    print(f"peak memory of the process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")
    print(f"load of the machine {os.getloadavg()[0]:.1f}, XLA_FLAGS={os.environ.get('XLA_FLAGS', '')!r}")


def matmul_rate(dtype: Any, n: int = 4096, rounds: int = 5, repeat: int = 5) -> float:
    """The best rate of an n x n matrix product, in TFLOP/s."""
    a = jax.random.normal(jax.random.key(0), (n, n), dtype)
    product = jax.jit(lambda a, b: a @ b)
    product(a, a).block_until_ready()
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready([product(a, a) for _ in range(repeat)])
        best = min(best, (time.perf_counter() - start) / repeat)
    return 2e-12 * n**3 / best


def matmul(args: argparse.Namespace) -> None:
    """Print the best rate of a matrix product in each dtype."""
    for dtype in (jnp.float32, jnp.bfloat16):
        rate = matmul_rate(dtype, args.n, args.rounds, args.repeat)
        print(f"{jax.devices()[0].device_kind} {dtype.__name__} n={args.n}: {rate:.2f} TFLOP/s")


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and run one measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("step", "sample"):
        sub = commands.add_parser(name)
        sub.add_argument("--net", choices=sorted(NETS), default="small")
        sub.add_argument("--batch", type=int, default=16)
        sub.add_argument("--size", type=int, default=32)
        sub.add_argument("--rounds", type=int, default=5)
        sub.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of computation")
        sub.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
        sub.add_argument("--jax-only", action="store_true")
        sub.add_argument("--system-malloc", action="store_true")
        sub.set_defaults(run=compare)
    sub = commands.add_parser("matmul")
    sub.add_argument("--n", type=int, default=4096)
    sub.add_argument("--rounds", type=int, default=5)
    sub.add_argument("--repeat", type=int, default=5)
    sub.set_defaults(run=matmul)
    args = parser.parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    main()
