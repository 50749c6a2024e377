"""Solvers: pairs (init, step) of pure functions. To add one: a function in a file of its family, a row in `ALL`.

    forward process        x_t = alpha_t x0 + sigma_t eps
    what a network knows   x0 = D(x_t, t),  eps = (x_t - alpha_t x0) / sigma_t
    probability flow       dx = x0 dalpha + eps dsigma        (any schedule; no 1 / alpha, so pure noise can start)
    noise from s to t      var_ts = sigma_t^2 - (alpha_t sigma_s / alpha_s)^2 = sigma_t^2 (1 - SNR_t / SNR_s)

A step goes from time t to s < t (only `ddim_inversion` goes up). Where sigma_s = 0 every solver returns D, the answer
to its last call. All settings (eta, order, ...) are Python numbers, checked at once: traced ones are refused.
Orders of convergence (deterministic ones, smooth grids): see `ORDER`. Notation of times: t = 0 data, t = 1 noise.
"""

from collections.abc import Callable
from functools import partial

from jaxdiff.solver.adaptive import adaptive
from jaxdiff.solver.ancestral import ddim, ddim_inversion, ddpm, euler_ancestral_rf
from jaxdiff.solver.base import fresh, predict
from jaxdiff.solver.brownian import brownian_path
from jaxdiff.solver.consistency import consistency, tcd
from jaxdiff.solver.dpm import dpmpp_2m, dpmpp_2s, dpmpp_3m
from jaxdiff.solver.dpm_sde import dpmpp_2m_sde, dpmpp_3m_sde, dpmpp_sde
from jaxdiff.solver.langevin import annealed_langevin, predictor_corrector
from jaxdiff.solver.multistep import deis, ipndm, lms, plms, pndm
from jaxdiff.solver.restart import restart
from jaxdiff.solver.runge_kutta import dpm2, euler, heun, midpoint
from jaxdiff.solver.sa import sa_solver
from jaxdiff.solver.unipc import unipc
from jaxdiff.types import Schedule, Solver

__all__ = [
    "ALL",
    "DISTILLED",
    "ORDER",
    "adaptive",
    "annealed_langevin",
    "brownian_path",
    "consistency",
    "ddim",
    "ddim_inversion",
    "ddpm",
    "deis",
    "dpm2",
    "dpmpp_2m",
    "dpmpp_2m_sde",
    "dpmpp_2s",
    "dpmpp_3m",
    "dpmpp_3m_sde",
    "dpmpp_sde",
    "euler",
    "euler_ancestral_rf",
    "fresh",
    "heun",
    "ipndm",
    "lms",
    "midpoint",
    "plms",
    "pndm",
    "predict",
    "predictor_corrector",
    "restart",
    "sa_solver",
    "tcd",
    "unipc",
]

ALL: dict[str, Callable[[Schedule], Solver]] = {
    "ddpm": ddpm,
    "ddpm_large": partial(ddpm, variance="fixed_large"),
    "ddim": ddim,
    "ddim_eta1": partial(ddim, eta=1.0),
    "euler_ancestral_rf": euler_ancestral_rf,
    "euler": euler,
    "heun": heun,
    "heun_churn": partial(heun, gamma=0.2),
    "midpoint": midpoint,
    "dpm2": dpm2,
    "dpmpp_2s": dpmpp_2s,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_3m": dpmpp_3m,
    "unipc_2": unipc,
    "unipc_3": partial(unipc, order=3),
    "deis_2": partial(deis, order=2),
    "deis_3": deis,
    "lms": lms,
    "plms": plms,
    "pndm": pndm,
    "ipndm": ipndm,
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "dpmpp_3m_sde": dpmpp_3m_sde,
    "dpmpp_sde": dpmpp_sde,
    "sa_solver": sa_solver,
    "predictor_corrector": lambda schedule: predictor_corrector(schedule, ddim(schedule, eta=1.0)),
    "annealed_langevin": partial(annealed_langevin, step_size=0.5, num_moves=10),
    "restart": lambda schedule: restart(schedule, heun(schedule), sigma_range=(0.8, 2.5)),
}
"""Every solver that `sample` takes, by name. The oracle tests judge whatever is listed: by its order, or by moments."""

DISTILLED: dict[str, Callable[[Schedule], Solver]] = {"consistency": consistency, "tcd": tcd}
"""The samplers of distilled networks (consistency functions). With a posterior mean they are wrong: so not in `ALL`."""

ORDER: dict[str, int] = {
    "ddim": 1,
    "euler": 1,
    "heun": 2,
    "midpoint": 2,
    "dpm2": 2,
    "dpmpp_2s": 2,
    "dpmpp_2m": 2,
    "dpmpp_3m": 3,
    "unipc_2": 3,
    "unipc_3": 3,
    "deis_2": 2,
    "deis_3": 3,
    "lms": 2,
    "plms": 2,
    "pndm": 2,
    "ipndm": 2,
}
"""The order of convergence of the deterministic ones; a solver of `ALL` that is not here is stochastic.

A multistep method is stated with its start, over equal steps: after short first steps `lms` and `unipc_3` have order 4.
The weights of `plms`, `pndm` and `ipndm` are constant, so their steps must be equal in some smooth function of t.

It holds where sigma and alpha are smooth in the grid. Where sigma starts like sqrt(t) (VP, cosine, DDPM's tables), a
grid uniform in t down to t = 0 lowers order 2 towards 1 in its last steps: use `log_snr_grid` or `karras_grid` there.
"""
