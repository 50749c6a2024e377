"""The short part of the trials of tests/oracles/reliability.py; the long one is a command there."""

import subprocess
import sys


def test_a_run_that_is_interrupted_in_every_way_ends_in_the_same_bits():
    """And one that forgets its place in the data is seen not to."""
    command = [sys.executable, "-m", "tests.oracles.reliability", "--short"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines() == [
        "one run through everything: passed",
        "one that forgets its place in the data: ['the log or the state is not the same']",
        "damages to a step: 20 of 20 seen, and the step before used",
    ]
