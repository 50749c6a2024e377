"""Gradients that go bad: three in a row or ten in 1,000 roll the run back, and no parameter is ever not finite."""

import dataclasses
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import train as job
from experiments import workdir
from jaxdiff import train
from jaxdiff.errors import NonFiniteError
from jaxdiff.train import guard
from jaxdiff.train import step as step_lib
from tests.oracles import reliability
from tests.oracles.reliability import NOW_AND_THEN

OPTIMIZER = train.adam(1e-2)
remember, trouble = jax.jit(guard.remember), jax.jit(guard.trouble)


def troubles(bad):
    """The steps after which it is time to go back, for gradients that are bad at the steps `bad`."""
    bad_at, found = jnp.full(10, -1, jnp.int32), []
    for n in range(max(bad) + 2):
        step = jnp.int32(n)
        bad_at = remember(bad_at, step, jnp.asarray(n not in bad))
        if trouble(bad_at, step):
            found.append(n)
    return found


@pytest.mark.parametrize(
    ("bad", "found"),
    [
        ([0, 1], []),
        ([0, 1, 2], [2]),
        ([5, 6, 8, 9], []),
        ([5, 6, 7, 8], [7, 8]),
        (range(0, 91, 10), [90]),
        (range(0, 999, 111), []),
        ([*range(0, 990, 120), 999], [999]),
        ([*range(0, 990, 120), 1000], []),
    ],
)
def test_when_it_is_time_to_go_back(bad, found):
    """The rule in words: this gradient is bad, and so are the two before, or ten of the last 1,000 with this one."""
    bad = set(bad)
    words = [n for n in sorted(bad) if {n - 1, n - 2} <= bad or sum(n - 1000 < m <= n for m in bad) >= 10]
    assert troubles(bad) == found == words


def state_at(step, bad_steps, skipped=((-1, -1), (-1, -1))):
    state = train.create_state({"w": jnp.full(3, float(step))}, OPTIMIZER)
    return dataclasses.replace(
        state, step=jnp.int32(step), bad_steps=jnp.int32(bad_steps), bad_at=jnp.arange(10, dtype=jnp.int32),
        skipped=jnp.array(skipped, jnp.int32),
    )  # fmt: skip


def test_rolling_back_takes_the_parameters_and_leaves_out_the_data():
    new = train.roll_back(state_at(20, 1), state_at(33, 9, ((-1, -1), (4, 8))), 34)
    np.testing.assert_array_equal(new.params["w"], np.full(3, 20.0))
    assert (int(new.step), int(new.bad_steps)) == (34, 1 + 14)  # 19 updates before, 19 after
    assert new.bad_at.tolist() == [-1] * 10
    assert new.skipped.tolist() == [[4, 8], [20, 34]]


def test_the_third_time_in_a_thousand_steps_is_an_error():
    skipped = ((20, 34), (34, 40))
    with pytest.raises(NonFiniteError, match="step 1033, though the data of the steps 20 to 33 and 34 to 39"):
        train.roll_back(state_at(1000, 1), state_at(1033, 9, skipped), 1033)
    assert int(train.roll_back(state_at(1000, 1), state_at(1034, 9, skipped), 1034).step) == 1034


def run(directory, bad, monkeypatch, stop_at=None):
    """The toy run of 30 steps where the losses of the steps `bad` are NaN, and a signal comes in step `stop_at`.

    After every step all of the parameters, their averages and the optimiser's moments must be finite.
    """
    make, seen = job._make_step, []

    def made(job, steps):
        step = make(job, steps)

        def checked(state, batches, *given):
            if int(state.step) == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
            state, metrics = step(state, batches, *given)
            leaves = jax.tree.leaves((state.params, state.ema_params, state.opt_state))
            assert all(np.isfinite(leaf).all() for leaf in leaves), "parameters are not finite"
            seen.append(int(state.step))
            return state, metrics

        return checked

    with monkeypatch.context() as patch:
        reliability.poison(bad, patch.setattr)
        patch.setattr(job, "_make_step", made)
        patch.setattr(job, "save_grid", lambda *arguments: None)
        patch.setattr(job.check, "mesh", lambda config: train.mesh.make(devices=jax.devices()[:1]))
        status = job.run([*reliability.TOY, "--config.train.steps=30", f"--workdir={directory}"])
    assert seen
    return status


def state_of(directory):
    config, _ = workdir.load(directory)
    return train.Checkpoints(directory / "checkpoints").restore(job.Job(config, directory).abstract)[0]["state"]


def assert_same_bits(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        assert run(directory, NOW_AND_THEN, patch) == 0
    return directory


def test_a_run_in_trouble_goes_back_and_skips_the_data(whole, tmp_path, monkeypatch):
    """It is the run that never made the updates of the steps 18 to 20; there the rule is switched off."""
    state = state_of(whole)
    assert (int(state.step), int(state.bad_steps)) == (30, 8 + 3)
    assert state.skipped.tolist() == [[-1, -1], [18, 21]]
    monkeypatch.setattr(guard, "WINDOW", 0)
    monkeypatch.setattr(guard, "IN_A_ROW", 4)
    assert run(tmp_path / "run", {*NOW_AND_THEN, 19}, monkeypatch) == 0
    other = state_of(tmp_path / "run")
    assert_same_bits(
        (state.params, state.ema_params, state.opt_state), (other.params, other.ema_params, other.opt_state)
    )


def test_interrupted_in_trouble_it_goes_back_to_the_same_step(whole, tmp_path, monkeypatch):
    """Saves at odd steps, with two kept, do not cost the one it will go back to."""
    for stop_at in (18, 19, 20):
        assert run(tmp_path / "run", NOW_AND_THEN, monkeypatch, stop_at) == 143
    assert run(tmp_path / "run", NOW_AND_THEN, monkeypatch) == 0
    assert_same_bits(state_of(tmp_path / "run"), state_of(whole))
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


def test_bursts_of_one_and_of_three_cost_their_own_steps(tmp_path, monkeypatch):
    """Three go back to the checkpoint of step 12, which holds the parameters of step 10."""
    assert run(tmp_path / "run", [4, 10, 11, 12], monkeypatch) == 0
    assert int(state_of(tmp_path / "run").bad_steps) == 4


@pytest.mark.parametrize(("length", "lives"), [(10, 2), (1000, 1)])
def test_a_long_burst_stops_the_run(tmp_path, monkeypatch, length, lives):
    """And does again when it is started again."""
    for _ in range(lives):
        with pytest.raises(NonFiniteError, match=r"step 19, though the data of the steps 12 to 12 and 15 to 15"):
            run(tmp_path / "run", range(10, 10 + length), monkeypatch)
    assert train.Checkpoints(tmp_path / "run" / "checkpoints").steps()[-1] == 18
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state_of(tmp_path / "run").params))


def test_without_the_gate_a_burst_of_one_would_be_seen(tmp_path, monkeypatch):
    advance = step_lib._advance
    monkeypatch.setattr(
        step_lib, "_advance", lambda state, grads, finite, *rest: advance(state, grads, jnp.ones_like(finite), *rest)
    )
    with pytest.raises(AssertionError, match="parameters are not finite"):
        run(tmp_path / "run", [10], monkeypatch)
