"""Adam with what diffusion training puts around it: clip -> Adam -> weight decay -> learning rate.

rate(n) = learning_rate * min(1, (n + 1) / warmup_steps) * decay(n),   n = 0, 1, ... updates made

constant  1
cosine    (1 + cos(pi min(1, n / total_steps))) / 2
rsqrt     sqrt(w / max(n, w)),  w = max(warmup_steps, 1)
"""

import difflib

import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jaxdiff.errors import ConfigError
from jaxdiff.types import Array

DECAYS = ("constant", "cosine", "rsqrt")


def rate(
    learning_rate: float, *, warmup_steps: int = 0, decay: str = "constant", total_steps: int = 0
) -> optax.Schedule:
    """The learning rate as a function of the number of updates made; see the module for the formulas.

    Raises ConfigError for an unknown decay, a rate that is not positive, or cosine without total_steps.
    """
    if decay not in DECAYS:
        near = difflib.get_close_matches(str(decay), DECAYS, n=1, cutoff=0.0)[0]
        raise ConfigError(f"decay must be one of {', '.join(DECAYS)}, got {decay!r}. Did you mean {near!r}?")
    if not learning_rate > 0:
        raise ConfigError(f"learning_rate must be > 0, got {learning_rate}. A usual value is 2e-4.")
    if decay == "cosine" and total_steps < 1:
        raise ConfigError(f"decay='cosine' needs total_steps >= 1, got {total_steps}. Pass the length of the run.")

    def schedule(count: ArrayLike) -> Array:
        n = jnp.asarray(count, jnp.float32)
        warm = jnp.minimum(1.0, (n + 1.0) / warmup_steps) if warmup_steps else jnp.ones_like(n)
        if decay == "cosine":
            warm = warm * (1.0 + jnp.cos(jnp.pi * jnp.minimum(1.0, n / total_steps))) / 2.0
        elif decay == "rsqrt":
            warm = warm * jnp.sqrt(max(warmup_steps, 1) / jnp.maximum(n, float(max(warmup_steps, 1))))
        return learning_rate * warm

    return schedule


def adam(
    learning_rate: float,
    *,
    warmup_steps: int = 0,
    decay: str = "constant",
    total_steps: int = 0,
    clip_norm: float | None = None,
    weight_decay: float = 0.0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
) -> optax.GradientTransformation:
    """Adam (AdamW where weight_decay > 0) after clipping the global gradient norm to `clip_norm`.

    Moments are float32 of the parameters' shape. Any other Optax transformation may be given to `make_step` instead.
    Raises ConfigError as `rate` does, and for clip_norm <= 0, weight_decay < 0, b1 or b2 outside [0, 1) or eps <= 0.
    """
    if clip_norm is not None and not clip_norm > 0:
        raise ConfigError(f"clip_norm must be > 0, got {clip_norm}. For no clipping, pass None.")
    if weight_decay < 0:
        raise ConfigError(f"weight_decay must be >= 0, got {weight_decay}. 0 is off.")
    if not (0 <= b1 < 1 and 0 <= b2 < 1 and eps > 0):
        raise ConfigError(f"b1 and b2 must be in [0, 1) and eps > 0, got {b1=}, {b2=}, {eps=}. Adam: 0.9, 0.999, 1e-8.")
    schedule = rate(learning_rate, warmup_steps=warmup_steps, decay=decay, total_steps=total_steps)
    return optax.chain(
        optax.identity() if clip_norm is None else optax.clip_by_global_norm(clip_norm),
        optax.scale_by_adam(b1=b1, b2=b2, eps=eps),
        optax.add_decayed_weights(weight_decay) if weight_decay else optax.identity(),
        optax.scale_by_learning_rate(schedule),
    )
