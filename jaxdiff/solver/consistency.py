"""Few-step sampling by distilled networks: D(x_t, t) is a consistency function, a point of the flow through x_t.

    x_s = alpha_s D + sigma_s (k eps + sqrt(1 - k^2) new),    eps = (x_t - alpha_t D) / sigma_t      (`base.mix`)

    consistency    k = 0: all noise is new; D = f(x_t, t), the flow's end at t = 0
    tcd            down to s' = (1 - gamma) s along the flow, then up to s with new noise: k^2 = SNR_s / SNR_s'

With the true function any number of steps is exact. With a posterior mean (any network not distilled) it is not.
"""

import jax.numpy as jnp

from jaxdiff.denoise import estimate
from jaxdiff.errors import ConfigError
from jaxdiff.solver.base import fresh, mix, no_memory
from jaxdiff.types import Array, Denoiser, Key, Noise, PyTree, Schedule, Solver


def consistency(schedule: Schedule, *, noise: Noise = fresh) -> Solver:
    """Multistep consistency sampling (Song et al. 2023, Algorithm 1): to the data, then up to s with new noise.

    On a VP schedule it is the sampler of latent consistency models, LCM (Luo et al. 2023, Algorithm 3). Karras et al.'s
    EDM keeps sigma_min in the data; here the data are clean. For networks distilled to consistency functions.
    """

    def step(key: Key, denoise: Denoiser, x: Array, t: Array, s: Array, memory: PyTree) -> tuple[Array, PyTree]:
        x0 = estimate(denoise(x, t))
        return schedule.alpha(s) * x0 + schedule.sigma(s) * noise(key, x, t, s), memory

    return Solver(no_memory, step)


def tcd(schedule: Schedule, *, gamma: float = 0.3, noise: Noise = fresh) -> Solver:
    """Strategic stochastic sampling of trajectory consistency models, TCD (Zheng et al. 2024, Algorithm 4).

    D is the x0 by which a DDIM step from t meets the flow at s' = (1 - gamma) s. gamma = 0 is DDIM, 1 `consistency`.
    Raises ConfigError unless 0 <= gamma <= 1.
    """
    if not 0 <= gamma <= 1:
        raise ConfigError(f"gamma must lie in [0, 1], got {gamma}. Use 0.3, more for more steps; 0 adds no noise.")

    def step(key: Key, denoise: Denoiser, x: Array, t: Array, s: Array, memory: PyTree) -> tuple[Array, PyTree]:
        gap = schedule.logsnr(s) - schedule.logsnr((1 - gamma) * s)
        return mix(schedule, x, estimate(denoise(x, t)), t, s, jnp.minimum(gap, 0.0), noise(key, x, t, s)), memory

    return Solver(no_memory, step)
