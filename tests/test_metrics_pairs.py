"""PSNR, SSIM and embedding scores: closed forms, and SSIM's definition written out window by window with scipy."""

import numpy as np
import pytest
from scipy.signal import convolve2d

from jaxdiff.errors import DataError
from jaxdiff.metrics import pairs

RNG = np.random.default_rng(0)
X = RNG.integers(0, 256, (2, 16, 13, 3), dtype=np.uint8)
Y = np.clip(X + RNG.integers(-40, 40, X.shape), 0, 255).astype(np.uint8)


def test_psnr_of_a_known_error():
    x = np.full((1, 4, 4, 1), 100, np.uint8)
    x[0, 0, 0] = 0
    y = x + np.uint8(5)
    np.testing.assert_allclose(pairs.psnr(x, y), [20 * np.log10(255 / 5)], rtol=1e-12)
    np.testing.assert_allclose(pairs.psnr(x / 127.5 - 1, y / 127.5 - 1), [20 * np.log10(255 / 5)], rtol=1e-9)
    assert pairs.psnr(x, x)[0] == np.inf


def naive_ssim(x, y):
    """Wang et al. 2004, sections III.B and C, on 0 .. 255, with convolutions by the two-dimensional window."""
    u = np.arange(11) - 5
    window = np.exp(-(u[:, None] ** 2 + u[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    scores = []
    for channel in range(x.shape[-1]):
        a, b = x[..., channel].astype(float), y[..., channel].astype(float)
        mean = [convolve2d(z, window, "valid") for z in (a, b, a * a, b * b, a * b)]
        va, vb, vab = mean[2] - mean[0] ** 2, mean[3] - mean[1] ** 2, mean[4] - mean[0] * mean[1]
        top = (2 * mean[0] * mean[1] + c1) * (2 * vab + c2)
        scores.append((top / ((mean[0] ** 2 + mean[1] ** 2 + c1) * (va + vb + c2))).mean())
    return np.mean(scores)


def test_ssim_is_its_definition():
    np.testing.assert_allclose(pairs.ssim(X, Y), [naive_ssim(*pair) for pair in zip(X, Y, strict=True)], rtol=1e-9)
    np.testing.assert_allclose(pairs.ssim(X, X), 1, rtol=1e-12)


def test_pairs_must_fit():
    for metric in (pairs.psnr, pairs.ssim):
        with pytest.raises(DataError, match="one shape"):
            metric(X, Y[:1])
    with pytest.raises(DataError, match="at least 11 x 11"):
        pairs.ssim(X[:, :10], Y[:, :10])


def test_clip_score_is_a_mean_of_clipped_cosines():
    images = np.asarray([[1.0, 0], [0, 2], [3, 0], [1, 1]])
    texts = np.asarray([[5.0, 0], [1, 0], [-1, 0], [1, 0]])
    assert pairs.clip_score(images, texts) == pytest.approx(100 * (1 + 0 + 0 + np.sqrt(0.5)) / 4)
    with pytest.raises(DataError, match="pairs of embeddings"):
        pairs.clip_score(images, texts[:3])
    with pytest.raises(DataError, match="without a direction"):
        pairs.clip_score(images, texts * [[1], [1], [1], [0]])


def test_retrieval_goes_by_angle_and_not_by_length():
    texts = np.asarray([[1.0, 0], [100, 100], [0, 0.01]])
    images = np.asarray([[3.0, 0.1], [1, 1.1], [-1, 5], [1, 0]])
    result = pairs.retrieval_recall(images, texts, [0, 1, 2, 2], k=1)
    assert result == {"recall_at_1": 0.75, "chance": 1 / 3, "times_chance": pytest.approx(2.25)}
