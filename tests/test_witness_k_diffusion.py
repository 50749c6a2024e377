"""Second witness: k-diffusion's samplers, sigmas and likelihood against ours, on the same grid with the same noise.

All on EDM's schedule, whose space (alpha = 1) is k-diffusion's. Where they differ by a defect, the closed form decides.
"""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import likelihood, process, sample, schedule, solver
from tests.oracles import witness
from tests.oracles.gaussian import Mixture

torch = witness.torch
EDM = schedule.edm()
SIGMAS = np.append(np.linspace(40 ** (1 / 7), 0.02 ** (1 / 7), 12) ** 7, 0.0).astype(np.float32)


@pytest.fixture(scope="module")
def k():
    return witness.k_sampling()


def compare(theirs, ours):
    assert theirs.shape == ours.shape
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "arguments", "make"),
    [
        ("euler", {}, solver.euler),
        ("euler", {}, solver.ddim),
        ("heun", {}, solver.heun),
        ("dpm_2", {}, solver.dpm2),
        ("dpmpp_2s_ancestral", {"eta": 0.0}, solver.dpmpp_2s),
        ("dpmpp_2m", {}, solver.dpmpp_2m),
        ("dpmpp_2m_sde", {"eta": 0.0}, solver.dpmpp_2m),
    ],
)
def test_a_deterministic_sampler_has_the_same_trajectory(k, name, arguments, make):
    theirs = witness.k_theirs(getattr(k, f"sample_{name}"), SIGMAS, **arguments)
    compare(theirs, witness.ours(make(EDM), EDM, SIGMAS))


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_lms_is_the_same_before_its_last_step(k, order):
    # To sigma = 0 theirs extrapolates, ours returns D.
    theirs = witness.k_theirs(k.sample_lms, SIGMAS, order=order)
    compare(theirs[:-1], witness.ours(solver.lms(EDM, order=order), EDM, SIGMAS)[:-1])


@pytest.mark.parametrize("eta", [0.5, 1.0])
@pytest.mark.parametrize(("name", "make"), [("euler_ancestral", solver.ddim), ("dpmpp_2m_sde", solver.dpmpp_2m_sde)])
def test_a_stochastic_sampler_has_the_same_trajectory(k, name, make, eta):
    theirs = witness.k_theirs(getattr(k, f"sample_{name}"), SIGMAS, eta=eta, noise_sampler=witness.k_noise)
    compare(theirs, witness.ours(make(EDM, eta=eta, noise=witness.our_noise(EDM)), EDM, SIGMAS))


def test_dpmpp_sde_is_the_same_where_both_halves_of_a_step_see_one_path(k):
    theirs = witness.k_theirs(k.sample_dpmpp_sde, SIGMAS, noise_sampler=witness.one_path())
    compare(theirs, witness.ours(solver.dpmpp_sde(EDM, noise=witness.our_noise(EDM)), EDM, SIGMAS))


def corrected_3m(k):
    """Theirs with the one line mended that makes it of order 2: the quadratic term counts twice."""
    source = inspect.getsource(inspect.unwrap(k.sample_dpmpp_3m_sde))
    assert source.count("- phi_3 * d2") == 1
    found = {}
    exec(source.replace("- phi_3 * d2", "- 2 * phi_3 * d2"), vars(k), found)
    return found["sample_dpmpp_3m_sde"]


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_dpmpp_3m_sde_is_the_same_but_for_half_a_term_of_theirs(k, eta):
    ours = witness.ours(solver.dpmpp_3m_sde(EDM, eta=eta, noise=witness.our_noise(EDM)), EDM, SIGMAS)
    arguments = {"eta": eta, "noise_sampler": witness.k_noise}
    compare(witness.k_theirs(corrected_3m(k), SIGMAS, **arguments), ours)
    assert np.abs(witness.k_theirs(k.sample_dpmpp_3m_sde, SIGMAS, **arguments) - ours).max() > 1e-3


@pytest.mark.parametrize("name", ["euler", "heun"])
def test_churn_gives_the_same_samples(k, name, monkeypatch):
    num_steps, s_churn, s_noise, s_range = len(SIGMAS) - 1, 3.0, 1.01, (0.05, 30.0)
    keys = process.example_keys(jax.random.key(0), len(witness.START))
    draws = [
        process.normal(jax.vmap(jax.random.fold_in, (0, None))(keys, n), witness.START.shape) for n in range(num_steps)
    ]
    waiting = iter(draws)
    monkeypatch.setattr(torch, "randn_like", lambda x: witness.tensor(next(waiting)))
    theirs = witness.k_theirs(
        getattr(k, f"sample_{name}"), SIGMAS, s_churn=s_churn, s_noise=s_noise, s_tmin=s_range[0], s_tmax=s_range[1]
    )
    solve = getattr(solver, name)(EDM, gamma=s_churn / num_steps, noise_scale=s_noise, sigma_range=s_range)
    compare(theirs[-1], witness.ours(solve, EDM, SIGMAS)[-1])  # in between, theirs reports x after its noise


@pytest.mark.parametrize("num_steps", [2, 10, 50])
def test_the_sigmas_are_the_same(k, num_steps):
    for ours, theirs in (
        (sample.karras_grid, k.get_sigmas_karras),
        (sample.exponential_grid, k.get_sigmas_exponential),
    ):
        with jax.enable_x64(True):
            sigmas = EDM.sigma(jnp.asarray(ours(EDM, num_steps, sigma_min=0.02, sigma_max=80.0)))
        np.testing.assert_allclose(sigmas, theirs(num_steps, 0.02, 80.0), rtol=2e-6)


def test_the_vp_schedule_is_the_same(k):
    t = np.linspace(1, 1e-3, 20)
    with jax.enable_x64(True):
        rho = jnp.exp(-schedule.vp().logsnr(jnp.asarray(t)) / 2)
    theirs = k.get_sigmas_vp(20)[:-1].double()
    np.testing.assert_allclose(rho**2, theirs**2, rtol=2e-6, atol=2e-7)  # theirs is exp(u) - 1 in float32


def test_the_likelihood_is_the_same_and_the_truth(k):
    # In one dimension their random divergence (a sign, twice) is the divergence itself. Data: a mixture at 0.02.
    weights, means, variances = (0.3, 0.7), (-0.7, 0.3), (0.04, 0.09)
    w, m, v = (torch.tensor(row, dtype=torch.float64) for row in (weights, means, variances))

    def log_components(x, sigma):
        return w.log() + torch.distributions.Normal(m, (v + sigma**2).sqrt()).log_prob(x)

    def denoise(x, sigma):
        sigma = sigma.reshape(-1, 1)
        return (log_components(x, sigma).softmax(1) * (m + v / (v + sigma**2) * (x - m))).sum(1, keepdim=True)

    x = np.linspace(-1.5, 1.5, 7)[:, None]
    truth = log_components(torch.from_numpy(x), torch.tensor(0.02)).logsumexp(1).numpy()
    theirs, _ = k.log_likelihood(denoise, torch.from_numpy(x), 0.02, 80.0, atol=1e-7, rtol=1e-7)
    with jax.enable_x64(True):
        data = Mixture(EDM, weights, tuple((mean,) for mean in means), variances)
        times = witness.times_of(EDM, np.geomspace(80.0, 0.02, 81))
        run = jax.jit(lambda x: likelihood.log_prob(jax.random.key(0), data.denoise, x, times, schedule=EDM))
        ours = np.asarray(run(jnp.asarray(x)))
    np.testing.assert_allclose(ours, theirs.detach().numpy(), atol=1e-5)
    np.testing.assert_allclose(ours, truth, atol=1e-3)  # the prior is N(0, 80^2), not the data's own law at 80
