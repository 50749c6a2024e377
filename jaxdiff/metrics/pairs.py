"""How far two pictures are from each other, one by one; and two embeddings of one thing.

PSNR = 10 log10(255^2 / mean squared error), of pixels 0 .. 255
SSIM = mean of (2 m_x m_y + C1) (2 s_xy + C2) / ((m_x^2 + m_y^2 + C1) (s_x^2 + s_y^2 + C2))
       over windows weighted by a Gaussian of 11 x 11, std 1.5; C1 = (0.01 L)^2, C2 = (0.03 L)^2 (Wang et al. 2004)
CLIP score = 100 max(cos, 0)                                            (Hessel et al. 2021 have 2.5 for 100)
"""

from typing import Any

import numpy as np

from jaxdiff.errors import DataError
from jaxdiff.metrics import retrieval
from jaxdiff.metrics.checks import check_features, unit_range

SPAN = 2.0
"""The width of [-1, 1], the L of SSIM."""


def _both(x: Any, y: Any) -> tuple[np.ndarray, np.ndarray]:
    x, y = unit_range("x", x), unit_range("y", y)
    if x.shape != y.shape:
        raise DataError(f"x and y must be pairs of pictures of one shape, got {x.shape} and {y.shape}.")
    return x, y


def psnr(x: Any, y: Any) -> np.ndarray:
    """Peak signal-to-noise ratio of each pair, in dB: float64 (n,); infinite for equal pictures.

    Pictures (n, h, w, c), uint8 or in [-1, 1]. Raises as `checks.check_images`.
    """
    x, y = _both(x, y)
    error = np.square(x - y).mean(axis=(1, 2, 3))
    return np.where(error > 0, 10 * np.log10(SPAN**2 / np.where(error > 0, error, 1)), np.inf)


def ssim(x: Any, y: Any, *, size: int = 11, std: float = 1.5) -> np.ndarray:
    """Structural similarity of each pair, the mean over channels and over windows inside: float64 (n,), 1 if equal.

    Pictures as for `psnr`. Raises DataError when they are smaller than a window.
    """
    x, y = (z + 1 for z in _both(x, y))  # its means are of pixels from 0 on
    if min(x.shape[1:3]) < size:
        raise DataError(f"SSIM needs pictures of at least {size} x {size}, got {x.shape[1]} x {x.shape[2]}.")
    u = np.arange(size) - (size - 1) / 2
    window = np.exp(-np.square(u / std) / 2)
    window /= window.sum()

    def smooth(z: np.ndarray) -> np.ndarray:
        for axis in (1, 2):
            z = np.lib.stride_tricks.sliding_window_view(z, size, axis=axis) @ window
        return z

    m_x, m_y = smooth(x), smooth(y)
    v_x, v_y, v_xy = smooth(x * x) - m_x**2, smooth(y * y) - m_y**2, smooth(x * y) - m_x * m_y
    c1, c2 = (0.01 * SPAN) ** 2, (0.03 * SPAN) ** 2
    score = (2 * m_x * m_y + c1) * (2 * v_xy + c2) / ((m_x**2 + m_y**2 + c1) * (v_x + v_y + c2))
    return score.mean(axis=(1, 2, 3))


def _unit(name: str, x: Any) -> np.ndarray:
    x = check_features(name, x, least=1)
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    if not norms.all():
        raise DataError(f"{name} has embeddings that are 0, so without a direction. Check the encoder.")
    return x / norms


def clip_score(images: Any, texts: Any) -> float:
    """The mean of 100 max(cos, 0) over pairs of embeddings (n, d), row i of one belonging to row i of the other.

    The encoder is the caller's: name it beside the figure. Raises DataError for shapes that differ.
    """
    images, texts = _unit("images", images), _unit("texts", texts)
    if images.shape != texts.shape:
        raise DataError(f"images and texts must be pairs of embeddings (n, d), got {images.shape} and {texts.shape}.")
    return float(100 * np.maximum((images * texts).sum(1), 0).mean())


def retrieval_recall(images: Any, texts: Any, own: Any, *, k: int = 1) -> dict[str, float]:
    """R-precision: the share of images (m, d) with their text, row own[i] of texts (n, d), among the k of largest cos.

    With its value by chance, k / n (Xu et al. 2018, Park et al. 2021). The distance of unit vectors orders as cos does.
    """
    texts = _unit("texts", texts)
    return retrieval.control(retrieval.ranks(_unit("images", images), texts, np.asarray(own)), k, len(texts))
