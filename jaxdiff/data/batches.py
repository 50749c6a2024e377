"""Which examples make the batch of a step: a pure function of (seed, step).

Position p = step * batch_size + i lies in epoch p // n at place p % n, and every epoch is a permutation of its own:

    index(p) = permutation(seed, p // n)[p % n]

So every example comes exactly once an epoch, nothing is dropped (batches may straddle epochs), and a resumed run
continues with the very next batch, on any number of hosts. The permutation sorts raw Philox words, whose stream NumPy
keeps the same across its versions. Records that cannot be used are replaced: see `faults`.
"""

import functools
import os
import signal
import threading
import time
import warnings
from collections.abc import Container, Generator
from typing import Any

import numpy as np

from jaxdiff.data import faults as fault
from jaxdiff.errors import ConfigError, DataError

_FAR = 2**60
_DEATHS = 3  # of workers, without a batch between them


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, num_examples: int) -> np.ndarray:
    words = np.random.Philox(np.random.SeedSequence((seed, epoch))).random_raw(num_examples)
    permutation = np.argsort(words, kind="stable").astype(np.int32)
    permutation.flags.writeable = False  # it is shared by every caller through the cache
    return permutation


def order(
    seed: int, step: int, *, batch_size: int, num_examples: int, skipped: Container[int] = frozenset()
) -> np.ndarray:
    """The example indices of the batch of `step`: int32 (batch_size,), each epoch a fresh permutation.

    Those of `skipped` (such as `Dataset.skipped`) are replaced, see `faults`. Raises ConfigError for a negative seed
    or step, or an empty batch or data set.
    """
    for name, value, least in (("seed", seed, 0), ("step", step, 0), ("batch_size", batch_size, 1)):
        if value < least:
            raise ConfigError(f"{name} must be an integer >= {least}, got {value}.")
    if num_examples < 1:
        raise ConfigError(f"num_examples must be an integer >= 1, got {num_examples}: the data set is empty.")
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs, places = np.divmod(positions, num_examples)
    parts = [_permutation(seed, int(e), num_examples)[places[epochs == e]] for e in np.unique(epochs)]
    return fault.replace(seed, step, np.concatenate(parts), skipped, num_examples)


def orders(
    seed: int, step: int, count: int, *, batch_size: int, num_examples: int, skipped: Container[int] = frozenset()
) -> np.ndarray:
    """The batches of `step`, `step + 1`, ..., as int32 (count, batch_size): the input of a scan over steps."""
    if count < 1:
        raise ConfigError(f"count must be an integer >= 1, got {count}.")
    sizes: Any = {"batch_size": batch_size, "num_examples": num_examples, "skipped": skipped}
    return np.stack([order(seed, step + k, **sizes) for k in range(count)])


def stream(
    source: fault.Examples,
    *,
    seed: int,
    batch_size: int,
    step: int = 0,
    ahead: int = 16,
    threads: int = 8,
    workers: int = 0,
    rows: slice = slice(None),
    faults: fault.Faults | None = None,
) -> Generator[tuple[np.ndarray, np.ndarray]]:
    """Batches of a set that does not fit in memory: pairs (indices int32 (b,), examples (b, ...)), without end.

    The batch of each step is that of `order(seed, step)`, bad records replaced and listed in `faults`. Grain reads
    `ahead` batches ahead, by `threads` in this process or in each of `workers` others, which are started again should
    one die. Of many hosts each reads its own `rows`. `step` resumes there. Look labels and captions up by the indices.
    Close it to end the workers. Raises DataError when Grain is not installed, too many records are bad, or workers die
    again and again.
    """
    for name, value, least in (("ahead", ahead, 1), ("threads", threads, 1), ("workers", workers, 0)):
        if value < least:
            raise ConfigError(f"{name} must be an integer >= {least}, got {value}.")
    order(seed, step, batch_size=batch_size, num_examples=len(source))  # the same checks
    try:
        import grain  # noqa: F401
    except ImportError as error:
        raise DataError("streaming needs Grain. Type: pip install 'jaxdiff[grain]'.") from error
    found = fault.Faults(len(source)) if faults is None else faults
    return _restarted(_Batch(source, seed, batch_size, rows), step, ahead, threads, workers, found)


class _Batch:
    """step -> (indices, examples, faults): what each worker is sent."""

    def __init__(self, source: fault.Examples, seed: int, batch_size: int, rows: slice):
        self.source, self.seed, self.batch_size, self.rows = source, seed, batch_size, rows

    def __call__(self, step: int) -> dict[str, Any]:
        indices = order(self.seed, step, batch_size=self.batch_size, num_examples=len(self.source))
        indices, examples, bad = fault.read(self.source, self.seed, step, indices[self.rows])
        return {"indices": indices, "examples": examples, "bad": tuple(bad.items())}


def _restarted(
    batch: _Batch, step: int, ahead: int, threads: int, workers: int, faults: fault.Faults
) -> Generator[tuple[np.ndarray, np.ndarray]]:
    deaths = 0
    while True:
        batches = _grain(batch, step, ahead, threads, workers)
        try:
            for one in batches:
                faults.add(dict(one["bad"]))
                yield one["indices"], one["examples"]
                step, deaths = step + 1, 0
        except RuntimeError as error:
            if "terminated unexpectedly" not in str(error):
                raise
            deaths += 1
            if deaths >= _DEATHS:
                raise DataError(
                    f"the workers that read the data died {deaths} times before step {step} could be read: {error} The "
                    "usual reason is too little memory, or too small a /dev/shm: take fewer workers, or none."
                ) from error
            warnings.warn(f"a worker that reads the data died before step {step}; it is started again.", stacklevel=2)
        finally:
            batches.close()


def _grain(batch: _Batch, step: int, ahead: int, threads: int, workers: int) -> Any:
    """Grain's iterator over the batches from `step` on."""
    import absl.flags
    import grain

    each = max(1, ahead // max(1, workers))
    options = grain.ReadOptions(num_threads=min(threads, each), prefetch_buffer_size=each)
    batches = grain.MapDataset.range(step, _FAR).map(batch).to_iter_dataset(options)
    if workers:
        if not absl.flags.FLAGS.is_parsed():
            absl.flags.FLAGS.mark_as_parsed()  # Grain reads its own, all at their defaults, outside absl.app.run too
        init = functools.partial(_begin_worker, os.getpid())
        batches = batches.mp_prefetch(grain.MultiprocessingOptions(workers, per_worker_buffer_size=1), init)
    return iter(batches)


def _begin_worker(parent: int, *_: int) -> None:
    """Let Ctrl-C be the parent's to answer, and end with it however it ends: Grain's workers would live on."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
