"""Second witness: diffusers' schedulers against our solvers, on their own grids with the same noise.

Spaces: "vp" alpha^2 + sigma^2 = 1; "ve" alpha = 1; "flow" alpha + sigma = 1. Their two-call methods work in "ve", where
our Heun (the trapezoid rule in dx = x0 dalpha + eps dsigma) is theirs; on a VP schedule ours is another method of the
same order.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import schedule, solver
from jaxdiff.denoise import LearnedRange
from tests.oracles import witness

torch = witness.torch
diffusers = pytest.importorskip("diffusers", reason="needs the witness extra: torch, diffusers, k-diffusion")
diffusers.utils.logging.set_verbosity_error()
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # theirs, with NumPy 2

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
VP, EDM, FLOW = schedule.scaled_linear(), schedule.edm(), schedule.rectified_flow()


def compare(
    scheduler, num_steps, make, used, space, *, calls=1, monkeypatch=None, answer=lambda x0: x0, **step_arguments
):
    """Their trajectory and ours; `calls` of the network a step, 1 in the last."""
    scheduler.set_timesteps(num_steps)
    path = witness.theirs(scheduler, space=space, monkeypatch=monkeypatch, **step_arguments)
    nodes = [*range(0, len(path) - 1, calls), len(path) - 1]
    assert len(nodes) == num_steps + 1
    levels = np.asarray(witness.levels_of(scheduler))[nodes]
    with np.errstate(divide="ignore"):
        rhos = levels / (1 - levels) if space == "flow" else levels
    np.testing.assert_allclose(witness.ours(make(used), used, rhos, answer=answer), path[nodes], atol=1e-5)


def flow_of(scheduler):
    """Its settings for a rectified flow."""
    return scheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)


DETERMINISTIC = {
    "ddim": (lambda: diffusers.DDIMScheduler(**SD, clip_sample=False), solver.ddim, VP, "vp", 1),
    "ddim, v": (
        lambda: diffusers.DDIMScheduler(
            **SD, clip_sample=False, prediction_type="v_prediction", timestep_spacing="trailing"
        ),
        solver.ddim,
        VP,
        "vp",
        1,
    ),
    "euler": (lambda: diffusers.EulerDiscreteScheduler(**SD), solver.euler, EDM, "ve", 1),
    "euler is ddim": (lambda: diffusers.EulerDiscreteScheduler(**SD), solver.ddim, VP, "ve", 1),
    "heun": (lambda: diffusers.HeunDiscreteScheduler(**SD), solver.heun, EDM, "ve", 2),
    "dpmpp_2m": (lambda: diffusers.DPMSolverMultistepScheduler(**SD), solver.dpmpp_2m, VP, "vp", 1),
    "dpmpp_2m, karras": (
        lambda: diffusers.DPMSolverMultistepScheduler(**SD, use_karras_sigmas=True),
        solver.dpmpp_2m,
        VP,
        "vp",
        1,
    ),
    "edm euler": (diffusers.EDMEulerScheduler, solver.euler, EDM, "ve", 1),
    "edm dpmpp_2m": (diffusers.EDMDPMSolverMultistepScheduler, solver.dpmpp_2m, EDM, "ve", 1),
    "flow euler": (lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), solver.euler, FLOW, "flow", 1),
    "flow heun": (lambda: diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0), solver.heun, FLOW, "flow", 2),
    "flow dpmpp_2m": (lambda: flow_of(diffusers.DPMSolverMultistepScheduler), solver.dpmpp_2m, FLOW, "flow", 1),
}
"""name -> (their scheduler, our solver, schedule, space, calls of the network a step)."""


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_a_deterministic_scheduler_has_the_same_trajectory(name):
    make_theirs, make, used, space, calls = DETERMINISTIC[name]
    compare(make_theirs(), 20, make, used, space, calls=calls)


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_ddim_with_noise(eta, monkeypatch):
    theirs = diffusers.DDIMScheduler(**SD, clip_sample=False)
    make = lambda used: solver.ddim(used, eta=eta, noise=witness.our_noise(used))  # noqa: E731
    compare(theirs, 10, make, VP, "vp", monkeypatch=monkeypatch, eta=eta)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_small_log", "fixed_large"])
def test_ddpm(variance, monkeypatch):
    theirs = diffusers.DDPMScheduler(**SD, clip_sample=False, variance_type=variance)
    ours = variance.removesuffix("_log")  # theirs are two ways to write one number
    make = lambda used: solver.ddpm(used, variance=ours, noise=witness.our_noise(used))  # noqa: E731
    compare(theirs, 10, make, VP, "vp", monkeypatch=monkeypatch)


def test_ddpm_with_a_learned_variance(monkeypatch):
    theirs = diffusers.DDPMScheduler(**SD, clip_sample=False, variance_type="learned_range")
    make = lambda used: solver.ddpm(used, variance="learned_range", noise=witness.our_noise(used))  # noqa: E731
    answer = lambda x0: LearnedRange(x0, (witness.learned(x0, jnp) + 1) / 2)  # noqa: E731
    compare(theirs, 10, make, VP, "vp", monkeypatch=monkeypatch, answer=answer)
