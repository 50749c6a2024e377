"""Second witness: diffusers' time grids against ours, and inversion. Theirs are often rounded to integer timesteps."""

import math
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import sample, schedule, solver
from tests.oracles import witness
from tests.oracles.gaussian import Mixture

diffusers = pytest.importorskip("diffusers", reason="needs the witness extra: torch, diffusers, k-diffusion")
diffusers.utils.logging.set_verbosity_error()
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # theirs, with NumPy 2

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
DATA = np.asarray(witness.MEANS)[[0, 0, 1, 2]] + 0.2 * np.random.default_rng(0).standard_normal((4, 2))
VP, FLOW = schedule.scaled_linear(), schedule.rectified_flow()


def rhos(used, times):
    """sigma / alpha at our times, float64."""
    with jax.enable_x64(True):
        return np.exp(-np.asarray(used.logsnr(jnp.asarray(times))) / 2)


@pytest.mark.parametrize("num_steps", [2, 10, 30])
@pytest.mark.parametrize(
    ("setting", "grid"),
    [
        ("use_karras_sigmas", sample.karras_grid),
        ("use_exponential_sigmas", sample.exponential_grid),
        ("use_beta_sigmas", sample.beta_sigma_grid),
    ],
)
def test_grids_in_sigma(setting, grid, num_steps):
    # Theirs take the first and the last sigma of the spacing for the range: with "linspace" those of the chain.
    theirs = diffusers.EulerDiscreteScheduler(**SD, **{setting: True}, timestep_spacing="linspace")
    theirs.set_timesteps(num_steps)
    sigma_min = math.sqrt(float((1 - theirs.alphas_cumprod[0]) / theirs.alphas_cumprod[0]))
    ours = rhos(VP, grid(VP, num_steps, sigma_min=sigma_min))
    np.testing.assert_allclose(ours[:-1], theirs.sigmas[:-1].numpy(), rtol=1e-5)
    assert float(theirs.sigmas[-1]) == 0
    assert ours[-1] < 1e-15


@pytest.mark.parametrize("num_steps", [1, 10, 50, 250, 1000])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_respacing_where_the_number_of_steps_divides_that_of_training(spacing, num_steps):
    theirs = diffusers.DDIMScheduler(timestep_spacing=spacing)
    theirs.set_timesteps(num_steps)
    ours = sample.respaced_grid(VP, num_steps, spacing=spacing)[:-1]
    np.testing.assert_allclose(ours, (theirs.timesteps.numpy() + 1) / 1000, atol=1e-12)


@pytest.mark.parametrize("num_steps", [2, 10, 33])
def test_linspace_respacing_up_to_their_rounding(num_steps):
    theirs = diffusers.DDIMScheduler(timestep_spacing="linspace")
    theirs.set_timesteps(num_steps)
    ours = sample.respaced_grid(VP, num_steps, spacing="linspace")[:-1]
    np.testing.assert_allclose(ours, (theirs.timesteps.numpy() + 1) / 1000, atol=0.5 / 1000 + 1e-12)


def test_flow_shifts_given_the_times_that_pipelines_give():
    times = np.linspace(1.0, 1 / 20, 20)  # as pipelines of FLUX and SD 3 pass them
    static = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    static.set_timesteps(sigmas=times.tolist())
    np.testing.assert_allclose(sample.flow_shift_grid(FLOW, 20), static.sigmas.numpy(), atol=2e-7)
    dynamic = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    for tokens in (256, 1024, 4096):
        slope = (1.15 - 0.5) / (4096 - 256)  # their pipelines' calculate_shift
        dynamic.set_timesteps(sigmas=times.tolist(), mu=tokens * slope + 0.5 - slope * 256)
        ours = sample.dynamic_shift_grid(FLOW, 20, tokens=tokens)
        np.testing.assert_allclose(ours, dynamic.sigmas.numpy(), atol=2e-7)


@pytest.mark.parametrize(
    ("table", "name", "used"),
    [
        ("sd1", "StableDiffusion", VP),
        ("sdxl", "StableDiffusionXL", VP),
        ("svd", "StableDiffusionVideo", schedule.edm(sigma_max=700.0)),
    ],
)
def test_align_your_steps_up_to_their_rounding(table, name, used):
    # Theirs are rounded to 3 digits, and end at 0 in place of the smallest level.
    theirs = diffusers.schedulers.AysSchedules[f"{name}Sigmas"]
    ours = rhos(used, sample.ays_grid(used, 10, table=table))
    np.testing.assert_allclose(ours[:-1], theirs[:-1], rtol=0.02)
    assert theirs[-1] == 0


@pytest.mark.parametrize("schedule_name", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_the_tables_are_the_same(schedule_name):
    theirs = diffusers.DDPMScheduler(beta_schedule=schedule_name)
    ours = {
        "linear": schedule.ddpm_table(),
        "scaled_linear": schedule.scaled_linear(beta_min=1e-4, beta_max=0.02),
        "squaredcos_cap_v2": schedule.cosine(),
    }[schedule_name]
    kept = np.square(np.asarray(ours.alpha(jnp.arange(1, 1000) / 1000)))
    np.testing.assert_allclose(kept, theirs.alphas_cumprod[:-1].numpy(), atol=2e-6)  # the last beta is clipped to 0.999


def test_zero_terminal_snr_is_the_same():
    theirs = diffusers.DDIMScheduler(**SD, rescale_betas_zero_snr=True)
    ours = schedule.zero_terminal_snr(VP)
    kept = np.square(np.asarray(ours.alpha(jnp.arange(1, 1001) / 1000)))
    np.testing.assert_allclose(kept, theirs.alphas_cumprod.numpy(), atol=2e-6)


def test_ddim_inversion_comes_back_with_order_two_and_theirs_with_order_one():
    # Song et al. 2021, sec. 4.3: there and back again. Theirs asks the network at (x_t, s), as if x_t were x_s.
    theirs = diffusers.DDIMInverseScheduler(**SD, clip_sample=False)
    data, x0 = Mixture(VP, witness.WEIGHTS, witness.MEANS, witness.VARIANCES), jnp.asarray(DATA, jnp.float32)
    errors = []
    for num_steps in (125, 500):
        theirs.set_timesteps(num_steps)
        times = np.append((theirs.timesteps.numpy()[::-1] + 1) / 1000, 0.0)
        with mock.patch.object(witness, "START", DATA):
            above = jnp.asarray(witness.theirs(theirs, space="vp")[-1], jnp.float32)
        latents = sample.invert(data.denoise, x0, times, solver.ddim_inversion(VP)), above
        down = jax.jit(lambda x, times: sample.sample(jax.random.key(0), data.denoise, x, times, solver.ddim(VP)))
        errors.append([float(jnp.sqrt(jnp.square(down(x, times) - x0).mean())) for x in latents])
    ours, others = np.log2(np.divide(*errors)) / 2
    assert ours > 1.5  # from t = 0, where sigma starts like sqrt(t)
    assert others < 1.1
    assert 3 * errors[0][0] < errors[0][1]
