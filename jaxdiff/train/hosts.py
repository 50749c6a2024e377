"""Several processes that train one model: how they find each other, agree, and notice that one of them is gone.

    start    joins them by jax.distributed: SLURM, GKE, Cloud TPU and Open MPI say by themselves who is who
    first    process 0 acts, and all learn the outcome
    Watch    every process says once a second that it lives and how far it is, and reads what the others say

A process is dead when it has said nothing for `dead_after` seconds, slow when it is behind and has not moved for
`slow_after`, and gone when it said why it ends. The others cannot go on, and wait inside a collective that no exception
leaves: so a thread ends them, with one line that names the process, and the status LOST. Time is counted while the
thread runs, so that a machine that was suspended blames nobody. All of it goes through the key-value store of
jax.distributed, which lives in process 0; nothing here waits for a device.
"""

import collections
import ctypes
import dataclasses
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import jax

from jaxdiff.errors import ConfigError, DataError, HostError

T = TypeVar("T")
LOST = 75  # the exit status that sysexits.h calls EX_TEMPFAIL: start all processes again
_ROOM = "jaxdiff/"
_calls: collections.Counter[str] = collections.Counter()
_abort: Any = None  # the handler that C holds must not be collected


def start(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout: int = 300,
) -> None:
    """Joins the processes of a run, before anything touches a device. Without arguments the cluster says who is who.

    `coordinator` is host:port of process 0. Waits up to `timeout` seconds for the others.
    Raises ConfigError where no cluster is found, or only some of the arguments are given; HostError where the others
    do not come.
    """
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if 0 < len(missing) < 3:
        raise ConfigError(f"{' and '.join(missing)} missing: give coordinator, num_processes and process_id, or none.")
    _check_numbers(num_processes, process_id)
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM away from whoever trains
    late = (
        f"the processes of this run did not all come within {timeout} s, or {coordinator or 'process 0'} is not there"
    )
    _on_abort(lambda: _lost(late))
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            cluster_detection_method=None if missing else "deactivate",
            initialization_timeout=timeout,
            heartbeat_timeout_seconds=600,  # so that the watch, which names the process, comes first
            shutdown_timeout_seconds=60,
        )
    except ValueError as error:
        raise ConfigError(
            f"no cluster was found ({error}). SLURM, GKE, Cloud TPU and Open MPI are detected; elsewhere give all "
            "processes the same coordinator=HOST:PORT and num_processes, and each its own process_id from 0."
        ) from error
    except RuntimeError as error:
        raise HostError(f"{late}: {str(error).splitlines()[0]}") from error
    finally:
        _on_abort(None)


def _check_numbers(num_processes: int | None, process_id: int | None) -> None:
    if num_processes is not None and process_id is not None and not 0 <= process_id < num_processes:
        raise ConfigError(
            f"process_id must be from 0 to num_processes - 1 = {num_processes - 1}, got {process_id}. Number the "
            "processes from 0."
        )


def started() -> bool:
    """Whether this process is one of several."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def leave(status: int) -> NoReturn:
    """`sys.exit` after a failure; one of several processes goes at once, since JAX would wait for the others."""
    if started():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def first(name: str, act: Callable[[], T], *, timeout: float = 3600.0) -> T:
    """`act()` in process 0, and its outcome, which JSON must be able to hold, in all. Alone, it is `act()`.

    All processes call it, those of one `name` in the same order. Raises HostError in the others where `act` fails in
    process 0, or takes more than `timeout` seconds.
    """
    if not started():
        return act()
    _calls[name] += 1
    key = f"{_ROOM}first/{name}/{_calls[name]}"
    if jax.process_index() > 0:
        outcome = json.loads(_wait_for(key, timeout))
        if "error" in outcome:
            raise HostError(f"process 0 failed: {outcome['error']}")
        return outcome["value"]
    try:
        value = act()
    except (OSError, RuntimeError, ValueError) as error:
        _store().key_value_set(key, json.dumps({"error": str(error)}))
        raise
    _store().key_value_set(key, json.dumps({"value": value}))
    return value


def meet(name: str, *, timeout: float = 600.0) -> None:
    """Returns when all processes are here. Raises HostError where one does not come within `timeout` seconds."""
    if not started():
        return
    _calls[name] += 1
    try:
        _store().wait_at_barrier(f"{_ROOM}meet/{name}/{_calls[name]}", int(1000 * timeout))
    except jax.errors.JaxRuntimeError as error:
        raise HostError(f"not all processes came to {name!r} within {timeout:.0f} s.") from error


def same(what: str, value: dict[str, Any]) -> None:
    """Raises ConfigError where `value`, flat and of JSON, is not that of process 0."""
    here, there = json.loads(json.dumps([value, first(what, lambda: value)]))
    changed = [key for key in sorted(here | there) if here.get(key) != there.get(key)]
    if changed:
        lines = "".join(f"\n  {key}: {here.get(key)!r} here, {there.get(key)!r} there" for key in changed[:8])
        raise ConfigError(
            f"process {jax.process_index()} has another {what} than process 0:{lines}\n"
            "Start all processes with the same command, on the same files."
        )


def _store() -> Any:
    from jax._src import distributed  # the store has no public name

    return distributed.global_state.client


def _wait_for(key: str, timeout: float) -> str:
    try:
        return _store().blocking_key_value_get(key, int(1000 * timeout))
    except jax.errors.JaxRuntimeError as error:
        raise HostError(f"process 0 has not done {key} within {timeout:.0f} s. Look at its last words.") from error


@dataclasses.dataclass
class _Peer:
    """What another process said last, and how long ago that was news."""

    beat: str = ""
    moves: int = 0
    silent: float = 0.0
    still: float = 0.0

    def hear(self, beat: str, moves: int, passed: float) -> None:
        self.silent = 0.0 if beat != self.beat else self.silent + passed
        self.still = 0.0 if moves != self.moves else self.still + passed
        self.beat, self.moves = beat, moves


class Watch:
    """Watches over the processes of a run while it is entered; alone it does nothing.

    Ends this process, with the status LOST, when another is dead, slow or gone. An error that leaves it is told to the
    others; it is held back for a moment first, since it may be the echo of a death that has not been noticed yet.
    """

    def __init__(self, *, dead_after: float = 30.0, slow_after: float = 600.0):
        self._many = started()
        self._dead_after, self._slow_after, self._every = dead_after, slow_after, min(1.0, dead_after / 30)
        self._peers = {i: _Peer() for i in range(jax.process_count()) if i != jax.process_index()}
        self._lock = threading.Lock()
        self._moves, self._moved = 0, time.monotonic()
        self._asked, self._stop = False, (sys.maxsize, 0)
        self._unanswered = 0.0
        self._over = threading.Event()

    def agree(self, number: int | None) -> int | None:
        """The signal for which all processes stop now, or None: call it once a step, with the signal taken here.

        All return it at the same call, the second or third after the first of them took a signal and a second passed.
        It costs no word on the wire.
        """
        if not self._many:
            return number
        if number is not None and not self._asked:
            self._asked = True
            self._set("ask", str(number))
        with self._lock:  # held by `_settle` until it is known where to stop
            self._moves, self._moved = self._moves + 1, time.monotonic()
            return self._stop[1] if self._moves >= self._stop[0] else None

    def __enter__(self) -> "Watch":
        if self._many:
            if jax.process_index() > 0:
                _on_abort(_name_a_lost_coordinator)
            for act in (self._beat, self._judge):
                threading.Thread(target=act, daemon=True, name="hosts").start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if not self._many:
            return
        if error is None:
            meet("the end", timeout=self._slow_after)
        else:
            if not isinstance(error, ConfigError | DataError | KeyboardInterrupt):
                self._dead_after = min(self._dead_after, 5.0)
                time.sleep(self._dead_after + 3 * self._every)
            self._over.set()
            self._tell(f"{type(error).__name__}: {error}")
        self._over.set()

    def _set(self, kind: str, value: str) -> None:
        _store().key_value_set(f"{_ROOM}{kind}/{jax.process_index()}", value, allow_overwrite=True)

    def _all(self, kind: str) -> dict[int, str]:
        return {int(key.rpartition("/")[2]): value for key, value in _store().key_value_dir_get(f"{_ROOM}{kind}/")}

    def _tell(self, why: str) -> None:
        """Let the others know why this process ends, and time to read it: the store ends with process 0."""
        if self._unanswered < 3 * self._every:
            self._set("gone", why)
            if jax.process_index() == 0:
                time.sleep(3 * self._every)

    def _beat(self) -> None:
        """The thread that speaks to the store; where that does not answer, it may wait for minutes."""
        count, before = 0, time.monotonic()
        while not self._over.wait(self._every):
            count, now = count + 1, time.monotonic()
            try:
                self._set("beat", f"{count} {self._moves}")
                beats, asked = self._all("beat"), self._all("ask")
                for i, peer in self._peers.items():
                    beat, _, moves = beats.get(i, " 0").partition(" ")
                    peer.hear(beat, int(moves), min(now - before, 2 * self._every))
                self._hear_gone(self._all("gone"))
                if asked and self._stop[0] == sys.maxsize:
                    self._settle(asked)
            except jax.errors.JaxRuntimeError:
                continue  # `_judge` counts how long there was no answer
            before, self._unanswered = now, 0.0

    def _hear_gone(self, gone: dict[int, str]) -> None:
        for i in sorted(set(gone) & set(self._peers)):
            self._end(f"process {i} of {jax.process_count()} has ended: {gone[i]}")

    def _settle(self, asked: dict[int, str]) -> None:
        """Agree where to stop: after the call of `agree` that follows the furthest made by any process."""
        with self._lock:
            self._set("at", f"{self._moves} {asked[min(asked)]}")
            places = self._all("at")
            while len(places) < jax.process_count() and not self._over.wait(self._every / 10):
                places = self._all("at")
            furthest = max(int(place.split()[0]) for place in places.values())
            self._stop = furthest + 1, int(places[min(places)].split()[1])

    def _judge(self) -> None:
        """The thread that ends this process; it never waits for anything."""
        before = time.monotonic()
        while not self._over.wait(self._every):
            now = time.monotonic()
            self._unanswered += min(now - before, 2 * self._every)
            before = now
            self._look()

    def _look(self) -> None:
        count = jax.process_count()
        if self._unanswered > self._dead_after and jax.process_index() > 0:
            self._end(f"process 0 of {count} has not answered for {self._unanswered:.0f} s")
        for i, peer in self._peers.items():
            if peer.silent > self._dead_after:
                self._end(f"process {i} of {count} is dead: no sign of life for {peer.silent:.0f} s")
            waited = time.monotonic() - self._moved
            if peer.moves < self._moves and min(peer.still, waited) > self._slow_after:
                self._end(
                    f"process {i} of {count} is too slow: it has not moved for {peer.still:.0f} s, at call "
                    f"{peer.moves}, and this one waits at call {self._moves}"
                )

    def _end(self, why: str) -> NoReturn:
        self._over.set()
        try:
            _say(f"{why.rstrip('.')}. This process ({jax.process_index()}) ends too, with status {LOST}")
            self._tell(why)
        finally:
            os._exit(LOST)


def _say(why: str) -> None:
    hint = "Start all again with the same command: the run resumes from its newest checkpoint."
    print(f"error: {HostError.__name__}: {why}. {hint}", file=sys.stderr, flush=True)


def _lost(why: str) -> NoReturn:
    _say(why)
    os._exit(LOST)


def _on_abort(act: Callable[[], None] | None) -> None:
    """Call `act` before this process aborts: where process 0 cannot be reached, JAX does that from its own threads."""
    global _abort
    _abort = None if act is None else ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda _: act())
    ctypes.CDLL(None).signal(signal.SIGABRT, _abort)  # no handler is the default one


def _name_a_lost_coordinator() -> None:
    if _coordinator_is_gone():
        _lost("process 0, through which all speak, is gone")
    ctypes.CDLL(None).signal(signal.SIGABRT, None)  # another cause: as without us


def _coordinator_is_gone() -> bool:
    from jax._src import distributed

    host, _, port = str(distributed.global_state.coordinator_address).rpartition(":")
    for _ in range(10):
        try:
            socket.create_connection((host, int(port)), timeout=1).close()
        except OSError:
            return True
        time.sleep(0.2)
    return False
