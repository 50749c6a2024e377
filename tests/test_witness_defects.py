"""Defects of diffusers 0.42 and k-diffusion 0.1.1, each shown wrong by a closed form that ours meets.

Where nothing else is said the data are N(0, 0.25), whose denoiser and probability flow are known, or a single point,
which every sampler must return, and about which x_t has the variance sigma_t^2 at any number of steps.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import process, sample, schedule, solver
from tests.oracles import witness
from tests.oracles.gaussian import Gaussian
from tests.oracles.sampling import order

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
    ours = jax.jit(lambda key, x, t, s: solver.euler(EDM, gamma=0.4).step(key, lambda x, t: 0 * x, x, t, s, ())[0])
    ratios = []
    for sigma, following, t in zip(sigmas[:-1], sigmas[1:], theirs.timesteps, strict=True):
        x = torch.tensor([[1.0], [0.0]])
        theirs.scale_model_input(x, t)
        a, b = theirs.step(x / sigma, t, x, s_churn=8.0).prev_sample.flatten().tolist()  # a point at 0: eps = x / sigma
        times = jnp.asarray(witness.times_of(EDM, [sigma, following]), jnp.float32)
        out = ours(keys(), jnp.asarray([[1.0], [0.0]]), *times)
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
    rounded, told = np.asarray([[error_of_2m(theirs, n, r) for n in (50, 200)] for r in (True, False)])
    with jax.enable_x64(True):
        data, x = Gaussian(VP, 0.0, 1e-3), jnp.ones((1, 1))
        run = jax.jit(lambda times: sample.sample(jax.random.key(0), data.denoise, x, times, solver.dpmpp_2m(VP)))
        times = [sample.karras_grid(VP, n, sigma_min=0.0292)[:-1] for n in (50, 200)]
        ours = np.asarray([abs(float((run(jnp.asarray(t)) - data.flow(x, t[0], t[-1]))[0, 0])) for t in times])
    slopes = [np.log2(errors[0] / errors[1]) / 2 for errors in (rounded, told, ours)]
    assert slopes[0] < 0.5
    assert min(slopes[1:]) > 1.8  # `told`: their solver, told the noise level that it uses
    assert rounded[1] > 10 * ours[1]


def test_unipc_bh1_is_not_a_number_at_its_default_end():
    # B(h) = h is infinite in the step to 0, and is multiplied by a sum of no terms.
    theirs = diffusers.UniPCMultistepScheduler(**SD, solver_type="bh1")
    theirs.set_timesteps(10)
    assert np.isnan(witness.theirs(theirs, space="vp")[-1]).all()
    ours = witness.ours(solver.unipc(VP, variant="bh1"), VP, witness.levels_of(theirs))
    alpha, sigma = witness.scales("vp", witness.levels_of(theirs)[-2])
    assert np.abs(ours[-1] - witness.exact(ours[-2].astype(np.float64), alpha, sigma)).max() < 0.05


def quadratic(lam):
    """A denoiser that depends on the log-SNR alone, and is of degree 2 in half of it."""
    return 0.3 - 0.2 * lam + 0.5 * lam**2


def third_step(x, rhos, eta):
    """x at rhos[3] from x at rhos[2], exactly, in the space alpha = 1; the noise is 0."""
    (start, end), (points, weights) = -np.log(rhos[2:4]), np.polynomial.legendre.leggauss(20)
    h, lam = end - start, (start + end) / 2 + (end - start) / 2 * points
    pulled = (1 + eta) * np.exp(-(1 + eta) * (end - lam)) * quadratic(lam) * weights * h / 2
    return np.exp(-(1 + eta) * h) * x + pulled.sum()


def error_of_third_step(path, rhos, eta):
    return float(np.abs(path[3] - third_step(path[2], np.asarray(rhos), eta)).max())


RHOS = np.geomspace(5.0, 0.2, 17)


def our_third_step(make, eta):
    with jax.enable_x64(True):
        x, times = jnp.full((1, 1), 5.0), witness.times_of(EDM, RHOS)
        denoise = lambda x, t: jnp.broadcast_to(quadratic(EDM.logsnr(t) / 2), x.shape)  # noqa: E731
        silent = make(EDM) if eta == 0 else make(EDM, eta=eta, noise=lambda key, x, t, s: 0 * x)
        run = jax.jit(lambda x: sample.sample(jax.random.key(0), denoise, x, times, silent, return_trajectory=True)[1])
        return error_of_third_step(np.asarray(run(x)), RHOS, eta)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_dpmpp_3m_of_k_diffusion_counts_half_of_the_quadratic_term(eta):
    # A method of order 3 is exact where D is quadratic in log-SNR. Theirs multiplies phi_3 by D'' h^2 / 2, not D'' h^2.
    path = []
    witness.k_sampling().sample_dpmpp_3m_sde(
        lambda x, sigma: x * 0 + quadratic(-sigma.log()[0]),
        torch.full((1, 1), 5.0, dtype=torch.float64),
        torch.from_numpy(RHOS),
        callback=lambda info: path.append(info["x"].numpy()),
        noise_sampler=lambda sigma, sigma_next: torch.zeros(1, 1),
        disable=True,
        eta=eta,
    )
    assert 1e-4 < error_of_third_step(path, RHOS, eta) < 5e-3  # of the size h^3
    assert our_third_step(solver.dpmpp_3m_sde if eta else solver.dpmpp_3m, eta) < 1e-10


@pytest.mark.parametrize(("algorithm", "eta"), [("dpmsolver++", 0.0), ("sde-dpmsolver++", 1.0)])
def test_dpmpp_3m_of_diffusers_has_that_half_too_and_a_wrong_sign_with_noise(algorithm, eta, monkeypatch):
    theirs = diffusers.DPMSolverMultistepScheduler(
        **SD, algorithm_type=algorithm, solver_order=3, prediction_type="sample", final_sigmas_type="sigma_min"
    )
    theirs.set_timesteps(16)
    theirs.sigmas = torch.from_numpy(RHOS.astype(np.float32))
    theirs.set_begin_index(0)
    monkeypatch.setattr(f"{type(theirs).__module__}.randn_tensor", lambda *_, **__: torch.zeros(1, 1))
    norms = np.hypot(1, RHOS)
    path = [torch.full((1, 1), 5.0 / norms[0])]
    for n in range(3):
        d = torch.full((1, 1), quadratic(-math.log(RHOS[n])))
        path.append(theirs.step(d, theirs.timesteps[n], path[-1]).prev_sample)
    error = error_of_third_step([float(x) * norm for x, norm in zip(path, norms[:4], strict=True)], RHOS, eta)
    assert error > (0.01 if eta else 1e-4)  # the sign, - 1/2 for + 1/2: an error of the size h^2


def test_ipndm_forgets_the_data_in_its_first_step():
    # From pure noise (alpha = 0) it divides 0 by 1e-8 for x0, and so takes 0. The data are a point at 1.
    theirs = diffusers.IPNDMScheduler()
    theirs.set_timesteps(10)
    x = torch.full((1, 1), 0.7)
    reached = float(theirs.step(-torch.ones(1, 1), theirs.timesteps[0], x).prev_sample)  # v = alpha eps - sigma x0
    alpha, sigma = float(theirs.alphas[1]), float(theirs.betas[1])
    assert reached == pytest.approx(sigma * 0.7, rel=1e-6)
    cosine = schedule.cosine()
    times = jnp.asarray([1.0, float(cosine.inverse(jnp.float32(2 * math.log(alpha / sigma))))], jnp.float32)
    solve = solver.ipndm(cosine)
    ours, _ = solve.step(None, lambda x, t: 0 * x + 1, jnp.asarray(x), *times, solve.init(jnp.asarray(x)))
    assert float(ours[0, 0]) == pytest.approx(alpha + sigma * 0.7, rel=1e-5)


@pytest.mark.parametrize("num_steps", [40, 50])
def test_beta_sigmas_crash_where_two_times_round_to_one_integer(num_steps):
    theirs = diffusers.DPMSolverMultistepScheduler(**SD, use_beta_sigmas=True)
    theirs.set_timesteps(num_steps)
    assert len(set(theirs.timesteps.tolist())) < num_steps
    x = torch.zeros(1, 1)
    for t in theirs.timesteps[:-1]:  # as a pipeline runs it: it starts at the second of the two equal times
        x = theirs.step(x, t, x).prev_sample
    with pytest.raises(IndexError):
        theirs.step(x, theirs.timesteps[-1], x)
    times = sample.beta_sigma_grid(VP, num_steps, sigma_min=0.0292)
    data, start = Gaussian(VP, 0.0, VARIANCE), jnp.ones((1, 1))
    ours = sample.sample(jax.random.key(0), data.denoise, start, times, solver.dpmpp_2m(VP))
    assert abs(float(ours[0, 0]) - float(data.flow(start, times[0], 0.0)[0, 0])) < 0.05


def order_of_theirs(scheduler, num_steps=96):
    """Over log-SNR from -4 to 4, on N(0, 0.25), in float64."""
    errors = []
    for count in (num_steps, 2 * num_steps):
        scheduler.set_timesteps(count)
        rhos = np.geomspace(math.exp(2), math.exp(-2), count + 1)
        scheduler.sigmas, scheduler.timesteps = torch.from_numpy(rhos), torch.arange(count, 0, -1)
        scheduler.set_begin_index(0)
        x = torch.ones(1, 1, dtype=torch.float64)
        for rho, t in zip(rhos, scheduler.timesteps, strict=False):
            alpha, sigma = witness.scales("vp", rho)
            x = scheduler.step(sigma / (alpha**2 * VARIANCE + sigma**2) * x, t, x).prev_sample
        start, end = (math.sqrt((rho**2 + VARIANCE) / (rho**2 + 1)) for rho in rhos[[0, -1]])
        errors.append(abs(float(x) - end / start))
    return math.log2(errors[0] / errors[1])


@pytest.mark.parametrize(
    ("name", "settings", "make"),
    [
        ("DEISMultistep", {}, solver.deis),  # at the start: the error of its first step, h^2, stays
        ("UniPCMultistep", {"final_sigmas_type": "sigma_min"}, partial(solver.unipc, order=3)),  # at the end, below
        ("DPMSolverMultistep", {"final_sigmas_type": "sigma_min"}, solver.dpmpp_3m),  # by half of a term, above
    ],
)
def test_a_method_of_order_three_is_of_order_two(name, settings, make):
    theirs = getattr(diffusers, f"{name}Scheduler")(**SD, solver_order=3, **settings)
    assert order_of_theirs(theirs) < 2.3
    grid = lambda used, count: witness.times_of(used, np.geomspace(math.exp(2), math.exp(-2), count + 1))  # noqa: E731
    assert order(make, EDM, grid, 96) > 2.7


def test_unipc_loses_that_order_in_its_last_steps():
    theirs = diffusers.UniPCMultistepScheduler(
        **SD, solver_order=3, final_sigmas_type="sigma_min", lower_order_final=False
    )
    assert order_of_theirs(theirs) > 2.7


def test_the_langevin_corrector_lets_one_example_change_another(monkeypatch):
    # Its step is made of norms that are averaged over the batch.
    monkeypatch.setattr("diffusers.schedulers.scheduling_sde_ve.randn_tensor", lambda shape, **_: torch.ones(shape))
    theirs = diffusers.ScoreSdeVeScheduler()
    theirs.set_timesteps(10)
    theirs.set_sigmas(10)
    first, second = (
        theirs.step_correct(-x, x).prev_sample[0] for x in (torch.tensor([[1.0], [1.0]]), torch.tensor([[1.0], [9.0]]))
    )
    assert abs(float(first - second)) > 1e-3
    ours = solver.predictor_corrector(EDM, solver.ddim(EDM)).step
    run = jax.jit(lambda keys, x: ours(keys, Gaussian(EDM).denoise, x, jnp.float32(0.6), jnp.float32(0.5), ())[0])
    first, second = (
        run(process.example_keys(jax.random.key(0), 2), jnp.asarray(x))[0] for x in ([[1.0], [1.0]], [[1.0], [9.0]])
    )
    assert float(first[0]) == float(second[0])
