"""Langevin moves: annealed Langevin dynamics (NCSN), and a corrector behind any solver.

    one move at a noise level:  x <- x + (delta / 2) score + sqrt(delta) z,   score = -eps / sigma,   delta = r sigma^2
    that is                     x <- x - (r / 2) (x - alpha D(x, t)) + sqrt(r) sigma z

The step is relative to the noise level, as in NCSN (delta_i = e sigma_i^2 / sigma_L^2), so r is one number for all.
Predictor-corrector sets it by a signal-to-noise ratio snr: x + e score + sqrt(2 e) z, e = 2 (snr |z| / |score|)^2.
Here |z| / |score| is sigma, its value where x_t is mostly noise; delta = 2 e, so r = 4 snr^2. Measured norms would make
the move's target p(x) |score|^2, not p(x) (wrong by 2 / d in d dimensions), and their mean over a batch would let one
example change another.
"""

import jax
import jax.numpy as jnp

from jaxdiff.denoise import estimate
from jaxdiff.errors import ConfigError, check_count
from jaxdiff.process import fold_keys, split_keys
from jaxdiff.solver.base import fresh, no_memory
from jaxdiff.types import Array, Denoiser, Key, Noise, PyTree, Schedule, Solver


def annealed_langevin(
    schedule: Schedule, *, step_size: float = 0.2, num_moves: int = 5, noise: Noise = fresh
) -> Solver:
    """Annealed Langevin dynamics (Song & Ermon 2019, Algorithm 1) on any schedule; calls: `num_moves` a step, 1 to 0.

    A step carries x_t to the level s as it is (times alpha_s / alpha_t) and moves there `num_moves` times; the last
    step, to sigma = 0, denoises (Jolicoeur-Martineau et al. 2021). step_size: r, the paper's e / sigma_L^2 = 0.2. Its
    law is near the truth where levels are dense (few per cent of sigma apart) and r is small. Noise: from s to s.
    Raises ConfigError unless 0 < step_size < 2 and num_moves is an integer >= 1.
    """
    if not 0 < step_size < 2:
        raise ConfigError(f"step_size must lie between 0 and 2 (larger moves diverge), got {step_size}. NCSN's is 0.2.")
    num_moves = _check_moves(num_moves)

    def step(key: Key, denoise: Denoiser, x: Array, t: Array, s: Array, memory: PyTree) -> tuple[Array, PyTree]:
        alpha_t, sigma_s = schedule.alpha(t), schedule.sigma(s)
        # Pure noise (alpha_t = 0) has no signal to scale: its own scale is carried instead.
        safe = jnp.where(alpha_t > 0, alpha_t, 1.0)
        ratio = jnp.where(alpha_t > 0, schedule.alpha(s) / safe, sigma_s / schedule.sigma(t))
        moved = langevin(key, schedule, denoise, ratio * x, s, step_size, num_moves, noise)
        return jax.lax.cond(sigma_s > 0, lambda: moved, lambda: schedule.alpha(s) * estimate(denoise(x, t))), memory

    return Solver(no_memory, step)


def predictor_corrector(
    schedule: Schedule, solver: Solver, *, snr: float = 0.16, num_moves: int = 1, noise: Noise = fresh
) -> Solver:
    """`solver` as predictor, then Langevin moves at the level reached (Song et al. 2021, Algorithms 2 and 3).

    snr: the paper's signal-to-noise ratio r (0.16 for VE, 0.01 for VP). No moves at sigma = 0. Where the predictor
    remembers earlier answers, it remembers those before the moves. `noise` is that of the moves, from s to s.
    Raises ConfigError unless 0 < snr < 0.7 and num_moves is an integer >= 1.
    """
    if not 0 < snr < 0.7:
        raise ConfigError(f"snr must lie between 0 and 0.7 (larger moves diverge), got {snr}. Song et al. use 0.16.")
    num_moves = _check_moves(num_moves)

    def step(key: Key, denoise: Denoiser, x: Array, t: Array, s: Array, memory: PyTree) -> tuple[Array, PyTree]:
        key_predict, key_correct = split_keys(key)
        x, memory = solver.step(key_predict, denoise, x, t, s, memory)
        return langevin(key_correct, schedule, denoise, x, s, 4 * snr**2, num_moves, noise), memory

    return Solver(solver.init, step)


def langevin(
    key: Key,
    schedule: Schedule,
    denoise: Denoiser,
    x: Array,
    t: Array,
    step_size: float,
    num_moves: int,
    noise: Noise = fresh,
) -> Array:
    """`num_moves` Langevin moves at time t, of relative step size r, none at sigma = 0; key (b,). Exact as r -> 0."""
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)

    def move(i: Array, x: Array) -> Array:
        new = noise(fold_keys(key, i), x, t, t)
        pull = jax.lax.cond(sigma > 0, lambda: x - alpha * estimate(denoise(x, t)), lambda: jnp.zeros_like(x))
        return x - step_size / 2 * pull + step_size**0.5 * sigma * new

    return jax.lax.fori_loop(0, num_moves, move, x)


def _check_moves(num_moves: int) -> int:
    return check_count("num_moves", num_moves, "For no moves, use a solver without them, as ddim(schedule, eta=1.0).")
