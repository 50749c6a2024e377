"""Retrieval arithmetic against cases whose answer is plain."""

import numpy as np
import pytest

from jaxdiff.errors import ConfigError
from jaxdiff.metrics import retrieval


def test_ranks_count_the_pictures_that_are_nearer():
    pictures = np.asarray([[0.0], [1.0], [3.0], [10.0]])
    samples = np.asarray([[0.1], [2.9], [9.0]])
    assert retrieval.ranks(samples, pictures, np.asarray([0, 1, 0])).tolist() == [0, 1, 3]


def test_pictures_themselves_are_found():
    pictures = np.random.default_rng(0).normal(size=(20, 4, 4, 3)).astype(np.float32)
    assert retrieval.ranks(pictures, pictures, np.arange(20)).tolist() == [0] * 20


def test_a_sample_that_says_nothing_is_not_rewarded():
    same = np.zeros((10, 3))
    assert retrieval.ranks(same[:1], same, np.asarray([4])).tolist() == [9]
    assert retrieval.ranks(np.full((1, 3), np.nan), same + np.arange(10)[:, None], np.asarray([0])).tolist() == [9]


def test_samples_without_relation_have_the_recall_of_chance():
    rng = np.random.default_rng(1)
    ranks = retrieval.ranks(rng.normal(size=(4000, 2)), rng.normal(size=(50, 2)), rng.integers(0, 50, 4000))
    assert abs(retrieval.recall(ranks, 5) - 0.1) < 4 * np.sqrt(0.1 * 0.9 / 4000)


def test_control_is_recall_over_chance():
    figure = retrieval.control(np.asarray([0, 4, 5, 90]), 5, 100)
    assert figure == {"recall_at_5": 0.5, "chance": 0.05, "times_chance": 10.0}


@pytest.mark.parametrize(
    ("samples", "pictures", "own"),
    [((2, 3), (5, 4), [0, 1]), ((2, 3), (5, 3), [0]), ((2, 3), (5, 3), [0, 5]), ((2, 3), (5, 3), [-1, 0])],
)
def test_shapes_and_indices_that_do_not_fit(samples, pictures, own):
    with pytest.raises(ConfigError):
        retrieval.ranks(np.zeros(samples), np.zeros(pictures), np.asarray(own))


@pytest.mark.parametrize(("k", "n"), [(0, 5), (6, 5)])
def test_k_out_of_range(k, n):
    with pytest.raises(ConfigError):
        retrieval.control(np.asarray([0]), k, n)
