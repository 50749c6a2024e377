"""How far every solver ends from the truth, on every time grid, for the same number of network calls.

    python -m experiments.solvers                                              the whole table, as Markdown
    python -m experiments.solvers --diffusers                                  and diffusers' schedulers beside it
    python -m experiments.solvers --solver dpmpp_2m heun --grid log_snr 'karras(sigma_min=0.03)' --calls 10 20
    python -m experiments.solvers --workdir runs/emoji --solver unipc_2 --grid uniform --calls 10   a trained network
    python -m experiments.solvers --speed                                      steps per second instead

The problem: a mixture of 16 Gaussians in 64 dimensions, whose denoiser D(x, t) = E[x0 | x_t] is known in closed form.
As in pictures, the standard deviation of direction k falls like 1 / k, from 3.1 to 0.05; its mean square is 0.5^2. A
cluster is 0.05 to 0.5 times as wide, another factor in each direction. In z = x_t / alpha and r = sigma / alpha the
probability flow is dz / dlog r = z - D, integrated here by Runge and Kutta in float64.

    deterministic solvers   root mean square distance, per dimension, of each sample from the exact end of its own flow
    stochastic solvers      sliced Wasserstein-2 distance of what they draw to the data

Both are per dimension and printed in thousandths. A few samples that end in another cluster make much of the mean
square; with --median deterministic solvers have the median over the samples instead. A grid has as many steps as the
calls pay for, so a solver that asks the network twice in a step has half as many.

With --workdir the network of a training run takes the place of the mixture, with the settings, prompts and seeds of its
sample grids; what is printed is the root mean square distance, in thousandths of the range [-1, 1] of a pixel, to
DPM-Solver++ 2M in 150 steps of log-SNR. The truth is not known there: "unipc_2, 120 steps" says how well that stands.
"""

import argparse
import functools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import cli, trained
from experiments import model as models
from experiments.configs._base import base
from jaxdiff import guide, process, sample, schedule, solver
from jaxdiff.errors import ConfigError
from jaxdiff.types import Array, Denoiser, Schedule, Solver

ROWS = {False: 256, True: 1024}  # samples for a deterministic solver, for a stochastic one
# Those of the library (of respaced, trailing is uniform), and the default of experiments.sample.
GRIDS = [*sample.GRIDS, base().sample.grid]
GRIDS[GRIDS.index("respaced")] = "respaced(spacing='quadratic')"
DIRECTIONS = 64  # onto which the sliced distance projects
Errors = dict[tuple[str, str, int], float]
"""(solver, grid, calls) -> error; nan where the calls do not pay for one step."""


@dataclass(frozen=True)
class Mixture:
    """x0 ~ sum_k weights_k N(means_k, diag(stds_k^2)); weights (k,), means and stds (k, d)."""

    weights: np.ndarray
    means: np.ndarray
    stds: np.ndarray

    def denoise(self, x: Any, alpha: Any, sigma: Any, xp: Any = np) -> Any:
        """E[x0 | alpha x0 + sigma eps = x] for x (b, d), in NumPy or, as `xp`, in jax.numpy."""
        weights, means, stds = (xp.asarray(a, x.dtype) for a in (self.weights, self.means, self.stds))
        total = alpha**2 * stds**2 + sigma**2
        # log p(x | cluster) = -1/2 sum (x - alpha m)^2 / total + log total, expanded so that it is three products
        own = xp.log(weights) - (alpha**2 * means**2 / total + xp.log(total)).sum(1) / 2
        logits = own[None] - x**2 @ (0.5 / total).T + x @ (alpha * means / total).T
        shares = xp.exp(logits - logits.max(1, keepdims=True))
        shares = shares / shares.sum(1, keepdims=True)
        return shares @ (means * sigma**2 / total) + x * (shares @ (alpha * stds**2 / total))

    def denoiser(self, used: Schedule) -> Denoiser:
        """The same as a denoiser."""
        return lambda x, t: self.denoise(x, used.alpha(t), used.sigma(t), jnp)

    def draw(self, count: int, seed: int) -> np.ndarray:
        """Exact samples (count, d)."""
        rng = np.random.default_rng(seed)
        rows = rng.choice(len(self.weights), count, p=self.weights)
        return self.means[rows] + self.stds[rows] * rng.standard_normal((count, self.means.shape[1]))

    def flow(self, x: np.ndarray, start: float, steps: int = 2000, end: float = 1e-4) -> np.ndarray:
        """The data at the end of the probability flow through x / alpha = x at sigma / alpha = start."""

        def slope(x: np.ndarray, u: float) -> np.ndarray:
            return x - self.denoise(x, 1.0, np.exp(u))

        u, h = np.linspace(np.log(start), np.log(end), steps + 1, retstep=True)
        for v in u[:-1]:
            k1 = slope(x, v)
            k2 = slope(x + h / 2 * k1, v + h / 2)
            k3 = slope(x + h / 2 * k2, v + h / 2)
            k4 = slope(x + h * k3, v + h)
            x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return self.denoise(x, 1.0, end)


def mixture(clusters: int = 16, dim: int = 64, seed: int = 0) -> Mixture:
    """The mixture of the table."""
    rng = np.random.default_rng(seed)
    scale = 1 / np.arange(1, dim + 1)
    scale *= 0.5 / np.sqrt(np.square(scale).mean())
    stds = scale * np.exp(rng.uniform(np.log(0.05), np.log(0.5), (clusters, dim)))
    return Mixture(rng.dirichlet(np.full(clusters, 3.0)), scale * rng.standard_normal((clusters, dim)), stds)


class Problem:
    """The mixture on one schedule: noise to start from, where its flow ends, the distance of samples to the data."""

    def __init__(self, data: Mixture, used: Schedule, rows: dict[bool, int], median: bool = False):
        self.data, self.schedule, self.median = data, used, median
        self.sigma = float(used.sigma(jnp.ones(())))
        alpha = float(used.alpha(jnp.ones(())))
        normal = np.random.default_rng(1).standard_normal((max(rows.values()), data.means.shape[1]))
        self.noise = {stochastic: normal[:count] * self.sigma for stochastic, count in rows.items()}
        # Where alpha is 0 the flow begins at infinite sigma / alpha; from 1e7 on it is a scaling by the noise.
        x = self.noise[False] / alpha if alpha > 0 else normal[: rows[False]] * 1e7
        self.end = data.flow(x, self.sigma / alpha if alpha > 0 else 1e7)
        directions = np.random.default_rng(2).standard_normal((data.means.shape[1], DIRECTIONS))
        self.directions = directions / np.linalg.norm(directions, axis=0)
        self.quantiles = self._quantiles(data.draw(16 * rows[True], 3), rows[True])
        self.floor = self.distance(data.draw(rows[True], 4))  # that of exact samples

    def _quantiles(self, x: np.ndarray, count: int) -> np.ndarray:
        """`count` quantiles of each projection."""
        ordered = np.sort(x @ self.directions, axis=0)
        return ordered.reshape(count, -1, DIRECTIONS).mean(1)

    def distance(self, x: np.ndarray) -> float:
        """Sliced Wasserstein-2 distance of the samples to the data."""
        return float(np.sqrt(np.square(self._quantiles(x, len(self.quantiles)) - self.quantiles).mean()))

    def error(self, x: Array | np.ndarray, stochastic: bool) -> float:
        """The error of the samples that came from `noise`."""
        x = np.asarray(x, np.float64)
        if stochastic:
            return self.distance(x)
        squares = np.square(x - self.end).mean(1)
        return float(np.sqrt(np.median(squares) if self.median else squares.mean()))


class Walk:
    """One solver from one noise, compiled once for any grid and number of steps; it counts the calls of the denoiser.

    The loop is that of `sample.sample` with the number of steps as a value: compiling `sample` for each would take ten
    times as long. `denoise(given, x, t)`: what it is bound to is an argument of the compiled program.
    """

    def __init__(self, used: Solver, denoise: Callable[..., Array], given: Any, keys: Array, x: Array, most: int):
        self.calls, self.most, self.keys, self.x, self.given = 0, most, keys, x, given

        def run(given: Any, keys: Array, x: Array, times: Array, num_steps: Array) -> Array:
            def counted(x: Array, t: Array) -> Array:
                jax.debug.callback(self._count, t)
                return denoise(given, x, t)

            def body(n: Array, carry: Any) -> Any:
                own = jax.vmap(jax.random.fold_in, (0, None))(keys, n)
                return used.step(own, counted, carry[0], times[n], times[n + 1], carry[1])

            return jax.lax.fori_loop(0, num_steps, body, (x, used.init(x)))[0]

        self.run = jax.jit(run)

    def _count(self, t: Any) -> None:
        self.calls += 1

    def __call__(self, times: np.ndarray) -> tuple[np.ndarray, int]:
        """(samples, calls) for a grid."""
        self.calls, count = 0, len(times) - 1
        padded = np.append(times, np.zeros(self.most - count)).astype(np.float32)
        x = np.asarray(self.run(self.given, self.keys, self.x, padded, jnp.int32(count)))
        jax.effects_barrier()
        return x, self.calls


def on_problem(problem: Problem, used: Solver, stochastic: bool, most: int) -> Walk:
    """The walk of a solver on the mixture."""
    denoise = problem.data.denoiser(problem.schedule)
    x = jnp.asarray(problem.noise[stochastic], jnp.float32)
    return Walk(used, lambda _, x, t: denoise(x, t), (), process.example_keys(jax.random.key(0), len(x)), x, most)


def on_network(run: trained.Trained, used: Solver, count: int, most: int) -> Walk:
    """The walk of a solver with a trained network: `experiments.sample` with the prompts and seeds of its grids."""
    settings, model = run.config.sample, run.model
    cond = models.grid_conditions(model, settings.prompts or ("",), None, count)[0]
    keys = jax.vmap(lambda seed: jax.random.split(jax.random.key(seed)))(jnp.arange(count, dtype=jnp.uint32))

    def denoise(given: Any, x: Array, t: Array) -> Array:
        params, cond, null = given
        plain = model.denoiser(params, cond, null, settings.scale)
        return (guide.threshold_static(plain) if settings.clip else plain)(x, t)

    x = process.prior(keys[:, 0], model.schedule, (count, *model.shape))
    return Walk(used, denoise, (run.params, cond, model.null(count)), keys[:, 1], x, most)


def affordable(run: Callable[[int], tuple[Any, int]], calls: int, guess: int) -> tuple[int, Any]:
    """(num_steps, result) of the longest run that takes at most `calls` calls; (0, None) where one step takes more."""
    best: tuple[int, Any] = (0, None)
    low, high = 0, calls + 1  # low is affordable, high is not: a step takes a call at least
    trial = min(max(guess, 1), calls)
    while high - low > 1:
        result, taken = run(trial)
        low, high, best = (trial, high, (trial, result)) if taken <= calls else (low, trial, best)
        trial = low + 1 if taken + max(1, taken // trial) > calls >= taken else (low + high) // 2
    return best


def errors_of(
    name: str,
    grids: Sequence[str],
    calls: Sequence[int],
    used: Schedule,
    walk_of: Callable[[Solver], Walk],
    error: Callable[[np.ndarray], float],
) -> Errors:
    """The errors of one solver on all grids."""
    walk, found, steps = walk_of(cli.call("solver", name, solver.ALL, schedule=used)), {}, {}
    for grid in grids:
        make = functools.partial(cli.call, "grid", grid, sample.GRIDS, schedule=used)
        for budget in calls:
            guess = steps.get(budget, budget)
            steps[budget], x = affordable(lambda n: walk(make(num_steps=n)), budget, guess)  # noqa: B023
            found[name, grid, budget] = float("nan") if x is None else error(x)
    return found


def is_stochastic(name: str) -> bool:
    """Whether the solver that is so written draws noise."""
    return name.partition("(")[0] not in solver.ORDER


def markdown(errors: Errors, calls: Sequence[int], floor: float | None = None) -> Iterator[str]:
    """A row for each solver, a column for each grid; a cell holds the errors, in thousandths, for each of `calls`."""
    names, grids = dict.fromkeys(key[0] for key in errors), dict.fromkeys(key[1] for key in errors)
    yield f"Errors x 1000 at {', '.join(map(str, calls))} calls" + (
        f"; exact samples: {1e3 * floor:.3g}" if floor else ""
    )
    yield ""
    yield f"| solver | {' | '.join(grids)} |"
    yield "|---" * (len(grids) + 1) + "|"
    for name in names:
        cells = [" ".join(shown(errors[name, grid, budget]) for budget in calls) for grid in grids]
        yield f"| {name} | {' | '.join(cells)} |"
    yield ""


def shown(error: float) -> str:
    """An error in thousandths with two digits; '-' where there is none."""
    return "-" if np.isnan(error) else f"{1e3 * error:.0f}" if error >= 0.0995 else f"{1e3 * error:.2g}"


def best(errors: Errors, calls: Sequence[int]) -> Iterator[str]:
    """The five best pairs for each number of calls."""
    for budget in calls:
        ranked = sorted((error, name, grid) for (name, grid, c), error in errors.items() if c == budget and error >= 0)
        listed = ", ".join(f"{name} on {grid} {shown(error)}" for error, name, grid in ranked[:5])
        yield f"- {budget} calls: {listed}"
    yield ""


def check(args: argparse.Namespace) -> None:
    """Raise ConfigError for names and numbers that could not be used, before anything runs."""
    if min(args.calls) < 1 or (args.rows or 2) < 2:
        raise ConfigError(f"--calls and --rows must be at least 1 and 2, got {args.calls} and {args.rows}.")
    for used in [cli.call("schedule", name, models.SCHEDULES) for name in args.schedule]:
        for name in args.solver:
            cli.call("solver", name, solver.ALL, schedule=used)
        for name in args.grid:
            cli.call("grid", name, sample.GRIDS, schedule=used, num_steps=1)


def table(args: argparse.Namespace) -> Iterator[str]:
    """The lines of the whole table."""
    rows = {stochastic: args.rows or count for stochastic, count in ROWS.items()}
    for schedule_name in args.schedule:
        problem = Problem(
            mixture(seed=args.seed), cli.call("schedule", schedule_name, models.SCHEDULES), rows, args.median
        )
        for stochastic in (False, True):
            errors: Errors = {}
            error = functools.partial(problem.error, stochastic=stochastic)
            walk_of = functools.partial(on_problem, problem, stochastic=stochastic, most=max(args.calls))
            for name in args.solver:
                if is_stochastic(name) == stochastic:
                    print(f"{schedule_name}: {name}", file=sys.stderr)
                    errors |= errors_of(name, args.grid, args.calls, problem.schedule, walk_of, error)
            if errors:
                yield f"### `{schedule_name}`, {'stochastic' if stochastic else 'deterministic'} solvers\n"
                yield from markdown(errors, args.calls, problem.floor if stochastic else None)
                yield from best(errors, args.calls)
        if args.diffusers:
            from experiments import solvers_diffusers

            yield f"### `{schedule_name}`, diffusers\n"
            yield from solvers_diffusers.table(problem, schedule_name, args.calls)


def network_table(args: argparse.Namespace) -> Iterator[str]:
    """The lines of the table of a trained network: distances to a run of many steps from the same noise."""
    run = trained.load(Path(args.workdir))
    used = run.model.schedule
    walk_of = functools.partial(on_network, run, count=args.rows or 8, most=max(150, *args.calls))
    truth = walk_of(solver.dpmpp_2m(used))(sample.log_snr_grid(used, 150, sigma_min=0.005))[0]
    other = walk_of(solver.unipc(used))(sample.karras_grid(used, 120, sigma_min=0.005))[0]

    def distance(x: np.ndarray) -> float:
        return float(np.sqrt(np.square(x - truth).mean()))

    yield f"Step {run.step}. unipc_2, 120 steps: {shown(distance(other))}\n"
    errors: Errors = {}
    for name in args.solver:
        print(name, file=sys.stderr)
        errors |= errors_of(name, args.grid, args.calls, used, walk_of, distance)
    yield from markdown(errors, args.calls)


def speed(names: Sequence[str], num_steps: int = 1000, rounds: int = 5) -> Iterator[str]:
    """Steps per second of `sample` with a denoiser that does next to nothing, 16 samples of 8 numbers; best round."""
    used = schedule.cosine()
    times = np.asarray(sample.uniform_grid(used, num_steps), np.float32)
    x, key = jnp.ones((16, 8)), jax.random.key(0)
    yield "| solver | compiled in, s | steps per second | microseconds a step |\n|---|---|---|---|"
    for name in names:
        solve = cli.call("solver", name, solver.ALL, schedule=used)
        start = time.perf_counter()
        run = jax.jit(lambda key, x, times, solve=solve: sample.sample(key, lambda x, t: 0.5 * x, x, times, solve))
        run(key, x, times).block_until_ready()
        first = time.perf_counter() - start
        taken = []
        for _ in range(rounds):
            start = time.perf_counter()
            run(key, x, times).block_until_ready()
            taken.append(time.perf_counter() - start)
        rate = num_steps / min(taken)
        yield f"| {name} | {first - min(taken):.2f} | {rate:,.0f} | {1e6 / rate:.1f} |"


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(prog="python -m experiments.solvers", description="The error of every solver on every grid.")
    add = parser.add_argument
    add("--solver", nargs="+", default=list(solver.ALL), help="names or 'name(option=value)' (default: all)")
    add("--grid", nargs="+", default=list(dict.fromkeys(GRIDS)), help="names or 'name(option=value)' (default: all)")
    add("--calls", nargs="+", type=int, default=[5, 10, 20, 50], help="network calls (default: 5 10 20 50)")
    add("--schedule", nargs="+", default=["ddpm_table", "rectified_flow"], help="(default: ddpm_table rectified_flow)")
    add("--rows", type=int, help="samples (default: 256 for deterministic solvers, 1024 for stochastic ones)")
    add("--seed", type=int, default=0, help="of the mixture: other random clusters (default: 0)")
    add("--median", action="store_true", help="the median over samples, not the root mean square")
    add("--diffusers", action="store_true", help="also diffusers' schedulers; needs torch and diffusers")
    add(
        "--workdir", help="a training run, whose network is used instead of the mixture; give a few --solver and --grid"
    )
    add("--speed", action="store_true", help="steps per second with a trivial denoiser, instead of errors")
    return parser


def run(argv: Sequence[str]) -> int:
    """The command line; returns the exit status."""
    args = cli.parse_args(_parser(), argv)
    check(args)
    lines = speed(args.solver) if args.speed else network_table(args) if args.workdir else table(args)
    for line in lines:
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    cli.main(run)
