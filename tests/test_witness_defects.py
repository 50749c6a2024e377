"""Defects of diffusers 0.42 and k-diffusion 0.1.1, each shown wrong by a closed form that ours meets.

Where nothing else is said the data are N(0, 0.25), whose denoiser and probability flow are known, or a single point,
which every sampler must return, and about which x_t has the variance sigma_t^2 at any number of steps.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import process, sample, schedule, solver
from tests.oracles import witness
from tests.oracles.gaussian import Gaussian

torch = witness.torch
diffusers = pytest.importorskip("diffusers", reason="needs the witness extra: torch, diffusers, k-diffusion")
diffusers.utils.logging.set_verbosity_error()
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # theirs, with NumPy 2

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
VP, EDM, FLOW = schedule.scaled_linear(), schedule.edm(), schedule.rectified_flow()
VARIANCE = 0.25


def rho_at(scheduler, t):
    """sigma / alpha at an integer timestep, as the chain defines it."""
    kept = float(scheduler.alphas_cumprod[int(t)])
    return math.sqrt((1 - kept) / kept)


def test_churn_asks_the_network_before_the_noise(monkeypatch):
    # EDM, Algorithm 2, line 6: at (x + noise, sigma_hat). One linear step of each unit: x' = a x + b noise.
    theirs = diffusers.EulerDiscreteScheduler(**SD, use_karras_sigmas=True)
    theirs.set_timesteps(20)
    sigmas = [float(s) for s in theirs.sigmas]
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_euler_discrete.randn_tensor", lambda *_, **__: torch.tensor([[0.0], [1.0]])
    )
    keys = lambda: process.example_keys(jax.random.key(0), 2)  # noqa: E731
    unit = np.asarray(process.normal(keys(), (2, 1)))[:, 0]
    ours = solver.euler(EDM, gamma=0.4)
    ratios = []
    for sigma, following, t in zip(sigmas[:-1], sigmas[1:], theirs.timesteps, strict=True):
        x = torch.tensor([[1.0], [0.0]])
        theirs.scale_model_input(x, t)
        a, b = theirs.step(x / sigma, t, x, s_churn=8.0).prev_sample.flatten().tolist()  # a point at 0: eps = x / sigma
        times = jnp.asarray(witness.times_of(EDM, [sigma, following]), jnp.float32)
        out, _ = ours.step(keys(), lambda x, t: 0 * x, jnp.asarray([[1.0], [0.0]]), *times, ())
        our_b = float(out[1, 0]) / unit[1]
        our_a = float(out[0, 0]) - our_b * unit[0]
        if following > 0:
            ratios.append([(a**2 * sigma**2 + b**2) / following**2, (our_a**2 * sigma**2 + our_b**2) / following**2])
        else:
            assert our_a == our_b == 0
            assert b == pytest.approx(math.sqrt(0.96) * sigma, rel=1e-4)  # a data set of one point, not returned
    np.testing.assert_allclose(np.asarray(ratios)[:, 1], 1, rtol=1e-3)
    assert min(np.asarray(ratios)[:, 0]) > 1.2


def test_fixed_large_log_is_not_a_number():
    theirs = diffusers.DDPMScheduler(**SD, clip_sample=False, variance_type="fixed_large_log")
    theirs.set_timesteps(10)
    zero = torch.zeros(4096, 1)
    assert theirs.step(zero, theirs.timesteps[3], zero).prev_sample.isnan().all()
    t, s = (theirs.timesteps[3:5].double().numpy() + 1) / 1000
    kept = [float(theirs.alphas_cumprod[i]) for i in theirs.timesteps[3:5]]
    ours = solver.ddpm(VP, variance="fixed_large")
    values, _ = ours.step(
        process.example_keys(jax.random.key(0), 4096),
        lambda x, t: 0 * x,
        jnp.zeros((4096, 1)),
        *jnp.asarray([t, s], jnp.float32),
        (),
    )
    beta = 1 - kept[0] / kept[1]
    assert abs(float(values.var()) / beta - 1) < 3 * math.sqrt(2 / 4095)


def test_trailing_gives_one_step_too_many():
    theirs = diffusers.DDIMScheduler(timestep_spacing="trailing")
    wrong = []
    for num_steps in range(1, 1001):
        theirs.set_timesteps(num_steps)
        wrong += [num_steps] if len(theirs.timesteps) != num_steps else []
        assert len(sample.respaced_grid(VP, num_steps, spacing="trailing")) == num_steps + 1
    assert len(wrong) == 62
    assert wrong[:3] == [61, 103, 121]


def test_a_flow_shift_is_applied_twice():
    # Esser et al. 2024, eq. 23: t becomes s t / (1 + (s - 1) t). Their last time before 0 is shifted once more.
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    theirs.set_timesteps(4)
    once = lambda t: 3 * t / (1 + 2 * t)  # noqa: E731
    assert float(theirs.sigmas[-2]) == pytest.approx(once(once(1 / 1000)), rel=1e-4)
    shifted = schedule.shift(FLOW, time=3.0)
    t = sample.uniform_grid(shifted, 4)
    np.testing.assert_allclose(shifted.sigma(jnp.asarray(t, jnp.float32)), once(t), rtol=1e-6)


def test_ddim_steps_to_a_time_other_than_the_next():
    # It goes to t - T // N, also where the next timestep is elsewhere: here from 111 to 11, then asks at 0.
    theirs = diffusers.DDIMScheduler(**SD, clip_sample=False, timestep_spacing="linspace")
    theirs.set_timesteps(10)
    t, s = (int(i) for i in theirs.timesteps[-2:])
    sigma = lambda i: math.sqrt(1 - float(theirs.alphas_cumprod[i]))  # noqa: E731
    x = torch.full((1, 1), sigma(t))  # the data are a point at 0, eps is 1: x at s must be sigma(s)
    reached = float(theirs.step(torch.ones(1, 1), t, x).prev_sample)
    assert reached == pytest.approx(sigma(t - 100), rel=1e-5)
    assert reached > 3 * sigma(s)
    times = jnp.asarray([(t + 1) / 1000, (s + 1) / 1000], jnp.float32)
    ours, _ = solver.ddim(VP).step(None, lambda x, t: 0 * x, jnp.asarray(x), *times, ())
    assert float(ours[0, 0]) == pytest.approx(sigma(s), rel=1e-4)


def error_of_2m(scheduler, num_steps, rounded):
    """From the exact flow, before the last step; the network is told the timestep it is given, or the noise level."""
    variance = 1e-3  # detail as fine as the smallest noise
    scheduler.set_timesteps(num_steps)
    scheduler.set_begin_index(0)
    x = torch.ones(1, 1)
    for n, t in enumerate(scheduler.timesteps[:-1]):
        rho = rho_at(scheduler, t) if rounded else float(scheduler.sigmas[n])
        alpha, sigma = witness.scales("vp", rho)
        x = scheduler.step(sigma / (alpha**2 * variance + sigma**2) * x, t, x).prev_sample
    (a, b), (c, d) = (witness.scales("vp", float(scheduler.sigmas[n])) for n in (0, -2))
    return abs(float(x) - math.hypot(c * math.sqrt(variance), d) / math.hypot(a * math.sqrt(variance), b))


def test_times_rounded_to_integers_lose_the_order():
    theirs = diffusers.DPMSolverMultistepScheduler(**SD, use_karras_sigmas=True)
    rounded, told = np.asarray([[error_of_2m(theirs, n, r) for n in (50, 100, 200)] for r in (True, False)])
    assert np.log2(rounded[:-1] / rounded[1:]).max() < 0.5
    np.testing.assert_allclose(np.log2(told[:-1] / told[1:]), 2, atol=0.3)  # the same solver, told the noise level
    with jax.enable_x64(True):
        data, x = Gaussian(VP, 0.0, 1e-3), jnp.ones((1, 1))
        run = jax.jit(lambda times: sample.sample(jax.random.key(0), data.denoise, x, times, solver.dpmpp_2m(VP)))
        times = [sample.karras_grid(VP, n, sigma_min=0.0292)[:-1] for n in (50, 100, 200)]
        ours = np.asarray([abs(float((run(jnp.asarray(t)) - data.flow(x, t[0], t[-1]))[0, 0])) for t in times])
    np.testing.assert_allclose(np.log2(ours[:-1] / ours[1:]), 2, atol=0.3)
    assert rounded[-1] > 10 * ours[-1]
