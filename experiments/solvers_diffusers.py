"""The schedulers of diffusers on the problem of `experiments.solvers`. Needs torch and diffusers at run time.

Each has its own default settings, but for two: the betas are those of `ddpm_table` (some have others), and x0 is not
clipped to [-1, 1]. Their time index i is our t = (i + 1) / 1000, sigma of a flow is our t. Noise and denoiser are the
same as ours. As in a pipeline, the model sees `scale_model_input(x, t)` and answers with eps, or a flow's velocity.
"""

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.solvers import Problem, affordable, shown
from jaxdiff.errors import ConfigError
from jaxdiff.types import Array

FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
SDE = {"algorithm_type": "sde-dpmsolver++"}
# schedule -> (scheduler, its settings beside the defaults, whether it is stochastic)
SCHEDULERS: dict[str, list[tuple[str, dict[str, Any], bool]]] = {
    "ddpm_table": [
        ("DDIM", {}, False),
        ("EulerDiscrete", {}, False),
        ("HeunDiscrete", {}, False),
        ("KDPM2Discrete", {}, False),
        ("LMSDiscrete", {}, False),
        ("PNDM", {}, False),
        ("DPMSolverSinglestep", {}, False),
        ("DPMSolverMultistep", {}, False),
        ("DPMSolverMultistep", {"use_karras_sigmas": True}, False),
        ("DPMSolverMultistep", {"use_lu_lambdas": True}, False),
        ("DPMSolverMultistep", {"solver_order": 3}, False),
        ("UniPCMultistep", {}, False),
        ("DEISMultistep", {}, False),
        ("DDPM", {}, True),
        ("EulerAncestralDiscrete", {}, True),
        ("KDPM2AncestralDiscrete", {}, True),
        ("DPMSolverMultistep", SDE, True),
        ("SASolver", {}, True),
    ],
    "rectified_flow": [
        ("FlowMatchEulerDiscrete", {}, False),
        ("FlowMatchHeunDiscrete", {}, False),
        ("DPMSolverMultistep", FLOW, False),
        ("UniPCMultistep", FLOW, False),
        ("DPMSolverMultistep", FLOW | SDE, True),
    ],
}
BETAS = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear", "clip_sample": False}


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(f"--diffusers needs {name}. Type: pip install torch diffusers scipy.") from error


def build(name: str, settings: dict[str, Any], schedule_name: str) -> Any:
    """The scheduler of diffusers, with the betas of `ddpm_table` where it has betas."""
    kind = getattr(_library("diffusers"), f"{name}Scheduler")
    given = BETAS if schedule_name == "ddpm_table" else {}
    known = inspect.signature(kind).parameters
    return kind(**{key: value for key, value in given.items() if key in known}, **settings)


def model(problem: Problem, schedule_name: str) -> Callable[[Array, Array], Array]:
    """The exact network, jitted: (x, their time) -> eps, or the velocity eps - x0 of a flow."""
    denoise, used = problem.data.denoiser(problem.schedule), problem.schedule
    flow = schedule_name == "rectified_flow"

    @jax.jit
    def network(x: Array, index: Array) -> Array:
        t = index / 1000 if flow else (index + 1) / 1000
        x0 = denoise(x, t)
        eps = (x - used.alpha(t) * x0) / used.sigma(t)
        return eps - x0 if flow else eps

    return network


def sampler(problem: Problem, scheduler: Any, network: Callable, stochastic: bool) -> Callable:
    """`run(num_steps) -> (samples, calls)` in the loop that diffusers' pipelines have."""
    torch = _library("torch")
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters

    def run(num_steps: int) -> tuple[np.ndarray, int]:
        try:
            scheduler.set_timesteps(num_steps)
        except ValueError:  # PNDM's, below 4 steps
            return np.empty(0), sys.maxsize
        if len(scheduler.timesteps) > 2 * num_steps + 20:
            raise ConfigError(
                f"{type(scheduler).__name__} takes {len(scheduler.timesteps)} calls for {num_steps} steps."
            )
        options = {"generator": torch.Generator().manual_seed(0)} if takes_generator else {}
        x = torch.tensor(problem.noise[stochastic], dtype=torch.float32)
        x = x * getattr(scheduler, "init_noise_sigma", 1.0)
        for t in scheduler.timesteps:
            seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            answer = network(jnp.asarray(seen.numpy(), jnp.float32), jnp.float32(float(t)))
            x = scheduler.step(torch.from_numpy(np.array(answer)), t, x, **options).prev_sample
        return x.numpy(), len(scheduler.timesteps)

    return run


def table(problem: Problem, schedule_name: str, calls: Sequence[int]) -> Iterator[str]:
    """The lines of a table with a row for each scheduler; errors as in `solvers.markdown`."""
    network = model(problem, schedule_name)
    yield f"Errors x 1000; exact samples: {1e3 * problem.floor:.3g}"
    yield ""
    yield f"| scheduler | {' | '.join(f'{budget} calls' for budget in calls)} |"
    yield "|---" * (len(calls) + 1) + "|"
    for name, settings, stochastic in SCHEDULERS.get(schedule_name, ()):
        run = sampler(problem, build(name, settings, schedule_name), network, stochastic)
        errors = []
        for budget in calls:
            _, x = affordable(run, budget, budget)
            errors.append(float("nan") if x is None else problem.error(x, stochastic))
        extra = ", ".join(f"{key}={value}" for key, value in settings.items())
        label = f"{name}{f' ({extra})' if extra else ''}{', stochastic' if stochastic else ''}"
        yield f"| {label} | {' | '.join(map(shown, errors))} |"
    yield ""
