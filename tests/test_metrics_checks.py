"""What metrics refuse: every kind of wrong array has its own plain error, and right ones pass unchanged."""

import numpy as np
import pytest

from jaxdiff.errors import DataError, NonFiniteError
from jaxdiff.metrics import checks

RNG = np.random.default_rng(0)
PICTURES = RNG.integers(0, 256, (3, 4, 5, 3), dtype=np.uint8)
PICTURES[:, 0, 0] = [0, 128, 255]


def test_right_pictures_pass_unchanged():
    for images in (PICTURES, PICTURES / 127.5 - 1, (PICTURES / 127.5 - 1).astype(np.float32)):
        assert checks.check_images("x", images) is images


def test_all_pixel_values_go_there_and_back():
    values = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    for dtype in (np.float32, np.float64):
        assert (checks.pixels("x", checks.unit_range("x", values).astype(dtype)) == values).all()


@pytest.mark.parametrize(
    ("images", "error", "words"),
    [
        (PICTURES[0], DataError, r"\(n, height, width"),
        (PICTURES[:0], DataError, "shape"),
        (PICTURES.astype(np.int32), DataError, "int32"),
        (PICTURES.astype(np.float32), DataError, "0 to 255"),
        (PICTURES / 127.5 - 1 + 1e-3, DataError, r"\[-1, 1\]"),
        (np.full((2, 4, 4, 3), 7, np.uint8), DataError, "one colour"),
        (
            np.where(np.arange(3)[:, None, None, None] == 1, np.nan, PICTURES / 255),
            NonFiniteError,
            "1 of 3.*first at 1",
        ),
        (np.where(PICTURES > 250, np.inf, 0.0), NonFiniteError, "infinite"),
    ],
)
def test_wrong_pictures_are_refused(images, error, words):
    for check in (checks.check_images, checks.pixels, checks.unit_range):
        with pytest.raises(error, match=words):
            check("samples", images)


def test_the_number_of_channels_can_be_asked_for():
    with pytest.raises(DataError, match="width, 1"):
        checks.check_images("x", PICTURES, channels=1)


@pytest.mark.parametrize(
    ("features", "error", "words"),
    [
        (np.zeros(4), DataError, r"\(n, d\)"),
        (np.zeros((4, 2), complex), DataError, "complex"),
        (np.zeros((4, 0)), DataError, r"\(4, 0\)"),
        (RNG.normal(size=(1, 3)), DataError, "at least 2"),
        (np.ones((4, 3)), DataError, "all the same"),
        (np.where(np.arange(4)[:, None] == 2, np.nan, RNG.normal(size=(4, 3))), NonFiniteError, "1 of 4"),
    ],
)
def test_wrong_features_are_refused(features, error, words):
    with pytest.raises(error, match=words):
        checks.check_features("real", features)


@pytest.mark.parametrize("labels", [[0, 1], [0.0, 1, 2], [0, -1, 2], [[0], [1], [2]]])
def test_wrong_labels_are_refused(labels):
    assert checks.check_labels("labels", np.arange(3, dtype=np.uint8), 3).dtype == np.int64
    with pytest.raises(DataError, match="3 integers"):
        checks.check_labels("labels", labels, 3)
