"""The classification accuracy score on pictures whose classes are plain, shuffled, or partly missing."""

import jax
import numpy as np
import pytest

from jaxdiff.errors import DataError
from jaxdiff.metrics import classify

RNG = np.random.default_rng(0)


def stripes(count, classes=3):
    """Class c: stripes of period 2 + c, with noise."""
    labels = RNG.integers(0, classes, count)
    columns = np.arange(8)[None, None, :, None]
    base = np.where(columns % (2 + labels[:, None, None, None]) == 0, 200, 40)
    return np.clip(base + RNG.normal(0, 20, (count, 8, 8, 1)), 0, 255).astype(np.uint8), labels


X, Y = stripes(200)
REAL, REAL_Y = stripes(150)


def score(samples, labels):
    return classify.classification_accuracy(jax.random.key(0), samples, labels, REAL, REAL_Y, steps=40, width=8)


def test_good_samples_teach_and_wrong_labels_do_not():
    assert score(X, Y) > 0.95
    assert score(X, (Y + 1) % 3) < 0.05


def test_a_class_without_samples_is_named():
    with pytest.raises(DataError, match=r"without samples: \[2\]"):
        score(X[Y < 2], Y[Y < 2])
    with pytest.raises(DataError, match="one shape"):
        score(X[:, :6], Y)
    with pytest.raises(DataError, match="float"):
        score(X / 127.5 - 1, Y)
