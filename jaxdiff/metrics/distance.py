"""Distances between two sets of features, seen as a Gaussian each (Frechet) or by a kernel (KID).

    FD   = |m_a - m_b|^2 + tr(A + B) - 2 tr((A B)^(1/2))     (Dowson and Landau 1982; FID: Heusel et al. 2017, eq. 6)
    tr((A B)^(1/2)) = sum of the roots of the eigenvalues of A^(1/2) B A^(1/2), which is symmetric and so never complex
    KID  = mean over subsets of MMD^2, unbiased, kernel (x . y / d + 1)^3                (Binkowski et al. 2018, eq. 4)

FD in the features of `inception` is the FID; in any other it is not, and no name here says so. Both fall with the
number of samples, FD by its bias, so a value means something only beside others of the same count.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxdiff.errors import ConfigError, DataError, check_count
from jaxdiff.metrics.checks import check_features, check_labels, check_pair
from jaxdiff.metrics.stats import Stats, check_contract, of


def frechet(a: Stats, b: Stats, *, min_count: int | None = None) -> float:
    """The Frechet distance of two Gaussians with these moments; the FID if they are of Inception features.

    Raises DataError when either has no more rows than features, since its covariance is singular then and the distance
    mostly bias; `min_count` lowers that limit. Raises ConfigError for statistics of different features.
    """
    check_contract(a, b)
    least = len(a.mean) + 1 if min_count is None else check_count("min_count", min_count, "2 is the least.", least=2)
    for stats in (a, b):
        if stats.count < least:
            raise DataError(
                f"a Frechet distance of {len(a.mean)} features needs at least {least} samples a side, got "
                f"{stats.count}. Give more, or min_count={stats.count} and compare only with equal counts."
            )
    mean = a.mean - b.mean
    root = _sqrt(a.covariance)
    cross = np.sqrt(np.clip(np.linalg.eigvalsh(root @ b.covariance @ root), 0, None)).sum()
    return max(0.0, float(mean @ mean + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross))


def _sqrt(matrix: np.ndarray) -> np.ndarray:
    """The symmetric root of a covariance, whose eigenvalues rounding may have made negative."""
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T


def frechet_by_class(
    real: Any, real_labels: Any, fake: Any, fake_labels: Any, *, min_count: int | None = None
) -> dict[int, float]:
    """The Frechet distance within each class that either side has; features (n, d), labels (n,).

    Raises DataError for a class with too few samples on a side; see `frechet`.
    """
    real, fake = check_features("real", real), check_features("fake", fake)
    real_labels = check_labels("real_labels", real_labels, len(real))
    fake_labels = check_labels("fake_labels", fake_labels, len(fake))
    result = {}
    for label in np.union1d(real_labels, fake_labels):
        sides = [x[y == label] for x, y in ((real, real_labels), (fake, fake_labels))]
        if min(map(len, sides)) < 2:
            raise DataError(f"class {label} has {len(sides[0])} real and {len(sides[1])} fake samples: give more.")
        result[int(label)] = frechet(of(sides[0]), of(sides[1]), min_count=min_count)
    return result


def mmd2(x: Any, y: Any) -> float:
    """The unbiased squared maximum mean discrepancy of features (m, d) and (n, d) under the cubic kernel."""
    x, y = check_features("x", x), check_features("y", y)
    check_pair("x and y", x, y)

    def within(u: np.ndarray) -> float:
        kernel = _cubic(u, u)
        return (kernel.sum() - np.trace(kernel)) / (len(u) * (len(u) - 1))

    return float(within(x) + within(y) - 2 * _cubic(x, y).mean())


def _cubic(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x @ y.T / x.shape[1] + 1) ** 3


def kid(real: Any, fake: Any, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0) -> Mapping[str, float]:
    """{'kid': mean, 'std': standard deviation} of `mmd2` over random subsets, without replacement inside each.

    Raises DataError when a side has fewer than `subset_size` rows, ConfigError for counts below 1 (2 for the size).
    """
    subsets = check_count("subsets", subsets, "100 is usual.")
    subset_size = check_count("subset_size", subset_size, "1000 is usual.", least=2)
    real, fake = check_features("real", real), check_features("fake", fake)
    if min(len(real), len(fake)) < subset_size:
        raise DataError(
            f"KID with subset_size={subset_size} needs as many rows, got {len(real)} real and {len(fake)} fake. "
            f"Give more, or subset_size={min(len(real), len(fake))}."
        )
    if seed < 0:
        raise ConfigError(f"seed must be an integer >= 0, got {seed}.")
    rng = np.random.default_rng(seed)
    values = [mmd2(*(x[rng.choice(len(x), subset_size, replace=False)] for x in (real, fake))) for _ in range(subsets)]
    return {"kid": float(np.mean(values)), "std": float(np.std(values))}
