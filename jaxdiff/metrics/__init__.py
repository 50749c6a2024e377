"""How good samples are: arrays in, floats out. Statistics and distances are float64 on the host (NumPy).

    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> real, fake = rng.normal(size=(2000, 4)), rng.normal(loc=0.5, size=(2000, 4))  # features of some network
    >>> fd = frechet(stats.of(real), stats.of(fake))  # the FID, where they are those of `inception`
    >>> bool(0.9 < fd < 1.2)  # 4 x 0.5^2 and the bias of 2,000 samples
    True
    >>> sorted(precision_recall(real, fake))
    ['precision', 'recall']

`metrics.inception`, `metrics.lpips` and `metrics.classify` are networks and come with Flax: import them by name.

A value falls or rises with the number of samples, so quote it with that number, and beside a floor that was measured
the same way: real pictures against other real ones, and a Gaussian fitted to the data.
"""

from jaxdiff.metrics import checks, retrieval, stats
from jaxdiff.metrics.distance import frechet, frechet_by_class, kid, mmd2
from jaxdiff.metrics.manifold import density_coverage, memorisation, nearest, precision_recall
from jaxdiff.metrics.pairs import clip_score, psnr, retrieval_recall, ssim
from jaxdiff.metrics.stats import Stats

__all__ = [
    "Stats",
    "checks",
    "clip_score",
    "density_coverage",
    "frechet",
    "frechet_by_class",
    "kid",
    "memorisation",
    "mmd2",
    "nearest",
    "precision_recall",
    "psnr",
    "retrieval",
    "retrieval_recall",
    "ssim",
    "stats",
]
