"""Streamed statistics against NumPy's own covariance, any way of cutting the stream, and the file that keeps them."""

import functools

import numpy as np
import pytest

from jaxdiff.errors import ConfigError, DataError, NonFiniteError
from jaxdiff.metrics import stats

X = np.random.default_rng(0).normal(loc=1000, size=(97, 5)) @ np.diag([1.0, 10, 0.1, 1, 1])
CONTRACT = {"features": "test", "range": "[-1, 1]"}


@pytest.mark.parametrize("cuts", [[], [1], [50], [1, 2, 3, 96], [10, 20, 30]])
def test_any_cut_of_the_stream_has_the_moments_of_the_whole(cuts):
    whole = functools.reduce(stats.merge, [stats.of(part, CONTRACT) for part in np.split(X, cuts)])
    assert whole.count == 97
    np.testing.assert_allclose(whole.mean, X.mean(0), rtol=1e-14)
    np.testing.assert_allclose(whole.covariance, np.cov(X.T), rtol=1e-9)


def test_a_large_offset_costs_no_digits():
    """The textbook sum of squares would lose all of them here."""
    shifted = functools.reduce(stats.merge, [stats.of(part) for part in np.split(X + 2.0**30, 97)])
    np.testing.assert_allclose(shifted.covariance, np.cov(X.T + 2.0**30), rtol=1e-4)


def test_float32_rows_are_summed_in_float64():
    x = np.random.default_rng(1).uniform(size=(1000, 3)).astype(np.float32)
    np.testing.assert_allclose(stats.of(x).mean, x.astype(np.float64).mean(0), rtol=1e-14)


def test_a_file_gives_back_what_it_was_given(tmp_path):
    stats.save(tmp_path / "a.safetensors", stats.of(X, CONTRACT))
    back = stats.load(tmp_path / "a.safetensors")
    assert (back.count, back.contract) == (97, CONTRACT)
    np.testing.assert_array_equal(back.mean, X.mean(0))
    np.testing.assert_allclose(back.covariance, np.cov(X.T), rtol=1e-12)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_file_of_another_kind_is_refused(tmp_path):
    from safetensors.numpy import save_file

    with pytest.raises(DataError, match="cannot read"):
        stats.load(tmp_path / "none.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"\x20\x00\x00\x00\x00\x00\x00\x00{")
    with pytest.raises(DataError, match="cannot read"):
        stats.load(tmp_path / "cut.safetensors")
    save_file({"mean": X}, tmp_path / "other.safetensors")
    with pytest.raises(DataError, match="no statistics"):
        stats.load(tmp_path / "other.safetensors")


def test_other_features_cannot_be_merged():
    with pytest.raises(ConfigError, match=r"range: '\[-1, 1\]' and '\[0, 1\]'"):
        stats.merge(stats.of(X, CONTRACT), stats.of(X, CONTRACT | {"range": "[0, 1]"}))
    with pytest.raises(ConfigError, match="d = 5 and 4"):
        stats.merge(stats.of(X), stats.of(X[:, :4]))


def test_too_few_or_broken_rows():
    with pytest.raises(DataError, match="at least 2 rows, got 1"):
        _ = stats.of(X[:1]).covariance
    with pytest.raises(NonFiniteError):
        stats.of(np.where(X > 1001, np.inf, X))
