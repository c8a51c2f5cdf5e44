"""Simulators in their own processes: a pool of evaluation slots, and a parallel map for demonstrations.

A worker is ``python -m wav.sim.worker`` at the other end of a socket pair. It imports no torch, never shares a CUDA
context, and ends with its parent (end of file on its socket, and PR_SET_PDEATHSIG should the parent be killed).
"""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from wav.errors import SimulationError
from wav.sim.env import Observation

if TYPE_CHECKING:
    from wav.config import DataSettings

log = logging.getLogger(__name__)

STALL_SECONDS = 300.0
"""A worker that has not answered for this long is taken for dead and replaced."""


@dataclass(frozen=True)
class SimReply:
    """Answer of a slot to one request."""

    observation: Observation | None
    """What the policy sees now; None on an error."""
    success: bool
    """Success of the task that was reset."""
    steps_done: int
    """Environment steps made by this request; 0 for a reset."""
    frames: list[dict[str, NDArray[np.uint8]]]
    """view -> (H, W, 3), the reset's or one per step; empty unless recording."""
    successes: dict[str, bool]
    """Every task of the scene: whether its predicate has held since the reset."""
    error: str | None = None


def worker_count(workers: int) -> int:
    """``workers``, or the machine's cores for 0."""
    return workers or os.cpu_count() or 1


class WorkerProcess:
    """One simulator process; requests are (kind, payload), answers come back in order."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        env = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "LP_NUM_THREADS": "1"}
        env.setdefault("PYTHONWARNINGS", "ignore")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "wav.sim.worker", str(theirs.fileno()), str(os.getpid())],
            env=env,
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
        )
        theirs.close()
        self.connection = Connection(ours.detach())

    def send(self, kind: str, payload: Any) -> None:
        """Queue a request; raises SimulationError if the process is gone."""
        try:
            self.connection.send((kind, payload))
        except OSError:
            raise SimulationError(self.epitaph()) from None

    def receive(self) -> Any:
        """Next answer; raises SimulationError if the process is gone."""
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            raise SimulationError(self.epitaph()) from None

    def epitaph(self) -> str:
        """Why the process is gone, in a sentence."""
        try:
            status: int | str = self.process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            status = "none: it still runs"
        return f"simulator process {self.process.pid} died (exit status {status}); its output above says why"

    def close(self) -> None:
        """End the process, by force after two seconds."""
        self.connection.close()
        try:
            self.process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class SimPool:
    """``slots`` simultaneously live episodes over ``workers`` simulator processes; a context manager.

    Non-obvious: a process that dies or stalls answers all its pending requests with ``error``, and is replaced at the
    next request; a fresh simulator gives the same episode, since an episode is a pure function of its reset.
    """

    def __init__(self, suite: str, data: DataSettings, workers: int = 0, slots: int = 8) -> None:
        self.suite, self.data, self.slots = suite, data, slots
        self.workers = min(worker_count(workers), slots)
        self._processes: list[WorkerProcess | None] = [None] * self.workers
        self._pending: list[deque[int]] = [deque() for _ in range(self.workers)]
        self._failed: list[tuple[int, SimReply]] = []

    def __enter__(self) -> SimPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit_reset(self, slot: int, task: str, init_index: int, record: bool = False) -> None:
        """Start an episode in ``slot``; the reply carries the first observation."""
        self._submit(slot, "reset", (slot, task, init_index, record))

    def submit_steps(self, slot: int, actions: NDArray[np.float32]) -> None:
        """Execute ``actions`` (k, 7) in ``slot``, stopping at success; the reply carries the last observation."""
        self._submit(slot, "steps", (slot, np.asarray(actions, dtype=np.float32)))

    def wait(self) -> list[tuple[int, SimReply]]:
        """Block until at least one request is answered; all (slot, reply) that are ready."""
        if self._failed:
            failed, self._failed = self._failed, []
            return failed
        busy = {p.connection: w for w, p in enumerate(self._processes) if p is not None and self._pending[w]}
        if not busy:
            raise SimulationError("SimPool.wait: nothing was submitted; submit a reset or steps first")
        ready = wait(list(busy), timeout=STALL_SECONDS)
        if not ready:
            for worker in busy.values():
                self._bury(worker, f"no answer for {STALL_SECONDS:.0f} s")
            return self.wait()
        replies: list[tuple[int, SimReply]] = []
        for connection in ready:
            worker = busy[connection]  # type: ignore[index]
            process = self._processes[worker]
            assert process is not None
            try:
                reply = process.receive()
            except SimulationError as error:
                self._bury(worker, str(error))
                continue
            slot = self._pending[worker].popleft()
            replies.append((slot, reply if isinstance(reply, SimReply) else _error_reply(str(reply))))
        return replies or self.wait()

    def close(self) -> None:
        """End all processes."""
        for process in self._processes:
            if process is not None:
                process.close()
        self._processes = [None] * self.workers

    def _submit(self, slot: int, kind: str, payload: Any) -> None:
        if not 0 <= slot < self.slots:
            raise SimulationError(f"slot {slot}: the pool has slots 0 to {self.slots - 1}")
        worker = slot % self.workers
        process = self._processes[worker]
        if process is None:
            process = self._processes[worker] = WorkerProcess()
            process.send("open", (self.suite, self.data))
        self._pending[worker].append(slot)
        try:
            process.send(kind, payload)
        except SimulationError as error:
            self._bury(worker, str(error))

    def _bury(self, worker: int, why: str) -> None:
        process = self._processes[worker]
        if process is not None:
            log.warning("simulator process %d: %s", process.process.pid, why)
            process.process.kill()
            process.close()
        self._processes[worker] = None
        self._failed += [(slot, _error_reply(why)) for slot in self._pending[worker]]
        self._pending[worker].clear()


def _error_reply(why: str) -> SimReply:
    return SimReply(None, False, 0, [], {}, why)


def map_in_processes(
    function: Callable[..., Any], jobs: Sequence[tuple[Any, ...]], workers: int = 0
) -> Iterator[tuple[int, Any]]:
    """Run ``function(*job)`` for every job in simulator processes.

    Args:
        function: importable at top level.
        jobs: argument tuples.
        workers: processes; 0: the machine's cores.

    Yields:
        (index of the job, result, or the exception it ended with) as they finish, in no particular order.
    """
    todo = deque(enumerate(jobs))
    live: dict[Connection, tuple[WorkerProcess, int]] = {}
    try:
        for _ in range(min(worker_count(workers), len(jobs))):
            _start(WorkerProcess(), function, todo, live)
        while live:
            for connection in wait(list(live)):
                process, index = live.pop(connection)  # type: ignore[call-overload]
                try:
                    result: Any = process.receive()
                except SimulationError as error:
                    process.close()
                    process, result = WorkerProcess(), error
                _start(process, function, todo, live)
                yield index, result
    finally:
        for process, _ in live.values():
            process.process.kill()
            process.close()


def _start(
    process: WorkerProcess,
    function: Callable[..., Any],
    todo: deque[tuple[int, tuple[Any, ...]]],
    live: dict[Connection, tuple[WorkerProcess, int]],
) -> None:
    """Give ``process`` the next job, or end it."""
    if not todo:
        process.close()
        return
    index, job = todo.popleft()
    process.send("call", (function, job))
    live[process.connection] = (process, index)
