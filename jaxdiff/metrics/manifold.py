"""Fidelity and diversity apart, by balls around points, and whether samples are copies of the training data.

    r_k(x)      distance of x to its k-th nearest neighbour in its own set, itself left out
    precision   share of fakes inside the ball of some real; recall the same with the sides exchanged
                                                                       (Kynkaanniemi et al. 2019, eq. 2; k = 3)
    density     balls of reals that a fake lies in, on average, over k;  coverage: share of reals whose ball holds a
                fake                                                   (Naeem et al. 2020, eqs. 4 and 5; k = 5)
    memorised   d_1(sample, train) against d_1(held-out, train)        (Meehan et al. 2020), and d_1 / d_2 of a sample

Euclidean distances in float64, in blocks of rows, so memory is that of one block against the other set.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxdiff.errors import DataError, check_count
from jaxdiff.metrics.checks import check_features, check_pair

BLOCK = 1024


def _squared(x: np.ndarray, y: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, squared distances of a block of x to all y), never negative."""
    norms = np.square(y).sum(1)
    for start in range(0, len(x), BLOCK):
        block = x[start : start + BLOCK]
        yield start, np.maximum(np.square(block).sum(1)[:, None] + norms[None] - 2 * block @ y.T, 0)


def radii(x: Any, k: int) -> np.ndarray:
    """Distance of each row of x (n, d) to its k-th nearest other row: (n,). Raises DataError for n <= k."""
    k = check_count("k", k, "3 is usual for precision and recall, 5 for density and coverage.")
    x = check_features("x", x, least=k + 1)
    result = np.empty(len(x))
    for start, squared in _squared(x, x):
        squared[np.arange(len(squared)), start + np.arange(len(squared))] = np.inf
        result[start : start + BLOCK] = np.sqrt(np.partition(squared, k - 1, axis=1)[:, k - 1])
    return result


def _pair(real: Any, fake: Any, k: int) -> tuple[np.ndarray, np.ndarray]:
    real, fake = check_features("real", real, least=k + 1), check_features("fake", fake, least=k + 1)
    check_pair("real and fake", real, fake)
    # Distances do not change when both move; near the origin they lose less to rounding.
    centre = real.mean(axis=0)
    return real - centre, fake - centre


def precision_recall(real: Any, fake: Any, *, k: int = 3) -> dict[str, float]:
    """{'precision', 'recall'} of features real (n, d) and fake (m, d). Raises DataError for no more than k rows."""
    real, fake = _pair(real, fake, k)
    return {"precision": _inside(fake, real, radii(real, k)), "recall": _inside(real, fake, radii(fake, k))}


def _inside(points: np.ndarray, centres: np.ndarray, radius: np.ndarray) -> float:
    """The share of `points` in a ball around one of `centres`."""
    hits = [(np.sqrt(squared) <= radius[None]).any(1) for _, squared in _squared(points, centres)]
    return float(np.concatenate(hits).mean())


def density_coverage(real: Any, fake: Any, *, k: int = 5) -> dict[str, float]:
    """{'density', 'coverage'} of features real (n, d) and fake (m, d). Raises DataError for no more than k rows."""
    real, fake = _pair(real, fake, k)
    radius, inside, covered = radii(real, k), 0, np.zeros(len(real), bool)
    for _, squared in _squared(fake, real):
        hits = np.sqrt(squared) <= radius[None]
        inside += int(hits.sum())
        covered |= hits.any(0)
    return {"density": inside / (k * len(fake)), "coverage": float(covered.mean())}


def nearest(x: Any, y: Any, *, k: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest rows of y (m, d) to each of x (n, d): distances (n, k), rising, and indices (n, k).

    The distances are those of the rows themselves, exact also for copies. Raises DataError for fewer than k rows.
    """
    k = check_count("k", k, "1 is the nearest.")
    x, y = check_features("x", x, least=1), check_features("y", y, least=k)
    check_pair("x and y", x, y)
    distances, indices = np.empty((len(x), k)), np.empty((len(x), k), np.int64)
    for start, squared in _squared(x, y):
        near = np.argpartition(squared, k - 1, axis=1)[:, :k]
        exact = np.stack([np.linalg.norm(x[start : start + BLOCK] - y[near[:, j]], axis=1) for j in range(k)], 1)
        order = np.argsort(exact, axis=1, kind="stable")
        distances[start : start + BLOCK] = np.take_along_axis(exact, order, 1)
        indices[start : start + BLOCK] = np.take_along_axis(near, order, 1)
    return distances, indices


def memorisation(samples: Any, train: Any, held_out: Any, *, copy_ratio: float = 1 / 3) -> dict[str, float]:
    """Are samples nearer to the training set than real pictures it has never seen? All (n, d), of one kind.

    'ratio': median distance of samples to train over that of `held_out`; 'nearer': the chance that a random sample is
    nearer than a random held-out row (ties half): 0.5 if neither, towards 1 the more is copied; 'copied' and
    'copied_held_out': shares whose nearest row is closer than `copy_ratio` times the next (Yoon et al. 2023).
    """
    of_samples, _ = nearest(samples, train, k=2)
    of_real, _ = nearest(held_out, train, k=2)
    if not np.median(of_real[:, 0]) > 0:
        raise DataError("half or more of held_out lies in train: it must be pictures that were not trained on.")
    ordered = np.sort(of_real[:, 0])
    below, upto = (np.searchsorted(ordered, of_samples[:, 0], side) for side in ("left", "right"))
    return {
        "ratio": float(np.median(of_samples[:, 0]) / np.median(of_real[:, 0])),
        "nearer": float(1 - (below + upto).mean() / (2 * len(ordered))),
        "copied": float((of_samples[:, 0] <= copy_ratio * of_samples[:, 1]).mean()),
        "copied_held_out": float((of_real[:, 0] <= copy_ratio * of_real[:, 1]).mean()),
    }
