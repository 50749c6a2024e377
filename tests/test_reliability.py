"""A short part of the trials of tests/oracles/reliability.py; the long one is a command there."""

import re
import subprocess
import sys

FORGETFUL = """
import sys
from pathlib import Path
import numpy as np
from tests.oracles import reliability

def main(root):
    reliability.quick(str(root / "cache"))
    wanted = reliability.Run(root, "whole").finish()
    batches = reliability.job.inputs.batches
    reliability.job.inputs.batches = lambda *args, step, **kwargs: batches(*args, step=0, **kwargs)
    run = reliability.Run(root, "killed")
    print(reliability.attempt(run, lambda run: reliability.killed(run, np.random.default_rng(1), 1), wanted))

main(Path(sys.argv[1]))
"""


def test_killed_signalled_and_damaged_runs_end_in_the_same_bits():
    command = [sys.executable, "-m", "tests.oracles.reliability", "--trials=2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = re.findall(r": (\d+) of (\d+) (?:passed|seen)", done.stdout)
    assert counts == [("2", "2"), ("1", "1"), ("2", "2"), ("1", "1"), ("20", "20")]


def test_a_run_that_forgets_its_place_in_the_data_does_not_pass(tmp_path):
    done = subprocess.run([sys.executable, "-c", FORGETFUL, tmp_path], capture_output=True, text=True, check=True)
    assert done.stdout == "['the log or the state is not the same']\n"
