"""Settings that cannot work are refused here: on plain Python values, before anything is compiled or written."""

import math

import jax

from experiments import cli
from experiments.configs import Config
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
    "sample.steps": 1,
    "sample.num": 1,
    "sample.seed": 0,
    "sample.scale": 0.0,
}


def config(config: Config) -> None:
    """Raise ConfigError for the first setting out of its range; names are checked where they are used."""
    flat = cli.flatten(config)
    for key, value in flat.items():
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


def mesh(config: Config) -> jax.sharding.Mesh:
    """The device mesh of the config; ConfigError where the batch does not divide over it."""
    made = train.mesh.make(config.mesh.data, config.mesh.fsdp)
    train.mesh.check_batch_size(made, config.train.batch_size // config.train.accumulate)
    return made


def steps_per_call(config: Config, done: int = 0) -> int:
    """The largest number up to train.steps_per_call that divides every interval and the steps `done` before.

    Calls then begin at the same steps in every run, whole or resumed, so a resumed run computes the same bits.
    """
    c = config.train
    common = math.gcd(c.steps, c.log_every, c.sample_every, c.checkpoint_every, done)
    return max(k for k in range(1, c.steps_per_call + 1) if common % k == 0)
