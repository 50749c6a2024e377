"""Second witness: diffusers' schedulers against our solvers, on their own grids with the same noise.

Spaces: "vp" alpha^2 + sigma^2 = 1; "ve" alpha = 1; "flow" alpha + sigma = 1. Their two-call methods work in "ve", where
our Heun (the trapezoid rule in dx = x0 dalpha + eps dsigma) is theirs; on a VP schedule ours is another method of the
same order.
"""

import inspect
import re
import textwrap
from functools import partial
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import schedule, solver
from jaxdiff.denoise import LearnedRange, LearnedVariance
from tests.oracles import witness

torch = witness.torch
diffusers = pytest.importorskip("diffusers", reason="needs the witness extra: torch, diffusers, k-diffusion")
diffusers.utils.logging.set_verbosity_error()
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # theirs, with NumPy 2

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
VP, EDM, FLOW = schedule.scaled_linear(), schedule.edm(), schedule.rectified_flow()


def compare(
    scheduler, num_steps, make, used, space, *, calls=1, nodes=None, begin=0, answer=lambda x0: x0, **arguments
):
    """Their trajectory and ours at `nodes`, the calls of theirs that end a step: every `calls`-th, and the last."""
    scheduler.set_timesteps(num_steps)
    path = witness.theirs(scheduler, space=space, begin=begin, **arguments)
    nodes = nodes or [*range(0, len(path) - 1, calls), len(path) - 1]
    levels = witness.levels_of(scheduler)[begin:]
    rhos = [witness.rho_of(space, levels[n]) for n in nodes]
    np.testing.assert_allclose(witness.ours(make(used), used, rhos, answer=answer), path[nodes], atol=1e-5)


def theirs(name, **settings):
    """A maker of their scheduler."""
    own = name.startswith(("FlowMatch", "LTX", "EDM", "IPNDM", "CM"))
    return lambda: getattr(diffusers, f"{name}Scheduler")(**({} if own else SD), **settings)


FLOW_2M = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
ODD = {"lower_order_final": False, "final_sigmas_type": "sigma_min"}  # no lower order before the end, no step to 0
DETERMINISTIC = {
    "ddim": (theirs("DDIM", clip_sample=False), solver.ddim, VP, "vp", 1),
    "ddim, v": (
        theirs("DDIM", clip_sample=False, prediction_type="v_prediction", timestep_spacing="trailing"),
        solver.ddim, VP, "vp", 1,
    ),
    "euler": (theirs("EulerDiscrete"), solver.euler, EDM, "ve", 1),
    "euler is ddim": (theirs("EulerDiscrete"), solver.ddim, VP, "ve", 1),
    "heun": (theirs("HeunDiscrete"), solver.heun, EDM, "ve", 2),
    "heun, v": (theirs("HeunDiscrete", prediction_type="v_prediction"), solver.heun, EDM, "ve", 2),
    "dpm2": (theirs("KDPM2Discrete"), solver.dpm2, EDM, "ve", 2),
    "dpm2 on vp": (theirs("KDPM2Discrete"), solver.dpm2, VP, "ve", 2),
    "dpmpp_2s": (theirs("DPMSolverSinglestep", use_exponential_sigmas=True), solver.dpmpp_2s, VP, "vp", 2),
    "dpmpp_2m": (theirs("DPMSolverMultistep"), solver.dpmpp_2m, VP, "vp", 1),
    "dpmpp_2m, karras": (theirs("DPMSolverMultistep", use_karras_sigmas=True), solver.dpmpp_2m, VP, "vp", 1),
    "dpmpp_2m, sigma_min": (theirs("DPMSolverMultistep", **ODD), solver.dpmpp_2m, VP, "vp", 1),
    "dpmpp_1": (theirs("DPMSolverMultistep", solver_order=1), solver.ddim, VP, "vp", 1),
    "unipc, bh2": (theirs("UniPCMultistep"), solver.unipc, VP, "vp", 1),
    "unipc, bh1": (
        theirs("UniPCMultistep", solver_type="bh1", **ODD), partial(solver.unipc, variant="bh1"), VP, "vp", 1,
    ),
    "unipc 3, bh2": (theirs("UniPCMultistep", solver_order=3, **ODD), partial(solver.unipc, order=3), VP, "vp", 1),
    "unipc 3, bh1": (
        theirs("UniPCMultistep", solver_order=3, solver_type="bh1", **ODD),
        partial(solver.unipc, order=3, variant="bh1"), VP, "vp", 1,
    ),
    "deis 2": (  # theirs is a polynomial in log rho, which is the t of VE
        theirs("DEISMultistep", solver_order=2),
        partial(solver.deis, order=2), schedule.ve(), "vp", 1,
    ),
    "edm euler": (theirs("EDMEuler"), solver.euler, EDM, "ve", 1),
    "edm dpmpp_2m": (theirs("EDMDPMSolverMultistep"), solver.dpmpp_2m, EDM, "ve", 1),
    "flow euler": (theirs("FlowMatchEulerDiscrete", shift=3.0), solver.euler, FLOW, "flow", 1),
    "flow heun": (theirs("FlowMatchHeunDiscrete", shift=3.0), solver.heun, FLOW, "flow", 2),
    "flow dpmpp_2m": (theirs("DPMSolverMultistep", **FLOW_2M), solver.dpmpp_2m, FLOW, "flow", 1),
    "flow unipc": (theirs("UniPCMultistep", **FLOW_2M), solver.unipc, FLOW, "flow", 1),
}  # fmt: skip
"""name -> (their scheduler, our solver, schedule, space, calls of the network a step)."""


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_a_deterministic_scheduler_has_the_same_trajectory(name):
    make_theirs, make, used, space, calls = DETERMINISTIC[name]
    compare(make_theirs(), 20 if "ddim" in name else 21, make, used, space, calls=calls)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_lms_is_the_same_before_its_last_step(order):
    # To sigma = 0 theirs extrapolates, ours returns D.
    scheduler = theirs("LMSDiscrete")()
    compare(scheduler, 20, partial(solver.lms, order=order), EDM, "ve", nodes=list(range(20)), order=order)


def test_plms_is_the_same_before_its_last_step():
    scheduler = theirs("PNDM", skip_prk_steps=True)()
    nodes = [0, *range(2, 21)]  # the second call repeats the first step
    compare(scheduler, 20, solver.plms, VP, "vp", nodes=nodes)


def test_pndm_is_the_same_before_its_last_step():
    nodes = [0, 4, 8, *range(12, 29)]
    compare(theirs("PNDM")(), 20, solver.pndm, VP, "vp", nodes=nodes)


def test_ipndm_is_the_same_between_its_ends():
    # It starts at alpha = 0 (see the defects) and extrapolates to sigma = 0.
    scheduler = theirs("IPNDM")()
    compare(scheduler, 20, solver.ipndm, VP, "vp", nodes=list(range(19)), begin=1)


STOCHASTIC = {
    "ddim 0.5": (theirs("DDIM", clip_sample=False), partial(solver.ddim, eta=0.5), VP, "vp", {"eta": 0.5}),
    "ddim 1": (theirs("DDIM", clip_sample=False), partial(solver.ddim, eta=1.0), VP, "vp", {"eta": 1.0}),
    "ddpm small": (theirs("DDPM", clip_sample=False), solver.ddpm, VP, "vp", {}),
    "ddpm small log": (
        theirs("DDPM", clip_sample=False, variance_type="fixed_small_log"), solver.ddpm, VP, "vp", {},
    ),
    "ddpm large": (
        theirs("DDPM", clip_sample=False, variance_type="fixed_large"),
        partial(solver.ddpm, variance="fixed_large"), VP, "vp", {},
    ),
    "euler ancestral is ddim 1": (
        theirs("EulerAncestralDiscrete"), partial(solver.ddim, eta=1.0), EDM, "ve", {},
    ),
    "euler ancestral rf": (
        theirs("LTXEulerAncestralRF", eta=0.6), partial(solver.euler_ancestral_rf, eta=0.6), FLOW, "flow", {},
    ),
    "dpmpp_2m_sde": (
        theirs("DPMSolverMultistep", algorithm_type="sde-dpmsolver++"), solver.dpmpp_2m_sde, VP, "vp", {},
    ),
    "edm dpmpp_2m_sde": (
        theirs("EDMDPMSolverMultistep", algorithm_type="sde-dpmsolver++"), solver.dpmpp_2m_sde, EDM, "ve", {},
    ),
    "lcm": (theirs("LCM"), solver.consistency, VP, "vp", {}),
    "flow lcm": (theirs("FlowMatchEulerDiscrete", stochastic_sampling=True), solver.consistency, FLOW, "flow", {}),
    "consistency": (  # theirs leaves sigma_min in the data
        theirs("CMStochasticIterative", sigma_min=1e-6, clip_denoised=False), solver.consistency, EDM, "ve", {},
    ),
}  # fmt: skip
"""name -> (their scheduler, our solver, schedule, space, arguments of their step)."""


@pytest.mark.parametrize("name", STOCHASTIC)
def test_a_stochastic_scheduler_has_the_same_trajectory(name, monkeypatch):
    make_theirs, make, used, space, arguments = STOCHASTIC[name]
    noisy = lambda used: make(used, noise=witness.our_noise(used))  # noqa: E731
    compare(make_theirs(), 10, noisy, used, space, monkeypatch=monkeypatch, **arguments)


def test_tcd_is_the_same_before_its_last_step(monkeypatch):
    # gamma 0.3 of times that are multiples of 1 / 100, so that nothing is rounded; theirs ends at timestep 0.
    make = lambda used: solver.tcd(used, gamma=0.3, noise=witness.our_noise(used))  # noqa: E731
    compare(theirs("TCD")(), 4, make, VP, "vp", nodes=[0, 1, 2, 3], monkeypatch=monkeypatch, eta=0.3)


@pytest.mark.parametrize("tau", [0.0, 1.0])
def test_sa_solver_is_the_same_without_its_extra_term(tau, monkeypatch):
    # Theirs replaces an integral by h^2 / 2 at order 2, "a modification that does not influence the convergence order".
    scheduler = theirs("SASolver", tau_func=lambda t: tau, lower_order_final=False)()
    module = inspect.getmodule(type(scheduler))
    for name in ("stochastic_adams_bashforth_update", "stochastic_adams_moulton_update"):
        source, found = textwrap.dedent(inspect.getsource(getattr(module.SASolverScheduler, name))), {}
        assert source.count("order == 2") == 1
        exec(source.replace("order == 2", "False"), vars(module), found)
        monkeypatch.setattr(module.SASolverScheduler, name, found[name])
    make = lambda used: solver.sa_solver(used, tau=tau, noise=witness.our_noise(used))  # noqa: E731
    nodes = list(range(21))  # theirs is the corrected x, from the next call on: compare the predictions
    compare(scheduler, 20, make, VP, "vp", nodes=nodes, monkeypatch=monkeypatch)


def test_the_comparison_sees_a_thousandth_of_the_noise(monkeypatch):
    make = lambda used: solver.ddim(used, eta=0.999, noise=witness.our_noise(used))  # noqa: E731
    with pytest.raises(AssertionError, match="Mismatched"):
        compare(theirs("DDIM", clip_sample=False)(), 10, make, VP, "vp", monkeypatch=monkeypatch, eta=1.0)


@pytest.mark.parametrize(
    ("variance", "answer"),
    [
        ("learned_range", lambda x0: LearnedRange(x0, (witness.learned(x0, jnp) + 1) / 2)),
        ("learned", lambda x0: LearnedVariance(x0, witness.learned(x0, jnp))),  # theirs is told the variance itself
    ],
)
def test_ddpm_with_a_learned_variance(variance, answer, monkeypatch):
    scheduler = theirs("DDPM", clip_sample=False, variance_type=variance)()
    make = lambda used: solver.ddpm(used, variance=variance, noise=witness.our_noise(used))  # noqa: E731
    compare(scheduler, 10, make, VP, "vp", monkeypatch=monkeypatch, answer=answer)


def test_dpm_solver_sde_is_dpmpp_sde_where_both_halves_of_a_step_see_one_path(monkeypatch):
    module = "diffusers.schedulers.scheduling_dpmsolver_sde"
    monkeypatch.setattr(f"{module}.BrownianTreeNoiseSampler", lambda *_: witness.one_path())
    make = lambda used: solver.dpmpp_sde(used, noise=witness.our_noise(used))  # noqa: E731
    compare(theirs("DPMSolverSDE")(), 10, make, EDM, "ve", calls=2)


def test_every_solver_is_compared_or_has_no_counterpart():
    sources = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_witness_*.py"))
    compared = set(re.findall(r"\bsolver\.(\w+)", sources))
    helpers = {"ALL", "ORDER", "DISTILLED", "fresh", "predict", "brownian_path"}
    without = {
        "midpoint",  # midway in t, not in log-SNR: that is dpm2
        "adaptive",  # Diffrax's step sizes
        "annealed_langevin",
        "restart",
    }
    assert set(solver.__all__) - helpers - compared == without
