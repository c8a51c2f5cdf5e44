"""Simulators in their own processes: a pool of evaluation slots, and a parallel map for demonstrations.

A worker is ``python -m wav.sim.worker`` at the other end of a socket pair. It imports no torch, never shares a CUDA
context, and ends with its parent (end of file on its socket, and PR_SET_PDEATHSIG should the parent be killed). Each
has a thread here that asks it and waits, so that one that dies or hangs holds up nobody else.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from wav.errors import SimulationError
from wav.sim.env import SimReply
from wav.sim.process import WorkerProcess
from wav.sim.rendering import choose_backend, describe_renderer

if TYPE_CHECKING:
    from wav.config import DataSettings

log = logging.getLogger(__name__)

STALL_SECONDS = 300.0  #: A process that has not answered a request for this long is taken for dead and replaced.

JOB_SECONDS = 3600.0  #: The same for one job of :func:`map_in_processes`.
JOB_ATTEMPTS = 3  #: Processes that a job of :func:`map_in_processes` may cost.


def worker_count(workers: int) -> int:
    """``workers``, or the machine's cores for 0."""
    return workers or os.cpu_count() or 1


class SimPool:
    """``slots`` simultaneously live episodes over ``workers`` simulator processes; a context manager.

    Non-obvious: a process that dies, or does not answer a request within ``stall_seconds``, is killed and replaced at
    the next reset. The request it was at is answered with ``error``; those for the other episodes it hosted are
    ``lost``. A fresh simulator gives the same episode, since an episode is a pure function of its reset.

    Raises:
        ServiceError: nothing renders on this machine.
    """

    def __init__(
        self, suite: str, data: DataSettings, workers: int = 0, slots: int = 8, stall_seconds: float = STALL_SECONDS
    ) -> None:
        choose_backend()  # once, for all processes
        self.suite, self.data, self.slots, self.stall_seconds = suite, data, slots, stall_seconds
        self.workers = min(worker_count(workers), slots)
        self.answers: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
        self._unanswered = 0
        self._hosts = [_Host(self, number) for number in range(self.workers)]

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

    def _submit(self, slot: int, kind: str, payload: Any) -> None:
        if not 0 <= slot < self.slots:
            raise SimulationError(f"slot {slot}: the pool has slots 0 to {self.slots - 1}")
        self._unanswered += 1
        self._hosts[slot % self.workers].requests.put((slot, kind, payload))

    def wait(self, timeout: float | None = None) -> list[tuple[int, SimReply]]:
        """Block until a request is answered, or for ``timeout`` seconds; all (slot, reply) that are ready.

        Raises:
            SimulationError: nothing was submitted.
        """
        if not self._unanswered:
            raise SimulationError("SimPool.wait: nothing was submitted; submit a reset or steps first")
        try:
            replies = [self.answers.get(timeout=timeout)]
        except queue.Empty:
            return []
        while not self.answers.empty():
            replies.append(self.answers.get())
        self._unanswered -= len(replies)
        return replies

    def renderer(self) -> dict[str, str]:
        """What the pictures are drawn with (:func:`wav.sim.rendering.describe_renderer`); call it between episodes.

        Raises:
            SimulationError: the process cannot say, or requests are pending.
        """
        if self._unanswered:
            raise SimulationError("SimPool.renderer: requests are pending; ask before the first or after the last")
        self._hosts[0].requests.put((0, "call", (describe_renderer, ())))
        _, answer = self.answers.get()
        if isinstance(answer, SimReply):
            raise SimulationError(f"renderer: {answer.error}")
        found: dict[str, str] = answer
        return found

    @property
    def pids(self) -> list[int]:
        """Of the processes that are running."""
        return [host.process.process.pid for host in self._hosts if host.process is not None]

    def close(self) -> None:
        """End all processes, those that are at work by force."""
        for host in self._hosts:
            host.closing = True
            host.requests.put(None)
        for host in self._hosts:
            host.join(timeout=2)
            if host.is_alive() and host.process is not None:
                host.process.process.kill()
            host.join()


class _Host(threading.Thread):
    """One simulator process of a pool and the episodes that live in it."""

    def __init__(self, pool: SimPool, number: int) -> None:
        super().__init__(name=f"simulator-{number}", daemon=True)
        self.pool, self.number, self.closing = pool, number, False
        self.requests: queue.SimpleQueue[tuple[int, str, Any] | None] = queue.SimpleQueue()
        self.process: WorkerProcess | None = None
        self._hosted: set[int] = set()
        self.start()

    def run(self) -> None:
        """Answer requests in order until the pool is closed."""
        while (request := self.requests.get()) is not None and not self.closing:
            self.pool.answers.put((request[0], self._answer(*request)))
        if self.process is not None:
            self.process.close()

    def _answer(self, slot: int, kind: str, payload: Any) -> Any:
        """The simulator's reply; one that says why there is none where it failed."""
        if kind == "reset":
            self._hosted.add(slot)
        elif kind == "steps" and slot not in self._hosted:
            return SimReply(None, error="its episode was lost with the process that hosted it", lost=True)
        if self.process is None:
            self.process = WorkerProcess(self.number)
            self.process.tell("open", (self.pool.suite, self.pool.data))
        try:
            reply = self.process.ask(kind, payload, self.pool.stall_seconds)
        except SimulationError as error:
            if not self.closing:
                log.warning("%s; it is replaced", error)
            self.process.kill()
            self.process = None
            self._hosted.clear()
            return SimReply(None, error=str(error))
        if isinstance(reply, SimReply | dict):
            return reply
        self.process.failed = True
        return SimReply(None, error=f"{reply}; its output is in {self.process.log}")


class Caller:
    """One simulator process that runs functions; replaced when it dies or stalls, and started at the first call.

    A call that takes longer than ``job_seconds`` is taken for stalled.
    """

    def __init__(self, number: int = 0, job_seconds: float = JOB_SECONDS) -> None:
        self._number, self._seconds, self.stopped = number, job_seconds, False
        self.process: WorkerProcess | None = None

    def call(self, function: Callable[..., Any], job: tuple[Any, ...]) -> Any:
        """``function(*job)``, or the exception it ended with.

        Where its process dies it is run again, :data:`JOB_ATTEMPTS` times in all: a killed simulator must not cost a
        demonstration that another machine would have recorded.
        """
        for left in reversed(range(JOB_ATTEMPTS)):
            process = self.process = self.process or WorkerProcess(self._number)
            try:
                return process.ask("call", (function, job), self._seconds)
            except SimulationError as error:
                process.kill()
                self.process = None
                if not left or self.stopped:
                    return error
                log.warning("%s; its job is run again", error)

    def stop(self) -> None:
        """End a call that is under way in another thread: nobody takes its result."""
        self.stopped = True
        if (process := self.process) is not None:
            process.process.kill()

    def close(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.close()


def map_in_processes(
    function: Callable[..., Any], jobs: Sequence[tuple[Any, ...]], workers: int = 0, job_seconds: float = JOB_SECONDS
) -> Iterator[tuple[int, Any]]:
    """Run ``function(*job)`` for every job in simulator processes (:class:`Caller`).

    ``function`` is importable at top level; ``workers`` 0: the machine's cores. A job that takes longer than
    ``job_seconds`` is taken for stalled and its process replaced.

    Yields:
        (index of the job, result, or the exception it ended with) as they finish, in no particular order.
    """
    callers = [Caller(number, job_seconds) for number in range(min(worker_count(workers), len(jobs)))]
    todo, stopped = deque(enumerate(jobs)), threading.Event()
    done: queue.Queue[tuple[int, Any]] = queue.Queue(
        maxsize=max(1, len(callers))
    )  # results wait for whoever takes them

    def serve(caller: Caller) -> None:
        while todo and not stopped.is_set():
            try:
                index, job = todo.popleft()
            except IndexError:  # another thread took the last one
                break
            done.put((index, caller.call(function, job)))
        caller.close()

    threads = [threading.Thread(target=serve, args=(caller,), daemon=True) for caller in callers]
    left = len(jobs)
    try:
        for thread in threads:
            thread.start()
        while left:
            result = done.get()
            left -= 1
            yield result
    finally:
        stopped.set()
        while any(thread.is_alive() for thread in threads):
            if left:  # nobody takes the other results
                for caller in callers:
                    caller.stop()
            with contextlib.suppress(queue.Empty):
                done.get(timeout=0.05)
