"""Distances against closed forms for Gaussians, scipy's matrix root, and loops that spell the definition out."""

import numpy as np
import pytest
from scipy import linalg

from jaxdiff.errors import ConfigError, DataError
from jaxdiff.metrics import distance, stats

RNG = np.random.default_rng(0)


def gaussian(mean, covariance, count=100):
    """Statistics with exactly these moments."""
    return stats.Stats(count, np.asarray(mean, float), np.asarray(covariance, float) * (count - 1))


def test_frechet_of_gaussians_on_the_axes():
    """Diagonal covariances: |m|^2 + sum (s_a - s_b)^2."""
    a, b = gaussian([0, 0, 0], np.diag([1.0, 4, 0])), gaussian([3, 4, 0], np.diag([9.0, 4, 1]))
    assert distance.frechet(a, b) == pytest.approx(25 + 4 + 0 + 1, rel=1e-12)


def test_frechet_equals_the_published_formula_with_scipys_root():
    x, y = RNG.normal(size=(200, 6)) @ RNG.normal(size=(6, 6)), RNG.normal(size=(300, 6)) + 1
    a, b = np.cov(x.T), np.cov(y.T)
    published = np.square(x.mean(0) - y.mean(0)).sum() + np.trace(a + b - 2 * linalg.sqrtm(a @ b).real)
    assert distance.frechet(stats.of(x), stats.of(y)) == pytest.approx(published, rel=1e-9)


def test_frechet_does_not_change_under_rotation_and_order_and_is_zero_for_equals():
    x, y = RNG.normal(size=(50, 4)), RNG.normal(size=(60, 4)) * [1, 2, 3, 4]
    turn = np.linalg.qr(RNG.normal(size=(4, 4)))[0]
    value = distance.frechet(stats.of(x), stats.of(y))
    assert distance.frechet(stats.of(y), stats.of(x)) == pytest.approx(value, rel=1e-9)
    assert distance.frechet(stats.of(x @ turn), stats.of(y @ turn)) == pytest.approx(value, rel=1e-9)
    assert distance.frechet(stats.of(x), stats.of(x)) == pytest.approx(0, abs=1e-9)


def test_frechet_needs_more_rows_than_features():
    x, y = stats.of(RNG.normal(size=(6, 5))), stats.of(RNG.normal(size=(5, 5)))
    with pytest.raises(DataError, match=r"at least 6 samples a side, got 5.*min_count=5"):
        distance.frechet(x, y)
    assert distance.frechet(x, y, min_count=2) > 0
    with pytest.raises(ConfigError, match="not of the same features"):
        distance.frechet(x, stats.of(RNG.normal(size=(9, 5)), {"features": "other"}))


def test_by_class_is_the_distance_of_each_class_alone():
    x, y = RNG.normal(size=(40, 3)), RNG.normal(size=(40, 3)) + 1
    labels, others = np.arange(40) % 2, np.arange(40) // 20
    result = distance.frechet_by_class(x, labels, y, others)
    assert result == {c: distance.frechet(stats.of(x[labels == c]), stats.of(y[others == c])) for c in (0, 1)}
    with pytest.raises(DataError, match="class 2 has 0 real and 1 fake"):
        distance.frechet_by_class(x, labels, y, np.where(np.arange(40) == 5, 2, others))


def naive_mmd2(x, y):
    def k(u, v):
        return (sum(a * b for a, b in zip(u, v, strict=True)) / len(u) + 1) ** 3

    def off_diagonal(u):
        return [k(u[i], u[j]) for i in range(len(u)) for j in range(len(u)) if i != j]

    return np.mean(off_diagonal(x)) + np.mean(off_diagonal(y)) - 2 * np.mean([k(u, v) for u in x for v in y])


def test_mmd2_is_the_sum_of_its_definition():
    x, y = RNG.normal(size=(7, 3)), RNG.normal(size=(9, 3)) + 0.5
    assert distance.mmd2(x, y) == pytest.approx(naive_mmd2(x, y), rel=1e-10)


def test_mmd2_is_unbiased():
    """Equal distributions: its mean is 0 within the error of the mean, and it is negative about half of the time."""
    values = [distance.mmd2(*RNG.normal(size=(2, 20, 2))) for _ in range(400)]
    assert abs(np.mean(values)) < 4 * np.std(values) / 20
    assert 0.3 < np.mean(np.asarray(values) < 0) < 0.8


def test_kid_is_mmd2_of_its_subsets():
    x, y = RNG.normal(size=(30, 3)), RNG.normal(size=(40, 3)) + 0.5
    whole = distance.kid(x[:30], y[:30], subsets=3, subset_size=30)
    assert whole == pytest.approx({"kid": distance.mmd2(x, y[:30]), "std": 0}, abs=1e-12)
    part = distance.kid(x, y, subsets=200, subset_size=10, seed=1)
    assert part["kid"] == pytest.approx(distance.mmd2(x, y), abs=4 * part["std"] / np.sqrt(200))
    assert part == distance.kid(x, y, subsets=200, subset_size=10, seed=1)
    assert part != distance.kid(x, y, subsets=200, subset_size=10, seed=2)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"subset_size": 31}, DataError, "got 30 real and 40 fake"),
        ({"subset_size": 1}, ConfigError, "subset_size"),
        ({"subset_size": 10, "subsets": 0}, ConfigError, "subsets"),
        ({"subset_size": 10, "seed": -1}, ConfigError, "seed"),
    ],
)
def test_kid_refuses(options, error, words):
    with pytest.raises(error, match=words):
        distance.kid(RNG.normal(size=(30, 3)), RNG.normal(size=(40, 3)), **options)
