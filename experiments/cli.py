"""The edge where text becomes values: configs, overrides, names; every mistake is answered by the nearest valid name.

    --config=emoji                       a file of experiments/configs (bare name), or a path to a .py file
    --config.train.batch_size=64         one field, of the type that the config gives it
    --config.diffusion.weighting='min_snr(gamma=5)'     a name with options, as `call` reads it

Overrides are read here and not by absl flags: absl's are global (a second call in the same process, as a notebook
makes, would fail), and it answers a mistyped name with a traceback.
"""

import argparse
import ast
import difflib
import importlib
import importlib.util
import inspect
import pkgutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ml_collections import ConfigDict

import experiments.configs
from experiments.configs import Config
from jaxdiff.errors import ConfigError, HostError, JaxdiffError
from jaxdiff.train import hosts


class Parser(argparse.ArgumentParser):
    """An argument parser that takes no abbreviations, and answers a mistake with one line instead of its usage."""

    def __init__(self, **options: Any):
        super().__init__(**options, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError."""
        raise ConfigError(f"{message}. --help lists the options.")


def try_to_write(folder: Path) -> None:
    """Raise the OSError that a new file in `folder` meets: permission bits do not tell (root, read-only mounts)."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".jaxdiff"):
        pass


def unknown(what: str, name: str, known: Iterable[str]) -> ConfigError:
    """An error naming the nearest of the known names, and all of them."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(map(repr, near))}? " if near else ""
    return ConfigError(f"unknown {what} {name!r}. {hint}Known: {', '.join(known)}.")


def call(what: str, text: str, table: Mapping[str, Callable], **given: Any) -> Any:
    """Build what `text` names: 'cosine' or 'cosine(s=0.01)' calls table['cosine'](**given it accepts, **options).

    Options must be literals. Raises ConfigError with the nearest name for an unknown entry or option.
    """
    name, paren, _ = text.partition("(")
    name = name.strip()
    if name not in table:
        raise unknown(what, name, table)
    accepted = inspect.signature(table[name]).parameters
    options = _options(what, text) if paren else {}
    for option in options:
        if option not in accepted:
            raise unknown(f"option of {what} {name}:", option, set(accepted) - set(given))
        check_type(f"option {option} of {what} {name}", options[option], accepted[option])
    kwargs = {k: v for k, v in given.items() if k in accepted} | options
    missing = [k for k, p in accepted.items() if p.default is p.empty and k not in kwargs and p.kind in (1, 3)]
    if missing:
        raise ConfigError(f"{what} {name!r} needs {', '.join(missing)}: write {name}({missing[0]}=...).")
    return table[name](**kwargs)


def _options(what: str, text: str) -> dict[str, Any]:
    try:
        node = ast.parse(text.strip(), mode="eval").body
        if not isinstance(node, ast.Call) or node.args:
            raise ValueError("not name(option=value)")
        return {str(k.arg): ast.literal_eval(k.value) for k in node.keywords}
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError) as error:
        raise ConfigError(f"cannot read {what} {text!r}. Write name or name(option=number, ...).") from error


def check_type(what: str, value: Any, parameter: inspect.Parameter) -> None:
    """Raise ConfigError unless `value` is of the type of the parameter's default, or of its annotation."""
    kind = parameter.annotation if parameter.default is parameter.empty else type(parameter.default)
    wanted = {int: "an integer", float: "a number", str: "text", tuple: "numbers in brackets", bool: "True or False"}
    numbers = not isinstance(value, tuple) or all(isinstance(part, int | float) for part in value)
    if kind in wanted and not (isinstance(value, int | float if kind is float else kind) and numbers):
        raise ConfigError(f"{what} must be {wanted[kind]}, got {value!r:.100}.")


def config_names() -> list[str]:
    """The bare names that --config takes."""
    return sorted(m.name for m in pkgutil.iter_modules(experiments.configs.__path__) if not m.name.startswith("_"))


def load_config(name: str) -> Config:
    """The config of a bare name or of a path to a .py file with a function get_config()."""
    if name in config_names():
        return importlib.import_module(f"experiments.configs.{name}").get_config()
    if not name.endswith(".py"):
        raise unknown("config", name, config_names())
    if not Path(name).is_file():
        raise ConfigError(f"config file {name} does not exist. Give a file, or one of: {', '.join(config_names())}.")
    spec = importlib.util.spec_from_file_location("experiment_config", name)
    if spec is None or spec.loader is None:
        raise ConfigError(f"config file {name} cannot be loaded as Python.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ConfigError(f"config file {name} has no function get_config() that returns a ConfigDict.")
    return module.get_config()


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """{'train': {'steps': 1}} -> {'train.steps': 1}."""
    flat = {}
    for key, value in config.items():
        path = f"{prefix}{key}"
        flat |= flatten(value, path + ".") if isinstance(value, Mapping | ConfigDict) else {path: value}
    return flat


def override(config: Config, key: str, text: str) -> None:
    """Set one field, e.g. ('train.steps', '100'), read as the type that the field has."""
    flat = flatten(config)
    if key not in flat:
        raise unknown("config key", key, flat)
    *parents, leaf = key.split(".")
    for parent in parents:
        config = config[parent]
    config[leaf] = _typed(key, text, flat[key])


_BOOLS = {"true": True, "1": True, "false": False, "0": False}
_READ: dict[type, tuple[str, Callable[[str], Any]]] = {
    bool: ("true or false", lambda text: _BOOLS[text.lower()]),
    int: ("an integer", int),
    float: ("a number", float),
    str: ("text", str),
}


def _typed(key: str, text: str, default: Any) -> Any:
    kind = type(default)
    if kind is tuple:
        item = default[0] if default else ""
        parts = text.strip("()[] ").split("," if "," in text or not isinstance(item, str) else "\0")
        return tuple(_typed(key, part.strip().strip("'\""), item) for part in parts if part.strip())
    wanted, read = _READ[kind]
    try:
        return read(text)
    except (ValueError, KeyError) as error:
        message = f"{key} must be {wanted}, got {text!r}. Type for example --config.{key}={default}"
        raise ConfigError(message) from error


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> tuple[Config, argparse.Namespace]:
    """Read `argv`: the parser's own options (among them --config), and --config.KEY=VALUE overrides."""
    overrides, rest = [], []
    queue = list(argv)
    while queue:
        word = queue.pop(0)
        if not word.startswith("--config."):
            rest.append(word)
            continue
        key, equals, text = word.removeprefix("--config.").partition("=")
        if not equals and (not queue or queue[0].startswith("--")):
            raise ConfigError(f"--config.{key} has no value. Type --config.{key}=VALUE.")
        overrides.append((key, text if equals else queue.pop(0)))
    args = parse_args(parser, rest)
    config = load_config(args.config)
    for key, text in overrides:
        override(config, key, text)
    return config, args


def parse_args(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """`parser.parse_args` whose unknown options are answered with the nearest known one."""
    args, extra = parser.parse_known_args(argv)
    if extra:
        known = [o for action in parser._actions for o in action.option_strings]
        raise unknown("option", extra[0].split("=")[0], known)
    return args


def describe() -> str:
    """The list of configs, one line each, for --help."""
    lines = []
    for name in config_names():
        doc = inspect.getdoc(importlib.import_module(f"experiments.configs.{name}")) or ""
        lines.append(f"  {name:14s}{doc.splitlines()[0]}")
    return "\n".join(lines)


def main(run: Callable[[Sequence[str]], int]) -> None:
    """Exit with run(argv): an error of jaxdiff or of the file system is printed as one message, with status 2."""
    warnings.formatwarning = lambda message, *_, **__: f"note: {message}\n"
    try:
        sys.exit(run(sys.argv[1:]))
    except (JaxdiffError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        hosts.leave(hosts.LOST if isinstance(error, HostError) else 2)
    except KeyboardInterrupt:
        print("interrupted; what was saved before is untouched", file=sys.stderr)
        hosts.leave(130)
