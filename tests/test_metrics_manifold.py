"""Balls around points: laid out by hand on a line, by brute force in space, and copies planted to be found."""

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from jaxdiff.errors import ConfigError, DataError
from jaxdiff.metrics import manifold

RNG = np.random.default_rng(0)


def test_on_a_line():
    """Reals 0, 1, 2, 3 with balls of radius 1 (k = 1); fakes 3.5 and 10, whose balls are of radius 6.5."""
    real, fake = np.arange(4.0)[:, None], np.asarray([[3.5], [10.0]])
    assert manifold.precision_recall(real, fake, k=1) == {"precision": 0.5, "recall": 1.0}
    assert manifold.density_coverage(real, fake, k=1) == {"density": 0.5, "coverage": 0.25}


def brute(real, fake, k):
    real_radius, fake_radius = (np.sort(cdist(x, x), axis=1)[:, k] for x in (real, fake))
    between = cdist(real, fake)
    inside = between <= real_radius[:, None]
    precision, recall = inside.any(0).mean(), (between <= fake_radius[None]).any(1).mean()
    return precision, recall, inside.sum() / k / len(fake), (between.min(1) <= real_radius).mean()


@pytest.mark.parametrize("k", [1, 3, 5])
def test_equals_brute_force_over_several_blocks(k, monkeypatch):
    monkeypatch.setattr(manifold, "BLOCK", 32)
    real, fake = RNG.normal(size=(101, 4)), RNG.normal(size=(77, 4)) * 0.7 + 0.5
    ours = manifold.precision_recall(real, fake, k=k) | manifold.density_coverage(real, fake, k=k)
    np.testing.assert_allclose(list(ours.values()), brute(real, fake, k), rtol=1e-12)


def test_a_common_offset_changes_nothing():
    real, fake = RNG.normal(size=(60, 3)), RNG.normal(size=(60, 3))
    moved = manifold.precision_recall(real + 1e6, fake + 1e6)
    assert moved == manifold.precision_recall(real, fake)


def test_the_same_set_is_precise_and_complete_and_a_far_one_neither():
    x = RNG.normal(size=(50, 3))
    assert set(manifold.precision_recall(x, x).values()) == {1.0}
    assert manifold.density_coverage(x, x)["coverage"] == 1.0
    far = manifold.precision_recall(x, x + 100) | manifold.density_coverage(x, x + 100)
    assert set(far.values()) == {0.0}


def test_a_dropped_mode_costs_recall_and_not_precision():
    modes = np.asarray([[0, 0], [20, 0]])
    real, fake = RNG.normal(size=(200, 2)) + modes[np.arange(200) % 2], RNG.normal(size=(200, 2))
    result = manifold.precision_recall(real, fake)
    assert result["precision"] > 0.8
    assert 0.4 < result["recall"] < 0.55


def test_nearest_finds_copies_at_distance_zero(monkeypatch):
    monkeypatch.setattr(manifold, "BLOCK", 8)
    train = RNG.normal(size=(40, 3)) + 1e4
    rows = RNG.permutation(40)[:20]
    distances, indices = manifold.nearest(train[rows], train, k=2)
    assert (indices[:, 0] == rows).all()
    assert (distances[:, 0] == 0).all()
    np.testing.assert_allclose(distances, np.sort(cdist(train[rows], train), axis=1)[:, :2], rtol=1e-12)


def test_memorisation_tells_copies_from_new_rows():
    train, held_out, fresh = RNG.normal(size=(3, 300, 4))
    honest = manifold.memorisation(fresh, train, held_out)
    assert 0.8 < honest["ratio"] < 1.25
    assert abs(honest["nearer"] - 0.5) < 0.1
    copies = manifold.memorisation(train[:100] + 1e-4 * RNG.normal(size=(100, 4)), train, held_out)
    assert copies["ratio"] < 0.01
    assert copies["nearer"] > 0.99
    assert copies["copied"] > 0.95
    assert copies["copied_held_out"] == honest["copied_held_out"] < 0.1


def test_half_copies_move_the_shares_by_half():
    train, held_out, fresh = RNG.normal(size=(3, 300, 4))
    half = manifold.memorisation(np.concatenate([train[:150], fresh[:150]]), train, held_out)
    assert abs(half["nearer"] - 0.75) < 0.07
    assert abs(half["copied"] - 0.5) < 0.06


def test_what_is_refused():
    x = RNG.normal(size=(4, 3))
    with pytest.raises(DataError, match="at least 5 rows, got 4"):
        manifold.precision_recall(x, RNG.normal(size=(9, 3)), k=4)
    with pytest.raises(DataError, match="one shape"):
        manifold.density_coverage(x, x[:, :2], k=1)
    with pytest.raises(ConfigError, match="k must"):
        manifold.radii(x, 0)
    with pytest.raises(DataError, match="not trained on"):
        manifold.memorisation(RNG.normal(size=(4, 3)), x, x)
