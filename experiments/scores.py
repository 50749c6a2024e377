"""The figures of a set of examples against real ones, and the floors: what no model and the data itself would have.

    held-out   real examples that were not trained on (or, without any, one random half of the data against the other)
    Gaussian   the normal distribution with the mean and covariance of the pixels, rounded and clipped to 8 bits

A Frechet distance sees mean and covariance alone, so by plain pixels the Gaussian is nearly perfect; the other figures
tell. Every row is measured the same way: the same reference, the same number of examples, the same features.
"""

import dataclasses

import numpy as np

from jaxdiff import metrics
from jaxdiff.metrics import stats

MANIFOLD = 10_000
"""The most rows a side for what looks at all pairs: precision, recall, density, coverage and nearest neighbours."""

KID_SIZE = 1000


@dataclasses.dataclass(frozen=True)
class Reference:
    """Features of the real examples that all is measured against, and of others that are real too."""

    features: np.ndarray
    held_out: np.ndarray
    stats: stats.Stats


def reference(features: np.ndarray, held_out: np.ndarray, contract: dict[str, str]) -> Reference:
    """The reference of two sets of features, rows in random order."""
    return Reference(features, held_out, stats.of(features, contract))


def score(given: Reference, x: np.ndarray, *, seed: int = 0) -> dict[str, float | None]:
    """Every figure of the features x (n, d). 'fd' is None where either side has no more rows than features."""
    moments = stats.of(x, given.stats.contract)
    enough = min(len(x), len(given.features)) > x.shape[1]
    size = min(KID_SIZE, len(x), len(given.features))
    kernel = metrics.kid(given.features, x, subset_size=size, seed=seed)
    real, fake = given.features[:MANIFOLD], x[:MANIFOLD]
    memory = metrics.memorisation(fake, real, given.held_out[:MANIFOLD])
    figures: dict[str, float | None] = {"fd": metrics.frechet(given.stats, moments) if enough else None}
    figures |= {"kid": kernel["kid"], "kid_std": kernel["std"]}
    figures |= metrics.precision_recall(real, fake) | metrics.density_coverage(real, fake)
    return figures | {"nearest": memory["ratio"], "nearer": memory["nearer"], "copied": memory["copied"]}


def gaussian(x: np.ndarray, count: int, *, seed: int = 0) -> np.ndarray:
    """`count` draws from the normal distribution with the mean and covariance of examples x; uint8 stays uint8.

    mean + z (x - mean) / sqrt(n - 1) with z standard normal (count, n) has exactly that law, without a decomposition.
    """
    flat, n = x.reshape(len(x), -1), len(x)
    mean = flat.mean(axis=0, dtype=np.float64).astype(np.float32)
    rng, total = np.random.default_rng(seed), np.zeros((count, flat.shape[1]), np.float32)
    for start in range(0, n, 2048):
        block = flat[start : start + 2048].astype(np.float32) - mean
        total += rng.standard_normal((count, len(block)), np.float32) @ block
    draws = (mean + total / np.sqrt(np.float32(n - 1))).reshape(count, *x.shape[1:])
    return np.clip(np.rint(draws), 0, 255).astype(np.uint8) if x.dtype == np.uint8 else draws


def over_seeds(rows: list[dict[str, float | None]]) -> dict[str, dict[str, float | None]]:
    """{figure: {'mean', 'std'}} of the rows of several seeds; std is None for one."""
    result = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        known = [value for value in values if value is not None]
        mean = float(np.mean(known)) if len(known) == len(values) else None
        result[name] = {
            "mean": mean,
            "std": float(np.std(known, ddof=1)) if mean is not None and len(known) > 1 else None,
        }
    return result
