"""Which examples make the batch of a step: a pure function of (seed, step).

Position p = step * batch_size + i lies in epoch p // n at place p % n, and every epoch is a permutation of its own:

    index(p) = permutation(seed, p // n)[p % n]

So every example comes exactly once an epoch, nothing is dropped (batches may straddle epochs), and a resumed run
continues with the very next batch, on any number of hosts. The permutation sorts raw Philox words, whose stream NumPy
keeps the same across its versions.
"""

import functools
from collections.abc import Iterator
from typing import Protocol

import numpy as np

from jaxdiff.errors import ConfigError, DataError

_FAR = 2**60


class Examples(Protocol):
    """What `stream` reads: a length, and one array an index (`ImageFolder` is one)."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> np.ndarray: ...


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, num_examples: int) -> np.ndarray:
    words = np.random.Philox(np.random.SeedSequence((seed, epoch))).random_raw(num_examples)
    permutation = np.argsort(words, kind="stable").astype(np.int32)
    permutation.flags.writeable = False  # it is shared by every caller through the cache
    return permutation


def order(seed: int, step: int, *, batch_size: int, num_examples: int) -> np.ndarray:
    """The example indices of the batch of `step`: int32 (batch_size,), each epoch a fresh permutation.

    Raises ConfigError for a negative seed or step, or an empty batch or data set.
    """
    for name, value, least in (("seed", seed, 0), ("step", step, 0), ("batch_size", batch_size, 1)):
        if value < least:
            raise ConfigError(f"{name} must be an integer >= {least}, got {value}.")
    if num_examples < 1:
        raise ConfigError(f"num_examples must be an integer >= 1, got {num_examples}: the data set is empty.")
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs, places = np.divmod(positions, num_examples)
    parts = [_permutation(seed, int(e), num_examples)[places[epochs == e]] for e in np.unique(epochs)]
    return np.concatenate(parts)


def orders(seed: int, step: int, count: int, *, batch_size: int, num_examples: int) -> np.ndarray:
    """The batches of `step`, `step + 1`, ..., as int32 (count, batch_size): the input of a scan over steps."""
    if count < 1:
        raise ConfigError(f"count must be an integer >= 1, got {count}.")
    return np.stack([order(seed, step + k, batch_size=batch_size, num_examples=num_examples) for k in range(count)])


def stream(
    source: Examples, *, seed: int, batch_size: int, step: int = 0, ahead: int = 2, threads: int = 8
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches of a set that does not fit in memory: pairs (indices int32 (b,), examples (b, ...)), without end.

    The batch of each step is that of `order(seed, step)`, `ahead` batches of it read ahead by Grain's threads; `step`
    resumes there. Look labels and captions up by the indices. Raises DataError when Grain is not installed.
    """
    order(seed, step, batch_size=batch_size, num_examples=len(source))  # the same checks
    try:
        import grain
    except ImportError as error:
        raise DataError("streaming needs Grain. Type: pip install 'jaxdiff[grain]'.") from error

    def example(position: int) -> tuple[np.int32, np.ndarray]:
        epoch, place = divmod(position, len(source))
        index = _permutation(seed, epoch, len(source))[place]
        return index, source[int(index)]

    positions = grain.MapDataset.range(step * batch_size, _FAR // batch_size * batch_size)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead * batch_size)
    return iter(positions.map(example).to_iter_dataset(options).batch(batch_size))
