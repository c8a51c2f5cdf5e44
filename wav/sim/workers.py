"""Simulators in their own processes: a pool of evaluation slots, and a parallel map for demonstrations.

A worker is ``python -m wav.sim.worker`` at the other end of a socket pair. It imports no torch, never shares a CUDA
context, and ends with its parent (end of file on its socket, and PR_SET_PDEATHSIG should the parent be killed).
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from wav.errors import SimulationError
from wav.sim.env import Observation
from wav.sim.process import WorkerProcess
from wav.sim.rendering import choose_backend, describe_renderer

if TYPE_CHECKING:
    from wav.config import DataSettings

log = logging.getLogger(__name__)

STALL_SECONDS = 300.0
"""A process that has not answered a request for this long is taken for dead and replaced."""

JOB_SECONDS = 3600.0
"""The same for one job of :func:`map_in_processes`."""
JOB_ATTEMPTS = 3
"""Processes that a job of :func:`map_in_processes` may outlive."""


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
    lost: bool = False
    """The error came with another episode's request to the same process: this episode is not to blame."""
    busy_seconds: float = 0.0
    """What the request took in the simulator's process."""
    render_seconds: float = 0.0
    """The share of it spent on observations: drawing, reading pixels and state."""


def worker_count(workers: int) -> int:
    """``workers``, or the machine's cores for 0."""
    return workers or os.cpu_count() or 1


class SimPool:
    """``slots`` simultaneously live episodes over ``workers`` simulator processes; a context manager.

    Non-obvious: a process that dies, or does not answer a request within ``stall_seconds``, is killed; its pending
    requests are answered with ``error`` and it is replaced at the next request. The request it was at is to blame, the
    others are ``lost``. A fresh simulator gives the same episode, since an episode is a pure function of its reset.

    Raises:
        ServiceError: nothing renders on this machine.
    """

    def __init__(
        self, suite: str, data: DataSettings, workers: int = 0, slots: int = 8, stall_seconds: float = STALL_SECONDS
    ) -> None:
        choose_backend()  # once, for all processes
        self.suite, self.data, self.slots, self.stall_seconds = suite, data, slots, stall_seconds
        self.workers = min(worker_count(workers), slots)
        self._processes: list[WorkerProcess | None] = [None] * self.workers
        self._pending: list[deque[int]] = [deque() for _ in range(self.workers)]
        self._since = [0.0] * self.workers  # when the request a process is at was given to it
        self._hosted: set[int] = set()  # slots whose episode lives in a process
        self._failed: list[tuple[int, SimReply]] = []

    def __enter__(self) -> SimPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit_reset(self, slot: int, task: str, init_index: int, record: bool = False) -> None:
        """Start an episode in ``slot``; the reply carries the first observation."""
        self._hosted.add(slot)
        self._submit(slot, "reset", (slot, task, init_index, record))

    def submit_steps(self, slot: int, actions: NDArray[np.float32]) -> None:
        """Execute ``actions`` (k, 7) in ``slot``, stopping at success; the reply carries the last observation."""
        if slot not in self._hosted:
            self._failed.append((slot, _error_reply("its episode was lost with the process that hosted it", lost=True)))
            return
        self._submit(slot, "steps", (slot, np.asarray(actions, dtype=np.float32)))

    def wait(self, timeout: float | None = None) -> list[tuple[int, SimReply]]:
        """Block until at least one request is answered; all (slot, reply) that are ready.

        Args:
            timeout: seconds after which to return with nothing; None: wait as long as it takes.
        """
        until = math.inf if timeout is None else time.monotonic() + timeout
        while True:
            if self._failed:
                failed, self._failed = self._failed, []
                return failed
            busy = [w for w in range(self.workers) if self._pending[w]]
            if not busy:
                raise SimulationError("SimPool.wait: nothing was submitted; submit a reset or steps first")
            deadline = min(until, *(self._since[w] + self.stall_seconds for w in busy))
            connections = {self._process(w).connection: w for w in busy}
            ready = wait(list(connections), timeout=max(0.0, deadline - time.monotonic()))
            replies = [reply for c in ready for reply in self._receive(connections[c])]  # type: ignore[index]
            if replies:
                return replies
            now = time.monotonic()
            for worker in busy:
                if self._pending[worker] and now >= self._since[worker] + self.stall_seconds:
                    where = f"its output is in {self._process(worker).log}"
                    self._bury(worker, f"simulator process gave no answer for {self.stall_seconds:g} s; {where}")
            if not self._failed and now >= until:
                return []

    def renderer(self) -> dict[str, str]:
        """What the pictures are drawn with (:func:`wav.sim.rendering.describe_renderer`); call it between episodes.

        Raises:
            SimulationError: the process cannot say, or requests are pending.
        """
        if self._pending[0]:
            raise SimulationError("SimPool.renderer: requests are pending; ask before the first or after the last")
        process = self._process(0)
        process.send("call", (describe_renderer, ()))
        answer = process.receive() if process.connection.poll(self.stall_seconds) else "no answer"
        if not isinstance(answer, dict):
            process.failed = True
            raise SimulationError(f"renderer: {answer}; the simulator's output is in {process.log}")
        return answer

    @property
    def pids(self) -> list[int]:
        """Of the processes that are running."""
        return [process.process.pid for process in self._processes if process is not None]

    def close(self) -> None:
        """End all processes."""
        for process in self._processes:
            if process is not None:
                process.close()
        self._processes = [None] * self.workers

    def _process(self, worker: int) -> WorkerProcess:
        """The live process of ``worker``, started if need be."""
        process = self._processes[worker]
        if process is None:
            process = self._processes[worker] = WorkerProcess(worker)
            process.send("open", (self.suite, self.data))
        return process

    def _submit(self, slot: int, kind: str, payload: Any) -> None:
        if not 0 <= slot < self.slots:
            raise SimulationError(f"slot {slot}: the pool has slots 0 to {self.slots - 1}")
        worker = slot % self.workers
        if not self._pending[worker]:
            self._since[worker] = time.monotonic()
        self._pending[worker].append(slot)
        try:
            self._process(worker).send(kind, payload)
        except SimulationError as error:
            self._bury(worker, str(error))

    def _receive(self, worker: int) -> list[tuple[int, SimReply]]:
        """One answer of a process; none if it died."""
        process = self._process(worker)
        try:
            reply = process.receive()
        except SimulationError as error:
            self._bury(worker, str(error))
            return []
        slot, self._since[worker] = self._pending[worker].popleft(), time.monotonic()
        if isinstance(reply, SimReply):
            return [(slot, reply)]
        process.failed = True
        return [(slot, _error_reply(f"{reply}; its output is in {process.log}"))]

    def _bury(self, worker: int, why: str) -> None:
        """End a process that died or stalls and answer what it owes."""
        process = self._processes[worker]
        if process is not None:
            log.warning("simulator process %d is replaced: %s", process.process.pid, why)
            process.kill()
        self._processes[worker] = None
        self._hosted -= set(range(worker, self.slots, self.workers))
        for place, slot in enumerate(self._pending[worker]):
            self._failed.append((slot, _error_reply(why, lost=place > 0)))
        self._pending[worker].clear()


def _error_reply(why: str, lost: bool = False) -> SimReply:
    return SimReply(None, False, 0, [], {}, why, lost)


def map_in_processes(
    function: Callable[..., Any], jobs: Sequence[tuple[Any, ...]], workers: int = 0, job_seconds: float = JOB_SECONDS
) -> Iterator[tuple[int, Any]]:
    """Run ``function(*job)`` for every job in simulator processes.

    A job whose process dies or stalls is run again in a fresh one, :data:`JOB_ATTEMPTS` times in all: a killed
    simulator must not cost a demonstration that another machine would have recorded.

    Args:
        function: importable at top level.
        jobs: argument tuples.
        workers: processes; 0: the machine's cores.
        job_seconds: a job that takes longer is taken for stalled and its process replaced.

    Yields:
        (index of the job, result, or the exception it ended with) as they finish, in no particular order.
    """
    todo = deque(_Job(index, arguments) for index, arguments in enumerate(jobs))
    live: dict[Connection, _Running] = {}
    try:
        for number in range(min(worker_count(workers), len(jobs))):
            _start(WorkerProcess(number), number, function, todo, live)
        while live:
            first = min(running.started for running in live.values()) + job_seconds
            ready = wait(list(live), timeout=max(0.0, first - time.monotonic()))
            now = time.monotonic()
            late = [c for c, running in live.items() if c not in ready and now >= running.started + job_seconds]
            for connection in [*ready, *late]:
                running = live.pop(connection)  # type: ignore[call-overload]
                process, job, result = running.process, running.job, _answer(running, connection in late, job_seconds)
                if isinstance(result, SimulationError):
                    process = WorkerProcess(running.number)
                    if job.attempt < JOB_ATTEMPTS:
                        log.warning("%s; its job is run again", result)
                        todo.appendleft(replace(job, attempt=job.attempt + 1))
                        _start(process, running.number, function, todo, live)
                        continue
                _start(process, running.number, function, todo, live)
                yield job.index, result
    finally:
        for running in live.values():
            running.process.process.kill()
            running.process.close()


@dataclass(frozen=True)
class _Job:
    """One call of :func:`map_in_processes`."""

    index: int
    arguments: tuple[Any, ...]
    attempt: int = 1


@dataclass(frozen=True)
class _Running:
    """What a process is at."""

    process: WorkerProcess
    number: int
    job: _Job
    started: float


def _answer(running: _Running, late: bool, limit: float) -> Any:
    """A job's result or exception; a SimulationError where its process is gone."""
    if late:
        running.process.kill()
        return SimulationError(f"no answer within {limit:g} s; the simulator's output is in {running.process.log}")
    try:
        return running.process.receive()
    except SimulationError as error:
        running.process.close()
        return error


def _start(
    process: WorkerProcess,
    number: int,
    function: Callable[..., Any],
    todo: deque[_Job],
    live: dict[Connection, _Running],
) -> None:
    """Give ``process`` the next job, or end it; one that is killed just now is noticed when it is waited for."""
    if not todo:
        process.close()
        return
    job = todo.popleft()
    with contextlib.suppress(SimulationError):
        process.send("call", (function, job.arguments))
    live[process.connection] = _Running(process, number, job, time.monotonic())
