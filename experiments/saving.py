"""What a run writes on its way may fail and cost nothing: it is said, and the next write tries again.

Only what is there at the end counts: a last checkpoint that cannot be written is an error.
"""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

from jaxdiff.train.checkpoint import Checkpoints, SaveError


@contextlib.contextmanager
def tolerated(what: str) -> Iterator[None]:
    """Say that the disk did not take `what`, and go on."""
    try:
        yield
    except OSError as error:
        tqdm.write(f"warning: {what} could not be written: {error}")


class Saver:
    """The checkpoints of a run that goes on after a save has failed, and says how much a kill would cost now."""

    def __init__(self, checkpoints: Checkpoints, meta: dict[str, Any], done: int):
        self.checkpoints, self.meta = checkpoints, meta
        self.safe = self.begun = (done, time.monotonic())  # a step that is saved, or being saved, and when that was

    def save(self, carry: Any, done: int, *, last: bool = False) -> None:
        """Begin to save `carry` at step `done`. Raises SaveError where it is the last time and cannot begin."""
        self.wait(done)
        now = time.monotonic()
        try:
            self.checkpoints.save(carry, done, self.meta)
            self.begun = (done, now)
        except SaveError as error:
            if last:
                raise
            self._warn(done, error)

    def wait(self, done: int) -> None:
        """Return when nothing is being saved any more; `done` is the step the run is at."""
        try:
            self.checkpoints.wait()
            self.safe = self.begun
        except SaveError as error:
            self.begun = self.safe
            self._warn(done, error)

    def _warn(self, done: int, error: SaveError) -> None:
        step, since = self.safe
        minutes = (time.monotonic() - since) / 60
        tqdm.write(
            f"warning: {error}\nThe run goes on, and tries again at the next save. A kill before that would cost what "
            f"was done since step {step}: {done - step} step(s), {minutes:.1f} minutes."
        )
