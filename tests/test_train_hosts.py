"""Several processes: what one of them decides from what the others say, and two real ones, stopped, killed, resumed."""

import json
import signal
import subprocess
import sys
import types

import jax
import numpy as np
import pytest

from experiments import train as job
from jaxdiff import data
from jaxdiff.errors import ConfigError, HostError
from jaxdiff.train import hosts
from jaxdiff.train import mesh as mesh_lib
from tests.oracles.hosts import TOY, Pair, free_port


class Store(dict):
    """The key-value store of jax.distributed, as far as `hosts` uses it."""

    def key_value_set(self, key, value, allow_overwrite=False):
        assert allow_overwrite or key not in self
        self[key] = value

    def key_value_dir_get(self, prefix):
        return [(key, value) for key, value in self.items() if key.startswith(prefix)]

    def blocking_key_value_get(self, key, milliseconds):
        if key not in self:
            raise jax.errors.JaxRuntimeError(f"DEADLINE_EXCEEDED after {milliseconds} ms")
        return self[key]


class Ended(Exception):
    pass


@pytest.fixture
def become(monkeypatch):
    """Make this process number `i` of three."""
    store = Store()

    def act(i):
        monkeypatch.setattr(hosts.jax, "process_index", lambda: i)
        return store

    def end(self, why):
        raise Ended(why)

    monkeypatch.setattr(hosts, "_store", lambda: store)
    monkeypatch.setattr(hosts, "started", lambda: True)
    monkeypatch.setattr(hosts.jax, "process_count", lambda: 3)
    monkeypatch.setattr(hosts.Watch, "_end", end)
    hosts._calls.clear()
    return act


def test_alone_nothing_is_watched_and_everything_is_done_here():
    with hosts.Watch() as watch:
        assert [watch.agree(None), watch.agree(signal.SIGTERM)] == [None, signal.SIGTERM]
    assert hosts.first("x", lambda: (1, 2)) == (1, 2)
    hosts.meet("x")
    hosts.same("config", {"a": (1, 2)})
    with pytest.raises(SystemExit) as end:
        hosts.leave(3)
    assert end.value.code == 3


def test_the_outcome_of_process_0_is_that_of_all(become):
    become(0)
    assert hosts.first("look", lambda: [4, "x"]) == [4, "x"]
    with pytest.raises(OSError, match="full"):
        hosts.first("look", lambda: (_ for _ in ()).throw(OSError("the disk is full")))
    hosts._calls.clear()
    become(1)
    assert hosts.first("look", lambda: pytest.fail("not here")) == [4, "x"]
    with pytest.raises(HostError, match="process 0 failed: the disk is full"):
        hosts.first("look", lambda: pytest.fail("not here"))
    with pytest.raises(HostError, match="within 7 s"):
        hosts.first("look", lambda: pytest.fail("not here"), timeout=7)


def test_processes_with_other_settings_are_refused(become):
    become(0)
    hosts.same("config", {"a": 1, "b": (1, 2)})
    hosts._calls.clear()
    become(2)
    with pytest.raises(ConfigError, match="process 2 has another config than process 0:\n  a: 5 here, 1 there"):
        hosts.same("config", {"a": 5, "b": [1, 2]})


def quiet_for(watch, i, seconds):
    watch._peers[i].silent = seconds


def test_a_dead_process_is_named(become):
    become(0)
    watch = hosts.Watch(dead_after=30)
    quiet_for(watch, 2, 29)
    watch._look()
    quiet_for(watch, 2, 31)
    with pytest.raises(Ended, match="process 2 of 3 is dead: no sign of life for 31 s"):
        watch._look()


def test_silence_counts_from_the_last_news():
    peer = hosts._Peer()
    for beat, passed in (("1", 1.0), ("1", 1.0), ("1", 1.0), ("2", 1.0), ("2", 1.0)):
        peer.hear(beat, 7, passed)
    assert (peer.silent, peer.still, peer.moves) == (1.0, 4.0, 7)


def test_a_slow_process_is_named_only_by_one_that_waits_for_it(become, monkeypatch):
    become(0)
    watch = hosts.Watch(slow_after=600)
    for _ in range(5):
        watch.agree(None)
    now = watch._moved
    for peer in watch._peers.values():
        peer.moves, peer.still = 5, 1000.0
    monkeypatch.setattr(hosts, "time", types.SimpleNamespace(monotonic=lambda: now + 700))
    watch._look()  # all are as far as this one: they wait together
    watch._peers[1].moves = 3
    watch._peers[1].still = 500.0
    watch._look()
    watch._peers[1].still = 601.0
    with pytest.raises(Ended, match="process 1 of 3 is too slow: it has not moved for 601 s, at call 3, and this"):
        watch._look()
    monkeypatch.setattr(hosts, "time", types.SimpleNamespace(monotonic=lambda: now + 10))
    watch._look()  # this one has moved just now


def test_a_store_that_does_not_answer_is_process_0(become):
    become(1)
    watch = hosts.Watch(dead_after=30)
    watch._unanswered = 31.0
    with pytest.raises(Ended, match="process 0 of 3 has not answered for 31 s"):
        watch._look()


def test_why_a_process_ended_is_passed_on(become):
    store = become(2)
    hosts.Watch()._tell("DataError: no pictures")
    assert store["jaxdiff/gone/2"] == "DataError: no pictures"
    become(0)
    watch = hosts.Watch()
    with pytest.raises(Ended, match="process 2 of 3 has ended: DataError: no pictures"):
        watch._hear_gone(watch._all("gone"))


def test_all_stop_after_the_furthest_call_whoever_took_the_signal(become):
    store = become(0)
    watch = hosts.Watch()
    for _ in range(4):
        assert watch.agree(None) is None
    store["jaxdiff/ask/1"] = str(int(signal.SIGTERM))
    store |= {"jaxdiff/at/1": "5 15", "jaxdiff/at/2": "6 15"}
    watch._settle(watch._all("ask"))
    assert store["jaxdiff/at/0"] == "4 15"
    assert [watch.agree(None) for _ in range(3)] == [None, None, 15]  # calls 5, 6 and 7


def test_a_signal_taken_here_is_asked_for_once(become):
    store = become(1)
    watch = hosts.Watch()
    assert [watch.agree(signal.SIGINT), watch.agree(signal.SIGINT)] == [None, None]
    assert store["jaxdiff/ask/1"] == str(int(signal.SIGINT))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("h:1", 2, None), "process_id missing"),
        ((None, 2, 0), "coordinator missing"),
        (("h:1", 2, 2), "process_id must be from 0 to num_processes - 1 = 1, got 2"),
        (("h:1", 2, -1), "got -1"),
    ],
)
def test_incomplete_arguments_are_refused_before_anything_starts(given, message):
    with pytest.raises(ConfigError, match=message):
        hosts.start(*given)
    assert not hosts.started()


def test_who_waits_in_vain_for_the_others_ends_with_a_name():
    code = f"from jaxdiff.train import hosts; hosts.start('127.0.0.1:{free_port()}', 2, 0, timeout=1)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert ended.returncode == hosts.LOST
    assert "error: HostError: the processes of this run did not all come within 1 s" in ended.stderr


def test_without_a_cluster_the_answer_says_what_to_give(monkeypatch):
    def initialize(*args, **kwargs):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(hosts.jax.distributed, "initialize", initialize)
    with pytest.raises(ConfigError, match=r"no cluster was found .*SLURM, GKE, Cloud TPU"):
        hosts.start()


def test_a_batch_that_every_process_holds_is_laid_on_the_devices():
    batch = {"x": np.arange(32.0, dtype=np.float32).reshape(1, 16, 2)}
    for sizes in ((8, 1, 1), (2, 2, 2)):
        sharding = mesh_lib.batch_sharding(mesh_lib.make(*sizes), leading=1)
        placed = mesh_lib.place(batch, sharding)["x"]
        assert placed.sharding == sharding
        np.testing.assert_array_equal(placed, batch["x"])


@pytest.mark.parametrize("pieces", [[(4, 6), (6, 8)], [(0, 4), (8, 12)]])
def test_the_rows_of_a_process_are_those_of_its_devices(pieces, monkeypatch):
    mesh = mesh_lib.make(8)
    assert mesh_lib.own_rows(mesh, 16) == slice(0, 16)
    shares = {i: (slice(*piece),) for i, piece in enumerate(pieces)}
    there = types.SimpleNamespace(addressable_devices_indices_map=lambda shape: shares)
    monkeypatch.setattr(mesh_lib, "batch_sharding", lambda mesh: there)
    if pieces[0][1] == pieces[1][0]:
        assert mesh_lib.own_rows(mesh, 16) == slice(4, 8)
    else:
        with pytest.raises(ConfigError, match=r"the rows \[\(0, 4\), \(8, 12\)\] of a batch.*mesh\.tensor"):
            mesh_lib.own_rows(mesh, 16)


def test_only_the_rows_of_a_process_are_read_and_together_they_are_the_batch():
    pytest.importorskip("grain", reason="streaming needs Grain: pip install 'jaxdiff[grain]'")

    class Source:
        def __init__(self):
            self.read = set()  # of this stream alone: the threads of a closed one may still read a record

        def __len__(self):
            return 9999

        def __getitem__(self, index):
            self.read.add(index)
            return np.full(2, index, np.float32)

    def first(source, rows):
        stream = data.stream(source, seed=3, batch_size=8, ahead=1, threads=1, rows=rows)
        batch = next(stream)
        stream.close()
        return batch

    whole = data.order(3, 0, batch_size=8, num_examples=9999)
    orders = data.orders(3, 0, 20, batch_size=8, num_examples=9999)
    sources, shares = (Source(), Source()), (slice(0, 4), slice(4, 8))
    parts = [first(source, rows) for source, rows in zip(sources, shares, strict=True)]
    np.testing.assert_array_equal(np.concatenate([part[0] for part in parts]), whole)
    np.testing.assert_array_equal(np.concatenate([part[1] for part in parts])[:, 0], whole)
    for source, rows in zip(sources, shares, strict=True):
        assert source.read <= set(orders[:, rows].ravel().tolist())
    placed = mesh_lib.assemble(mesh_lib.make(4, 2), {"x": whole[None]}, 8)["x"]
    np.testing.assert_array_equal(placed, whole[None])
    assert placed.sharding.is_equivalent_to(mesh_lib.batch_sharding(mesh_lib.make(4, 2), leading=1), 2)


def lines(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_notice_a_death_and_resume(tmp_path):
    """One run in two lives; signals and the comparison to the bit: python -m tests.oracles.hosts."""
    first = Pair(tmp_path / "run", "--config.train.steps=100000")
    first.start()
    first.wait_for(20)
    first.processes[0].kill()
    assert first.saved() >= 20, first.said(0) + first.said(1)
    assert first.end(60) == [-signal.SIGKILL, hosts.LOST], first.said(1)
    assert "error: HostError: process 0" in first.said(1)
    steps = first.saved() + 20
    last = Pair(tmp_path / "run", f"--config.train.steps={steps}")
    last.start(slurm=True)
    assert last.end() == [0, 0], last.said(0) + last.said(1)
    assert f"resuming from step {steps - 20}" in last.said(0)
    assert "done" not in last.said(1)  # process 0 alone speaks
    assert job.run([*TOY, f"--config.train.steps={steps}", f"--workdir={tmp_path / 'alone'}"]) == 0
    ours, alone = lines(tmp_path / "run"), lines(tmp_path / "alone")
    assert [line["step"] for line in ours] == [line["step"] for line in alone] == list(range(5, steps + 1, 5))
    for a, b in zip(ours, alone, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
