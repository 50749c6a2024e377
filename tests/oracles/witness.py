"""The second witness: other people's samplers, driven step by step with an exact denoiser, on their own grids.

    one problem    x0 ~ a mixture of Gaussians in the plane, whose denoiser is known
    one grid       the noise levels rho = sigma / alpha that they visit, turned into our times
    one noise      a smooth function of (rho from, rho to) that both are given
    one measure    samples divided by sqrt(alpha^2 + sigma^2), so that spaces with alpha = 1 and others compare

`theirs` is diffusers' loop of a pipeline. The network is told the noise level that the scheduler uses, also where the
scheduler would tell it a rounded timestep: what is compared is the solver.
"""

import importlib
import importlib.util
import itertools
import math
import sys
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import sample
from tests.oracles.gaussian import Mixture

torch = pytest.importorskip("torch", reason="needs the witness extra: torch, diffusers, k-diffusion")

WEIGHTS, MEANS, VARIANCES = (0.5, 0.3, 0.2), ((0.6, -0.4), (-0.7, 0.2), (0.1, 0.9)), (0.05, 0.09, 0.02)
START = np.random.default_rng(0).standard_normal((4, 2))
"""Where every run starts, in the scale alpha^2 + sigma^2 = 1."""

_RATES = np.random.default_rng(1).uniform(0.5, 2.0, (3, 4, 2))
_FLOOR = -12.0  # log rho of "no noise", so that both sides call it the same


def exact(x, alpha, sigma):
    """E[x0 | x = alpha x0 + sigma eps] of the mixture; NumPy, float64."""
    delta = x[:, None, :] - alpha * np.asarray(MEANS)
    variances = np.asarray(VARIANCES)[:, None]
    total = alpha**2 * variances + sigma**2
    log_p = np.log(WEIGHTS) - ((delta**2) / total + np.log(total)).sum(-1) / 2
    weights = np.exp(log_p - log_p.max(1, keepdims=True))
    x0 = MEANS + alpha * variances / total * delta
    return np.einsum("bk,bkd->bd", weights / weights.sum(1, keepdims=True), x0)


def wave(log_from, log_to):
    """The shared noise of a step, (4, 2), from the logarithms of rho before and after."""
    a, b, phase = _RATES
    log_from, log_to = (np.clip(u, _FLOOR, -_FLOOR) for u in (log_from, log_to))
    return math.sqrt(2) * np.cos(a * log_from + b * log_to + 6 * phase)


def our_noise(used):
    """`wave` as a `noise` of our solvers."""

    def noise(key, x, t, s):
        a, b, phase = (jnp.asarray(rate, x.dtype) for rate in _RATES)
        log_from, log_to = (jnp.clip(-used.logsnr(u) / 2, _FLOOR, -_FLOOR).astype(x.dtype) for u in (t, s))
        return math.sqrt(2) * jnp.cos(a * log_from + b * log_to + 6 * phase)

    return noise


def level_log(rho):
    """log rho, finite."""
    return math.log(min(max(float(rho), math.exp(_FLOOR)), math.exp(-_FLOOR)))


def times_of(used, rhos):
    """Our times of their noise levels rho = sigma / alpha, float64; 0 and infinity are the ends."""
    rhos = np.asarray(rhos, np.float64)
    with jax.enable_x64(True), np.errstate(divide="ignore"):
        return np.asarray(used.inverse(jnp.asarray(np.clip(-2 * np.log(rhos), -1e3, 1e3))))


def ours(solver, used, rhos, dtype=jnp.float32, answer=lambda x0: x0):
    """Our trajectory (N + 1, 4, 2) over their noise levels, in the common scale; the denoiser returns `answer(x0)`."""
    with jax.enable_x64(dtype == jnp.float64):
        times = jnp.asarray(times_of(used, rhos), dtype)
        norm = np.hypot(used.alpha(times), used.sigma(times))[:, None, None]
        data = Mixture(used, WEIGHTS, MEANS, VARIANCES)
        denoise = lambda x, t: answer(data.denoise(x, t))  # noqa: E731
        run = jax.jit(
            lambda x, times: sample.sample(jax.random.key(0), denoise, x, times, solver, return_trajectory=True)[1]
        )
        return np.asarray(run(jnp.asarray(START * norm[0], dtype), times)) / norm


def tensor(x):
    """NumPy to torch float32, what their pipelines compute in."""
    return torch.from_numpy(np.array(x, np.float32))


def scales(space, level):
    """(alpha, sigma) of a noise level of theirs: rho in "vp" and "ve", sigma itself in "flow"."""
    if space == "flow":
        return 1 - level, level
    alpha = 1.0 if space == "ve" else 1 / math.sqrt(1 + level**2)
    return alpha, level * alpha


def rho_of(space, level):
    """sigma / alpha of a noise level of theirs."""
    alpha, sigma = scales(space, level)
    return sigma / alpha if alpha > 0 else math.inf


def level_of(scheduler, t):
    """The noise level that the scheduler computes with at its present call."""
    index = getattr(scheduler, "_step_index", None)
    index = (getattr(scheduler, "_begin_index", None) or 0) if index is None else index
    if not getattr(scheduler, "state_in_first_order", True):  # the second call of a step
        if hasattr(scheduler, "sigmas_interpol"):
            return float(scheduler.sigmas_interpol[index])
        if hasattr(scheduler, "mid_point_sigma"):
            return float(scheduler.mid_point_sigma)
    if hasattr(scheduler, "sigmas"):
        return float(scheduler.sigmas[index])
    if not hasattr(scheduler, "alphas_cumprod"):
        return levels_of(scheduler)[index]
    kept = float(scheduler.alphas_cumprod[t])
    return math.sqrt((1 - kept) / kept)


def levels_of(scheduler):
    """Their noise level before the first call and after each call."""
    if hasattr(scheduler, "sigmas"):
        return [float(sigma) for sigma in scheduler.sigmas]
    if not hasattr(scheduler, "alphas_cumprod"):  # IPNDM's own, alpha^2 + beta^2 = 1
        return (scheduler.betas.double() / scheduler.alphas.double()).tolist()
    kept = [float(scheduler.alphas_cumprod[t]) for t in scheduler.timesteps]
    kept.append(float(getattr(scheduler, "final_alpha_cumprod", 1.0)))
    return [math.sqrt((1 - k) / k) for k in kept]


def learned(x0, np=np):
    """A variance, or its logarithm, that a network might have learned: in [-1, 1], like x0."""
    return np.sin(3 * x0)


def answer(scheduler, x, alpha, sigma):
    """What a perfect network returns to the scheduler, in its `prediction_type`."""
    x0 = exact(x, alpha, sigma)
    eps = (x - alpha * x0) / sigma
    other = "v_prediction" if type(scheduler).__name__ == "IPNDMScheduler" else "flow_prediction"
    kind = getattr(scheduler.config, "prediction_type", other)
    if hasattr(scheduler, "precondition_outputs"):
        data = scheduler.config.sigma_data
        total = sigma**2 + data**2
        return (x0 - data**2 / total * x) * math.sqrt(total) / (sigma * data)
    if hasattr(scheduler, "get_scalings_for_boundary_condition"):
        skip, out = (float(c) for c in scheduler.get_scalings_for_boundary_condition(torch.tensor(sigma)))
        return (x0 - skip * x) / out
    value = {
        "epsilon": eps,
        "sample": x0,
        "v_prediction": (alpha * eps - sigma * x0) / math.hypot(alpha, sigma),
        "flow_prediction": eps - x0,
    }[kind]
    # The variance itself for "learned": they take its square root.
    kinds = {"learned_range": learned, "learned": lambda x0: np.exp(learned(x0))}
    variance = kinds.get(getattr(scheduler.config, "variance_type", None))
    return value if variance is None else np.concatenate([value, variance(x0)], axis=1)


def theirs(scheduler, *, space, begin=0, monkeypatch=None, **step_arguments):
    """diffusers' loop over its timesteps from number `begin`: every sample it returns, in the common scale.

    `monkeypatch` replaces their draws by `wave`.
    """
    levels = levels_of(scheduler)[begin:]
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)  # a timestep that occurs twice would be taken for its second place
    alpha, sigma = scales(space, levels[0])
    x = tensor(START * math.hypot(alpha, sigma))
    path = [START]
    for n, t in enumerate(scheduler.timesteps[begin:]):
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(x, t)
        level = level_of(scheduler, t)
        if monkeypatch is not None:
            noise = tensor(wave(*(level_log(rho_of(space, levels[i])) for i in (n, n + 1))))
            monkeypatch.setattr(f"{type(scheduler).__module__}.randn_tensor", lambda *_, noise=noise, **__: noise)
        output = answer(scheduler, x.double().numpy(), *scales(space, level))
        x = scheduler.step(tensor(output), t, x, **step_arguments).prev_sample
        path.append(x.double().numpy() / math.hypot(*scales(space, levels[n + 1])))
    return np.stack(path)


def k_sampling():
    """k-diffusion's `sampling` alone: importing its package needs accelerate, clip, wandb, kornia and more."""
    spec = importlib.util.find_spec("k_diffusion")
    if spec is None:
        pytest.skip("needs k-diffusion: pip install --no-deps k-diffusion==0.1.1.post1")
    package, utils = (types.ModuleType(name) for name in ("k_diffusion", "k_diffusion.utils"))
    package.__path__ = spec.submodule_search_locations
    package.utils = utils
    utils.append_dims = lambda x, ndim: x[(...,) + (None,) * (ndim - x.ndim)]
    with mock.patch.dict(sys.modules, {"k_diffusion": package, "k_diffusion.utils": utils}):
        return importlib.import_module("k_diffusion.sampling")


def k_noise(sigma, sigma_next):
    """`wave` as k-diffusion's noise sampler."""
    return tensor(wave(level_log(sigma), level_log(sigma_next)))


def one_path():
    """`k_noise` for a method that draws for (t, m), then for the whole step (t, s), with m midway.

    The second is what the draws for (t, m) and (m, s) add up to, as ours takes them.
    """
    calls = itertools.count()

    def noise_sampler(t, s):
        if next(calls) % 2 == 0:
            return k_noise(t, s)
        m = torch.sqrt(t * s)
        first, second = s**2 / m * torch.sqrt(1 - (m / t) ** 2), s * torch.sqrt(1 - (s / m) ** 2)
        return (first * k_noise(t, m) + second * k_noise(m, s)) / (s * torch.sqrt(1 - (s / t) ** 2))

    return noise_sampler


def k_theirs(sampler, sigmas, **arguments):
    """k-diffusion's trajectory over `sigmas`, in the common scale, (N + 1, 4, 2)."""
    xs = []
    norm = np.hypot(1.0, np.asarray(sigmas, np.float64))[:, None, None]
    last = sampler(
        lambda x, sigma: tensor(exact(x.double().numpy(), 1.0, float(sigma[0]))),
        tensor(START * norm[0]),
        torch.as_tensor(sigmas),
        callback=lambda info: xs.append(info["x"]),
        disable=True,
        **arguments,
    )
    return torch.stack([*xs, last]).double().numpy() / norm
