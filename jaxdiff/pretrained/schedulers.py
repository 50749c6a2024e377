"""The scheduler_config.json of diffusers as our schedule, target, times and solver.

    index i of T training steps  <->  t = (i + 1) / T            beta_i: linear, scaled_linear, squaredcos_cap_v2
    leading     i = k (T // N) + steps_offset,  k = N - 1 .. 0        trailing    i = T - k T / N - 1,  k = 0 .. N - 1
    linspace    i = (T - 1) k / (N - 1),        k = N - 1 .. 0        then t = 0, or 1 / T (set_alpha_to_one false)
    flow        t = s u / (1 + (s - 1) u), N numbers u from 1 to the shifted 1 / T (FLUX: to 1 / N), then t = 0;
                s is a constant, or exp(mu) with mu linear in the tokens of the picture; the network is told T t

Indices stay real numbers where theirs are rounded. Lin et al. 2024 (table 2; zero terminal SNR); Esser et al. 2024 (eq.
23) for the shift, which a constant one of diffusers' scheduler applies to the last time twice.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxdiff import sample, target
from jaxdiff import schedule as schedules
from jaxdiff.denoise import TimeInput, time_index
from jaxdiff.errors import CheckpointError, ConfigError, check_count
from jaxdiff.pretrained.layout import Settings
from jaxdiff.types import Array, Schedule, Target

SOLVERS = {
    "DDPMScheduler": "ddpm", "DDIMScheduler": "ddim", "PNDMScheduler": "plms", "LMSDiscreteScheduler": "lms",
    "EulerDiscreteScheduler": "euler", "EulerAncestralDiscreteScheduler": "ddim_eta1", "HeunDiscreteScheduler": "heun",
    "KDPM2DiscreteScheduler": "dpm2", "DPMSolverMultistepScheduler": "dpmpp_2m", "UniPCMultistepScheduler": "unipc_2",
    "DPMSolverSinglestepScheduler": "dpmpp_2s", "DEISMultistepScheduler": "deis_2",
    "FlowMatchEulerDiscreteScheduler": "euler",
}  # fmt: skip
"""Their class -> the name in `solver.ALL`."""
TARGETS = {"epsilon": target.eps, "v_prediction": target.v, "sample": target.x0}
_TO_FIRST = ("ddim", "ddim_eta1", "plms", "pndm")
"""The solvers whose counterparts can end at the first training step instead of at 0."""


class Chain(NamedTuple):
    """What a scheduler_config.json says: `times(num_steps, solver)` gives the grid for the solver of that name.

    A third argument, `tokens`, is how many a transformer makes of the picture, where the times are shifted by that.
    """

    schedule: Schedule
    target: Target
    time_input: TimeInput
    solver: str
    clip: float | None
    times: Callable[..., np.ndarray]


def read(config: Mapping[str, Any], *, to_last: bool = False) -> Chain:
    """The chain of a scheduler_config.json. Raises CheckpointError for a class or a setting that is not known here.

    to_last: of a flow, the times of FLUX's pipeline, which does not leave them to its scheduler.
    """
    if not isinstance(config, Mapping):
        raise CheckpointError(f"scheduler_config.json must be a JSON object, got {config!r:.60}.")
    kind = config.get("_class_name", "DDIMScheduler")
    if not isinstance(kind, str) or kind not in SOLVERS:
        raise CheckpointError(
            f"scheduler_config.json: _class_name must be one of {', '.join(SOLVERS)}, got {kind!r:.60}."
        )
    settings = Settings(config)
    if kind == "FlowMatchEulerDiscreteScheduler":
        return _flow(settings, to_last)
    schedule = _schedule(settings)
    prediction = settings.one_of("prediction_type", "epsilon", list(TARGETS))
    clip = settings.number("clip_sample_range", 1.0) if _clips(kind, settings) else None
    spacing = settings.one_of("timestep_spacing", _SPACING.get(kind, "linspace"), ["leading", "linspace", "trailing"])
    offset = settings.integer("steps_offset", 0, least=0)
    first = not settings.flag("set_alpha_to_one", kind != "PNDMScheduler")
    karras = settings.flag("use_karras_sigmas", False)

    def times(num_steps: int, solver: str = SOLVERS[kind], tokens: int = 0) -> np.ndarray:
        if karras:
            return sample.karras_grid(schedule, num_steps)
        last = 1 / schedule.T if first and solver in _TO_FIRST else 0.0
        return np.append((_indices(num_steps, schedule.T, spacing, offset) + 1) / schedule.T, last)

    return Chain(schedule, TARGETS[prediction], whole_index(schedule.T), SOLVERS[kind], clip, times)


def _flow(settings: Settings, to_last: bool) -> Chain:
    """The chain of a flow: straight lines, their velocity, and times shifted towards noise."""
    T, shift = settings.integer("num_train_timesteps", 1000, least=2), settings.number("shift", 1.0)
    dynamic = settings.flag("use_dynamic_shifting", False)
    settings.one_of("time_shift_type", "exponential", ["exponential"])
    ends = [settings.integer(f"{name}_image_seq_len", n) for name, n in (("base", 256), ("max", 4096))]
    mus = [settings.number(f"{name}_shift", mu) for name, mu in (("base", 0.5), ("max", 1.15))]
    settings.finish()
    if not 0 < shift <= _MAX_SHIFT or ends[0] == ends[1] or max(map(abs, mus)) > math.log(_MAX_SHIFT):
        raise CheckpointError(
            f"scheduler_config.json: shift must be in (0, {_MAX_SHIFT}], base_shift and max_shift its logarithms, and "
            f"base_image_seq_len differ from max_image_seq_len; got {shift}, {mus} and {ends}."
        )

    def times(num_steps: int, solver: str = "euler", tokens: int = 4096) -> np.ndarray:
        check_count("num_steps", num_steps, "Stable Diffusion 3 is used with 28, FLUX schnell with 4.")
        mu = mus[0] + (mus[1] - mus[0]) * (tokens - ends[0]) / (ends[1] - ends[0])
        if not abs(mu) <= math.log(_MAX_SHIFT):
            raise ConfigError(f"tokens must be about {ends[0]} to {ends[1]}, as the chain was made for, got {tokens}.")
        s = math.exp(mu) if dynamic else shift
        first = 1 / T if dynamic else _shifted(1 / T, s)
        last = 1 / num_steps if to_last else first
        return np.append(_shifted(np.linspace(1, last, num_steps), s), 0.0)

    return Chain(schedules.rectified_flow(), target.velocity, flow_index(T), "euler", None, times)


_MAX_SHIFT = 10_000
"""Published are shifts of 1 to 12; what is far beyond leaves no time but 1."""


def _shifted(u: Any, s: float) -> Any:
    return s * u / ((1 - u) + s * u)  # so written, it is exactly 1 at u = 1


@functools.cache  # so that two models of one chain are equal
def flow_index(T: int) -> TimeInput:
    """T t."""
    return lambda schedule, t: T * t


_SPACING = {"DDIMScheduler": "leading", "DDPMScheduler": "leading", "PNDMScheduler": "leading"}


@functools.cache  # so that two models of one chain are equal
def whole_index(T: int) -> TimeInput:
    """`denoise.time_index`, exact where it is a whole number: float32 holds t, and so the index, only to 1e-4."""
    index_of = time_index(T)

    def time_input(schedule: Schedule, t: Array) -> Array:
        index = index_of(schedule, t)
        whole = jnp.round(index)
        return jnp.where(jnp.abs(index - whole) < 1e-3, whole, index)

    return time_input


def _schedule(settings: Settings) -> schedules.Table:
    T = settings.integer("num_train_timesteps", 1000, least=2)
    low, high = settings.number("beta_start", 1e-4), settings.number("beta_end", 0.02)
    kind = settings.one_of("beta_schedule", "linear", ["linear", "scaled_linear", "squaredcos_cap_v2"])
    betas = settings.get("trained_betas", None)
    if betas is None and not (0 < low < 1 and 0 < high < 1):
        raise CheckpointError(
            f"scheduler_config.json: beta_start and beta_end must be in (0, 1), got {low} and {high}."
        )
    if betas is None:
        betas = {"linear": _linear, "scaled_linear": _scaled_linear, "squaredcos_cap_v2": _cosine}[kind](low, high, T)
    try:
        table = schedules.from_betas(np.asarray(betas, np.float64))
    except (ConfigError, TypeError, ValueError) as error:
        raise CheckpointError(f"scheduler_config.json: trained_betas are not a chain: {error}") from error
    return schedules.zero_terminal_snr(table) if settings.flag("rescale_betas_zero_snr", False) else table


def _linear(low: float, high: float, T: int) -> np.ndarray:
    return np.linspace(low, high, T)


def _scaled_linear(low: float, high: float, T: int) -> np.ndarray:
    return np.linspace(low**0.5, high**0.5, T) ** 2


def _cosine(low: float, high: float, T: int) -> np.ndarray:
    """Nichol & Dhariwal 2021, eq. 17, each beta at most 0.999."""
    alpha2 = np.cos((np.arange(T + 1) / T + 0.008) / 1.008 * math.pi / 2) ** 2
    return np.minimum(1 - alpha2[1:] / alpha2[:-1], 0.999)


def _clips(kind: str, settings: Settings) -> bool:
    return settings.flag("clip_sample", kind in ("DDPMScheduler", "DDIMScheduler"))


def _indices(num_steps: int, T: int, spacing: str, offset: int) -> np.ndarray:
    """The N training indices, decreasing."""
    check_count("num_steps", num_steps, "Stable Diffusion is used with 20 to 50.")
    if num_steps > T:
        raise ConfigError(f"num_steps must be at most the {T} of training, got {num_steps}.")
    if spacing == "leading":
        indices = np.arange(num_steps - 1, -1, -1) * (T // num_steps) + offset
    elif spacing == "trailing":
        indices = T - np.arange(num_steps) * T / num_steps - 1
    else:
        indices = np.linspace(T - 1, 0, num_steps) if num_steps > 1 else np.array([T - 1])
    return np.minimum(indices, T - 1).astype(np.float64)
