"""Does the prompt decide the picture? Retrieval of the prompt's own training picture by the generated one.

rank_i   = number of other training pictures at least as near to sample i, in pixel L2 distance, as its own is
recall@k = share of samples with rank_i < k          chance: a sample that ignores its prompt has recall@k = k / n
"""

import numpy as np

from jaxdiff.errors import ConfigError


def ranks(samples: np.ndarray, pictures: np.ndarray, own: np.ndarray) -> np.ndarray:
    """How many other `pictures` (n, ...) are at least as near to each sample (m, ...) as picture `own[i]`: int (m,).

    Distances are squared L2 over all values, in float64 direct form. Raises ConfigError for shapes that do not fit.
    """
    samples, pictures, own = np.asarray(samples), np.asarray(pictures), np.asarray(own)
    if samples.shape[1:] != pictures.shape[1:] or own.shape != samples.shape[:1]:
        raise ConfigError(
            "ranks takes samples (m, ...), pictures (n, ...) of the same example shape and own (m,), got "
            f"{samples.shape}, {pictures.shape} and {own.shape}."
        )
    if len(own) and not 0 <= own.min() <= own.max() < len(pictures):
        raise ConfigError(f"own must index the {len(pictures)} pictures, got {own.min()} to {own.max()}.")
    flat = pictures.reshape(len(pictures), -1).astype(np.float64)
    result = np.empty(len(samples), np.int64)
    for i, sample in enumerate(samples):
        distances = np.square(flat - sample.reshape(-1).astype(np.float64)).sum(1)
        result[i] = (~(distances > distances[own[i]])).sum() - 1  # ties and NaN count against the sample
    return result


def recall(ranks: np.ndarray, k: int) -> float:
    """The share of `ranks` below `k`."""
    if k < 1:
        raise ConfigError(f"k must be an integer >= 1, got {k}.")
    return float((np.asarray(ranks) < k).mean())


def control(ranks: np.ndarray, k: int, n: int) -> dict[str, float]:
    """recall@k, its value by chance among `n` pictures (k / n), and how many times better than chance it is."""
    if not 1 <= k <= n:
        raise ConfigError(f"k must be between 1 and the number of pictures {n}, got {k}.")
    share, chance = recall(ranks, k), k / n
    return {f"recall_at_{k}": share, "chance": chance, "times_chance": share / chance}
