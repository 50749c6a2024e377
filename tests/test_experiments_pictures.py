"""Sheets of samples: enlarged so that they can be seen, with the name of each row beside it."""

import numpy as np

from experiments import pictures


def grey(count, size=16):
    return np.zeros((count, size, size, 3), np.float32)


def test_several_pictures_are_enlarged_and_one_keeps_its_pixels():
    assert pictures.sheet(grey(1)).size == (16, 16)
    assert pictures.sheet(grey(4)).size == (4 * 34, 4 * 34)  # two of 16 and a gap of 2, times 4
    assert pictures.sheet(grey(4, 64)).size == (130, 130)


def test_equal_runs_of_names_are_rows_with_their_name_beside_them():
    plain, named = pictures.sheet(grey(6)), pictures.sheet(grey(6), ["cat"] * 3 + ["dog"] * 3)
    assert named.height == 2 * 18 * 4 - 8
    assert named.width > plain.width
    margin = np.asarray(named)[:, : named.width - (3 * 18 - 2) * 4]
    top, bottom = np.array_split(margin, 2)
    assert (top < 128).any()
    assert (bottom < 128).any()
    assert not np.array_equal(top, bottom)  # another name


def test_names_that_do_not_come_in_equal_runs_are_left_out():
    assert pictures.sheet(grey(4), ["a", "a", "a", "b"]).size == pictures.sheet(grey(4)).size
    assert pictures.sheet(grey(4), ["a"] * 4).size == pictures.sheet(grey(4)).size


def test_points_are_dots():
    assert pictures.sheet(np.zeros((5, 2), np.float32)).size == (256, 256)
