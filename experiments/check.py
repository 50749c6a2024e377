"""Settings that cannot work are refused here: on plain Python values, before anything is compiled or written."""

import math
from typing import Any

import jax

from experiments import cli
from experiments.configs import Config
from experiments.configs._base import base
from jaxdiff import train
from jaxdiff.errors import ConfigError

# key -> the smallest value allowed
LEAST = {
    "seed": 0,
    "data.size": 1,
    "data.memory_gb": 0.0,
    "data.ahead": 1,
    "data.workers": 0,
    "text.max_len": 1,
    "text.dim": 1,
    "text.depth": 0,
    "text.heads": 1,
    "autoencoder.kl": 0.0,
    "autoencoder.lpips_weight": 0.0,
    "diffusion.noise_offset": 0.0,
    "tune.rank": 1,
    "tune.vectors": 1,
    "tune.prior_weight": 0.0,
    "optimizer.warmup": 0,
    "optimizer.weight_decay": 0.0,
    "optimizer.clip": 0.0,
    "train.batch_size": 1,
    "train.steps": 1,
    "train.accumulate": 1,
    "train.steps_per_call": 1,
    "train.log_every": 1,
    "train.sample_every": 0,
    "train.checkpoint_every": 1,
    "train.keep": 2,  # a damaged newest checkpoint falls back to the one before
    "mesh.dead_after": 1.0,
    "mesh.slow_after": 1.0,
    "sample.steps": 1,
    "sample.num": 1,
    "sample.seed": 0,
    "sample.scale": 0.0,
}
# key -> the largest value allowed: a mistyped or damaged number is answered at once, not by running out of memory
MOST = {
    "data.size": 2**14,
    "data.points": 10**8,
    "data.ahead": 2**16,
    "data.workers": 2**10,
    "net.depth": 2**10,
    "net.num_blocks": 2**10,
    "text.vocab_size": 2**20,
    "tune.rank": 2**12,
    "tune.vectors": 75,
    "text.max_len": 2**16,
    "text.dim": 2**16,
    "text.depth": 2**10,
    "train.batch_size": 2**24,
    "train.steps_per_call": 10**6,
    "sample.steps": 10**6,
    "sample.num": 2**16,
}
LARGEST, LONGEST = 2**53, 10_000  # of every number, in every text


def config(config: Config) -> None:
    """Raise ConfigError for the first setting unknown or out of its range; names are checked where they are used."""
    flat, known = cli.flatten(config), cli.flatten(base())
    for key, value in flat.items():
        if key not in known and not key.startswith("net."):
            raise cli.unknown("config key", key, known)
        _check_size(key, value)
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{key} must be a finite number, got {value}. Type --config.{key}=NUMBER.")
        if key in LEAST and value < LEAST[key]:
            raise ConfigError(
                f"{key} must be at least {LEAST[key]}, got {value}. Type --config.{key}={LEAST[key] or 1}."
            )
        if key.endswith("seed") and value >= 2**31:
            raise ConfigError(f"{key} must be below 2**31 = {2**31}, got {value}.")
    if not config.optimizer.learning_rate > 0:
        raise ConfigError(f"optimizer.learning_rate must be > 0, got {config.optimizer.learning_rate}.")
    if not 0 <= config.condition_dropout <= 1:
        raise ConfigError(f"condition_dropout must be between 0 and 1, got {config.condition_dropout}.")
    size, parts = config.train.batch_size, config.train.accumulate
    if size % parts:
        raise ConfigError(f"train.batch_size must be a multiple of train.accumulate={parts}, got {size}.")


def _check_size(key: str, value: Any) -> None:
    for part in value if isinstance(value, tuple) else (value,):
        most = MOST.get(key, LARGEST)
        if isinstance(part, int) and abs(part) > most:
            raise ConfigError(f"{key} must be at most {most}, got {str(part)[:30]}.")
        if isinstance(part, str) and len(part) > LONGEST:
            raise ConfigError(f"{key} must be at most {LONGEST} characters long, got {len(part)}.")


def fits(value: Any, default: Any) -> bool:
    """Whether `value`, read from a file, is of the type of the setting `default`."""
    if isinstance(default, tuple):
        kind = type(default[0]) if default else str
        return isinstance(value, tuple) and all(isinstance(part, kind) for part in value)
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(default, bool) and isinstance(value, bool)
    return isinstance(value, int | float if isinstance(default, float) else type(default))


def mesh(config: Config) -> jax.sharding.Mesh:
    """The device mesh of the config; ConfigError where the batch does not divide over it."""
    made = train.mesh.make(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    train.mesh.check_batch_size(made, config.train.batch_size // config.train.accumulate)
    return made


def steps_per_call(config: Config, done: int = 0) -> int:
    """The largest number up to train.steps_per_call that divides every interval and the steps `done` before.

    Calls then begin at the same steps in every run, whole or resumed, so a resumed run computes the same bits.
    """
    c = config.train
    common = math.gcd(c.steps, c.log_every, c.sample_every, c.checkpoint_every, done)
    return max(k for k in range(1, c.steps_per_call + 1) if common % k == 0)
