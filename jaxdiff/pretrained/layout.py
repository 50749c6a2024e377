"""What the folders of diffusers have in common: networks that bear their published names, and configs read strictly.

    down_blocks_0/resnets_1/conv1/kernel  <->  down_blocks.0.resnets.1.conv1.weight      (linear_1, proj_out_1 stay)

A config must say nothing that the network here does not do: a key that is not known is an error, unless it is off.
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxdiff.errors import CheckpointError, ConfigError
from jaxdiff.pretrained import files, keys
from jaxdiff.pretrained.keys import Rule
from jaxdiff.types import PyTree

Source = str | os.PathLike | Mapping[str, Any]
"""A folder or file of weights, or tensors by name, for which a config must be given."""
Shardings = Callable[[PyTree], PyTree]
"""From a tree of shapes to one of shardings, as `train.mesh.state_sharding`: each leaf is born where it belongs."""

STEM = "diffusion_pytorch_model"
MOST = 2**16
"""No width of a published network comes near this."""

_NUMBER = re.compile(r"(?<!linear)(?<!proj_out)_(\d+)(?=/|$)")
_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}


def mirror(template: PyTree) -> list[Rule]:
    """The rules of a network whose sub-modules are named as published: one for each kind of parameter."""
    rules = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(template)[0]:
        ours = "/".join(key.key for key in path).removeprefix("params/")
        if ours.rpartition("/")[2] not in _LEAVES:
            raise ConfigError(f"{ours} has no published name: its last part must be one of {', '.join(_LEAVES)}.")
        places = iter("abcdefgh")
        pattern = _NUMBER.sub(lambda _, places=places: f"_{{{next(places)}}}", ours)
        module, _, name = pattern.rpartition("/")
        theirs = re.sub(r"_(\{\w\})", r".\1", module).replace("/", ".")
        moves = {2: keys.LINEAR, 4: keys.CONV}.get(leaf.ndim, keys.SAME) if name == "kernel" else keys.SAME
        rules[pattern] = Rule(pattern, f"{theirs}.{_LEAVES[name]}", moves)
    return list(rules.values())


def template(net: nn.Module, inputs: Mapping[str, Any], dtype: Any, shardings: Shardings | None) -> PyTree:
    """The shapes of the parameters of `net`, in `dtype`, each with its sharding where those are given."""
    shapes = jax.eval_shape(net.init, jax.random.key(0), **inputs)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), shapes)
    if shardings is None:
        return shapes
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, dtype, sharding=place), shapes, shardings(shapes)
    )


def open_source(source: Source, config: Mapping[str, Any] | None, variant: str | None) -> tuple[dict[str, Any], Any]:
    """(tensors by name, config) of a folder, of a file with its config, or of tensors with theirs."""
    if isinstance(source, Mapping):
        if config is None:
            raise ConfigError("tensors alone do not say what they are: give config=, as in the model's config.json.")
        return dict(source), config
    return files.read(source, variant=variant), files.config(source) if config is None else config


def zeros(*shape: int) -> jax.ShapeDtypeStruct:
    """An input of a network whose parameters are to be counted only."""
    return jax.ShapeDtypeStruct(shape, jnp.float32)


class Settings:
    """A config.json, read key by key; `finish` complains of what was not read and is not off."""

    def __init__(self, config: Any, ignored: Sequence[str] = ()) -> None:
        if not isinstance(config, Mapping):
            raise CheckpointError(f"a config must be a JSON object, got {config!r:.60}.")
        self._config, self._left = config, {name for name in config if name not in ignored and name[:1] != "_"}

    def default(self, name: str, value: Any) -> None:
        """What `name` is where the config does not say it, whatever default it is then asked with."""
        if self._config.get(name) is None:
            self._config = {**self._config, name: value}

    def get(self, name: str, default: Any) -> Any:
        """The value, whatever it is; `default` where it is missing or null."""
        self._left.discard(name)
        value = self._config.get(name)
        return default if value is None else value

    def number(self, name: str, default: float) -> float:
        """A finite number."""
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < float("inf"):
            raise _wrong(name, "a number", value)
        return float(value)

    def integer(self, name: str, default: int | None, *, least: int = 1, most: int = MOST) -> Any:
        """An integer in [least, most], or the default."""
        value = self.get(name, default)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise _wrong(name, f"an integer from {least} to {most}", value)
        return value

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise _wrong(name, "true or false", value)
        return value

    def integers(self, name: str, default: Any, *, count: int | None = None, most: int = MOST) -> tuple[int, ...]:
        """A list of integers >= 1; where `count` is given, one integer stands for all of them."""
        value = self.get(name, default)
        several = [value] * count if count is not None and isinstance(value, int) else value
        fits = isinstance(several, list | tuple) and 1 <= len(several) <= 16 and count in (None, len(several))
        if not fits or any(isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= most for n in several):
            raise _wrong(name, f"integers from 1 to {most}" + (f", {count} of them" if count else ""), value)
        return tuple(several)

    def one_of(self, name: str, default: Any, allowed: Sequence[Any]) -> Any:
        """A value out of those that are known."""
        value = self.get(name, default)
        if not any(value == known and isinstance(value, bool) == isinstance(known, bool) for known in allowed):
            raise _wrong(name, " or ".join(map(repr, allowed)), value)
        return value

    def kinds(self, name: str, default: Sequence[str], known: Mapping[str, str], count: int) -> tuple[Any, ...]:
        """A list of `count` names, each as what it means."""
        value = self.get(name, default)
        if not isinstance(value, list | tuple) or len(value) != count or any(n not in known for n in map(str, value)):
            raise _wrong(name, f"{count} of {', '.join(known)}", value)
        return tuple(known[kind] for kind in value)

    def finish(self) -> None:
        """Raise CheckpointError for a key that was not read, unless it is null or false."""
        for name in sorted(self._left):
            if self._config[name] not in (None, False):
                raise _wrong(name, "absent, since it is not known here", self._config[name])


def _wrong(name: str, wanted: str, value: Any) -> CheckpointError:
    return CheckpointError(f"config.json: {name} must be {wanted}, got {value!r:.80}.")
