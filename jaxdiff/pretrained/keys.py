"""Their names and layouts of weights and ours: one table, read in both directions, and a report that names every key.

    Rule("layers_{i}/query/kernel", "encoder.layers.{i}.q_proj.weight", LINEAR)

A pattern's {i} stands for digits, the same on both sides. The rules of a parameter are tried in order and the first
whose tensor is there is read; the first rule writes. So a rule further down is how an older layout is understood.

    ours <- to_ours(theirs)        LINEAR   (out, in) -> (in, out)            CONV    OIHW -> HWIO
    theirs <- to_theirs(ours)      SAME     as it is
"""

import concurrent.futures
import dataclasses
import fnmatch
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxdiff.errors import CheckpointError
from jaxdiff.types import PyTree

_SHOWN = 4


class Transform(NamedTuple):
    """How one array becomes the other; both functions only move axes, so that no bit changes."""

    to_ours: Callable[[np.ndarray], np.ndarray]
    to_theirs: Callable[[np.ndarray], np.ndarray]


def _same(x: np.ndarray) -> np.ndarray:
    return x


SAME = Transform(_same, _same)
LINEAR = Transform(lambda x: x.transpose(1, 0), lambda x: x.transpose(1, 0))
CONV = Transform(lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))


class Rule(NamedTuple):
    """Our path ('a/b/kernel', without 'params/') <-> their name, as patterns, and the transform between the arrays."""

    ours: str
    theirs: str
    transform: Transform = SAME


def linear(ours: str, theirs: str, *, bias: bool = True) -> list[Rule]:
    """The rules of an `nn.Dense`."""
    return _layer(ours, theirs, "kernel", LINEAR, bias)


def conv(ours: str, theirs: str, *, bias: bool = True) -> list[Rule]:
    """The rules of a two-dimensional `nn.Conv`."""
    return _layer(ours, theirs, "kernel", CONV, bias)


def norm(ours: str, theirs: str, *, bias: bool = True) -> list[Rule]:
    """The rules of a normalisation with a scale."""
    return _layer(ours, theirs, "scale", SAME, bias)


def _layer(ours: str, theirs: str, weight: str, transform: Transform, bias: bool) -> list[Rule]:
    rules = [Rule(f"{ours}/{weight}", f"{theirs}.weight", transform)]
    return [*rules, Rule(f"{ours}/bias", f"{theirs}.bias")] if bias else rules


@dataclasses.dataclass(frozen=True)
class Report:
    """What became of every key: pairs (ours, theirs) that match, and those that do not."""

    matched: tuple[tuple[str, str], ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    shape: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether every key of both sides has its partner."""
        return not (self.missing or self.unexpected or self.shape)

    def __str__(self) -> str:
        lines = [f"{len(self.matched)} matched"]
        for name in ("missing", "unexpected", "shape"):
            rows = getattr(self, name)
            more = f", and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else ""
            lines += [f"{len(rows)} {name}: {', '.join(rows[:_SHOWN])}{more}"] if rows else []
        return "; ".join(lines)


def compare(
    template: PyTree, tensors: Mapping[str, Any], table: Sequence[Rule], *, ignore: Iterable[str] = ()
) -> Report:
    """Lay the keys side by side without reading a weight; `ignore` are wildcard patterns of names to pass over.

    `template` is a tree of arrays or of `jax.ShapeDtypeStruct`; `tensors` as from `files.read`.
    """
    pairs, missing, shapes = _pair(template, tensors, table)
    used = {rule.theirs for rule in pairs.values()}
    ignore = tuple(ignore)
    left = (name for name in tensors if name not in used and not any(fnmatch.fnmatchcase(name, p) for p in ignore))
    matched = tuple((path, rule.theirs) for path, rule in pairs.items() if path not in shapes)
    return Report(matched, tuple(missing), tuple(sorted(left)), tuple(shapes.values()))


def load(
    template: PyTree,
    tensors: Mapping[str, Any],
    table: Sequence[Rule],
    *,
    strict: bool = True,
    ignore: Iterable[str] = (),
) -> PyTree:
    """`template` with each leaf read from its tensor, in the leaf's dtype and, where it names one, its sharding.

    Beside the result two tensors are in memory, one being read while the one before is laid out. Raises
    CheckpointError with the report where a key has no partner; with `strict=False` missing ones keep the template's
    array, unexpected ones are left, and a shape that does not fit still raises.
    """
    report = compare(template, tensors, table, ignore=ignore)
    if report.shape or (strict and not report.ok):
        raise CheckpointError(f"the weights are not of this network: {report}. Compare their config.json with it.")
    pairs, _, _ = _pair(template, tensors, table)

    def read(path: str, old: Any) -> np.ndarray | None:
        rule = pairs.get(path)
        if rule is None:
            return None
        return rule.transform.to_ours(np.array(tensors[rule.theirs]).astype(old.dtype, copy=False))

    leaves, tree = jax.tree_util.tree_flatten_with_path(template)
    named = [(_name(path), old) for path, old in leaves]
    made = []
    for (path, old), array in zip(named, _ahead(read, named), strict=True):
        if array is None and isinstance(old, jax.ShapeDtypeStruct):
            raise CheckpointError(f"{path} is missing and the template holds no array for it: {report}.")
        # JAX moves the axes as it copies the array, which costs no more than the copy; NumPy's would be a second one.
        made.append(old if array is None else jax.device_put(array, getattr(old, "sharding", None)))
    return tree.unflatten(made)


def export(params: PyTree, table: Sequence[Rule], *, dtype: Any = None) -> dict[str, np.ndarray]:
    """Our parameters under their names and in their layout, for `files.write`; `dtype` e.g. np.float16.

    Raises CheckpointError for a parameter that the table does not know.
    """
    tensors = {}
    compiled = _compile(table)
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        rule = next(_candidates(_name(path), compiled), None)
        if rule is None:
            raise CheckpointError(f"{_name(path)} has no name in the other layout: the table has no rule for it.")
        array = rule.transform.to_theirs(np.asarray(leaf))
        tensors[rule.theirs] = np.ascontiguousarray(array, dtype=dtype).reshape(array.shape)
    return tensors


def resolve(template: PyTree, table: Sequence[Rule]) -> list[Rule]:
    """The rule by which each parameter is written, its placeholders filled in; a parameter without one is left out."""
    compiled = _compile(table)
    paths = (_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(template)[0])
    return [rule for path in paths if (rule := next(_candidates(path, compiled), None))]


def strip(tensors: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The tensors with `prefix` taken off those names that have it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def select(tensors: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Only the tensors whose name begins with `prefix`, without it: one model out of a file of several."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _name(path: Any) -> str:
    return "/".join(str(key.key) for key in path).removeprefix("params/")


def _compile(table: Sequence[Rule]) -> list[tuple[re.Pattern, Rule]]:
    return [(re.compile(re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>\\d+)", re.escape(rule.ours))), rule) for rule in table]


def _candidates(path: str, compiled: list[tuple[re.Pattern, Rule]]) -> Iterator[Rule]:
    """The rules of one parameter, their placeholders filled in."""
    for pattern, rule in compiled:
        found = pattern.fullmatch(path)
        if found:
            yield Rule(path, rule.theirs.format(**found.groupdict()), rule.transform)


def _pair(
    template: PyTree, tensors: Mapping[str, Any], table: Sequence[Rule]
) -> tuple[dict[str, Rule], list[str], dict[str, str]]:
    """path -> rule; what is missing, as 'theirs (ours)'; path -> 'theirs: their shape, ours'."""
    pairs, missing, shapes = {}, [], {}
    compiled = _compile(table)
    for key, leaf in jax.tree_util.tree_flatten_with_path(template)[0]:
        path = _name(key)
        candidates = list(_candidates(path, compiled))
        rule = next((rule for rule in candidates if rule.theirs in tensors), None)
        if rule is None:
            missing.append(f"{candidates[0].theirs if candidates else 'no rule'} ({path})")
            continue
        pairs[path] = rule
        shape = tuple(tensors[rule.theirs].shape)
        if _shape(rule.transform, shape) != tuple(leaf.shape):
            shapes[path] = f"{rule.theirs} has {shape} for {path} {tuple(leaf.shape)}"
    return pairs, missing, shapes


def _shape(transform: Transform, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape after `to_ours`, found on an array that takes no memory; None where the number of axes is wrong."""
    try:
        return transform.to_ours(np.broadcast_to(np.int8(0), shape)).shape
    except ValueError:
        return None


def _ahead(function: Callable[..., Any], items: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
    """function(*item) of each item, while the one before is being used."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        before = None
        for item in items:
            before, ready = pool.submit(function, *item), before
            if ready is not None:
                yield ready.result()
        if before is not None:
            yield before.result()
