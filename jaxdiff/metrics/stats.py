"""Mean and covariance of features, streamed in float64 on the host, mergeable, and kept in a file with their contract.

    of two parts a and b (Chan, Golub, LeVeque 1983), with n = n_a + n_b and delta = mean_b - mean_a:
    mean    = mean_a + delta n_b / n
    scatter = scatter_a + scatter_b + delta delta^T n_a n_b / n         covariance = scatter / (n - 1)

The contract says what was measured: features, weights, resize, range of the input, data. Two statistics are compared
or merged only if theirs agree, so that a picture scaled twice or another resize is an error and not a number.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxdiff.atomic import replacing
from jaxdiff.errors import ConfigError, DataError
from jaxdiff.metrics.checks import check_features

FORMAT = "jaxdiff statistics 1"


@dataclasses.dataclass(frozen=True, eq=False)
class Stats:
    """Of `count` rows: `mean` (d,) and `scatter` (d, d), the sum of centred outer products; float64, host."""

    count: int
    mean: np.ndarray
    scatter: np.ndarray
    contract: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def covariance(self) -> np.ndarray:
        """The unbiased covariance (d, d). Raises DataError for fewer than two rows."""
        if self.count < 2:
            raise DataError(f"a covariance needs at least 2 rows, got {self.count}. Give more samples.")
        return self.scatter / (self.count - 1)


def of(features: Any, contract: Mapping[str, str] | None = None) -> Stats:
    """The statistics of features (n, d). Raises as `checks.check_features`."""
    x = check_features("features", features, least=1)
    mean = x.mean(axis=0)
    centred = x - mean
    return Stats(len(x), mean, centred.T @ centred, dict(contract or {}))


def merge(a: Stats, b: Stats) -> Stats:
    """The statistics of the rows of both: a stream is `functools.reduce(merge, map(of, batches))`.

    Raises ConfigError when they are of different features.
    """
    check_contract(a, b)
    count = a.count + b.count
    delta = b.mean - a.mean
    mean = a.mean + delta * (b.count / count)
    scatter = a.scatter + b.scatter + np.outer(delta, delta) * (a.count * b.count / count)
    return Stats(count, mean, scatter, a.contract)


def check_contract(a: Stats, b: Stats) -> None:
    """Raise ConfigError unless both are of the same features, made the same way."""
    differ = [k for k in sorted({*a.contract, *b.contract}) if a.contract.get(k) != b.contract.get(k)]
    if differ or a.mean.shape != b.mean.shape:
        lines = "".join(f"\n  {k}: {a.contract.get(k)!r} and {b.contract.get(k)!r}" for k in differ)
        raise ConfigError(
            f"these statistics are not of the same features (d = {len(a.mean)} and {len(b.mean)}).{lines}\n"
            "Measure both sides the same way."
        )


def save(path: str | os.PathLike, stats: Stats) -> None:
    """Write `stats` as safetensors, the count and the contract as JSON in its header; whole or not at all."""
    from safetensors.numpy import save as serialise

    header = {"format": FORMAT, "count": str(stats.count), "contract": json.dumps(dict(stats.contract))}
    arrays = {"mean": stats.mean, "covariance": stats.covariance}
    with replacing(path) as temporary:
        temporary.write_bytes(serialise(arrays, header))


def load(path: str | os.PathLike) -> Stats:
    """Read what `save` wrote. Raises DataError for a file that is missing, damaged or of another kind."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT:
                raise DataError(f"{path} holds no statistics of jaxdiff (format {header.get('format')!r}).")
            mean, covariance = file.get_tensor("mean"), file.get_tensor("covariance")
    except (OSError, SafetensorError) as error:
        raise DataError(f"cannot read the statistics in {path}: {error}. Make them again.") from error
    count = int(header["count"])
    return Stats(count, mean, covariance * (count - 1), json.loads(header["contract"]))
