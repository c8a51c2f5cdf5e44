"""A simulator process, started by ``wav.sim.process``: ``python -m wav.sim.worker FD PARENT STDERR``.

Answers requests read from the socket FD until its end of file; warnings also go to the parent's STDERR. It hosts one
simulator per slot; each episode's result depends on its own reset alone.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import time
import traceback
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from wav.processes import die_with_parent
from wav.sim.env import Observation, SimEnv, SimReply
from wav.sim.registry import make_env

if TYPE_CHECKING:
    from wav.config import DataSettings


@dataclass
class _Slot:
    """One live episode; ``render_seconds`` is what its observations took since the request began."""

    env: SimEnv
    task: str = ""
    record: bool = False
    latched: dict[str, bool] = field(default_factory=dict)
    began: float = 0.0
    render_seconds: float = 0.0

    def __post_init__(self) -> None:
        observe = self.env.observe

        def timed() -> Observation:
            start = time.perf_counter()
            seen = observe()
            self.render_seconds += time.perf_counter() - start
            return seen

        self.env.observe = timed  # type: ignore[method-assign]  # steps and resets observe through it, too

    def begin(self) -> _Slot:
        """Start the clock of a request."""
        self.began, self.render_seconds = time.perf_counter(), 0.0
        return self

    def reset(self, task: str, index: int, record: bool) -> SimReply:
        self.task, self.record = task, record
        observation = self.env.reset(task, index)
        self.latched = self.env.successes()
        return self._reply(observation, 0, [dict(observation.images)] if record else [])

    def steps(self, actions: Any) -> SimReply:
        frames: list[dict[str, Any]] = []
        observation: Observation | None = None
        done = 0
        for action in actions:
            last = done == len(actions) - 1
            observation = self.env.step(action, render=self.record or last)
            done += 1
            for name, holds in self.env.successes().items():
                self.latched[name] = self.latched[name] or holds
            if self.latched[self.task] and observation is None:
                observation = self.env.observe()
            if self.record and observation is not None:
                frames.append(dict(observation.images))
            if self.latched[self.task]:
                break
        return self._reply(observation, done, frames)

    def _reply(self, observation: Observation | None, done: int, frames: list[dict[str, Any]]) -> SimReply:
        busy, render = time.perf_counter() - self.began, self.render_seconds
        success = self.latched[self.task]
        return SimReply(
            observation, success, done, frames, dict(self.latched), busy_seconds=busy, render_seconds=render
        )


class _Worker:
    """Requests to answers."""

    def __init__(self) -> None:
        self.suite = ""
        self.data: DataSettings | None = None
        self.slots: dict[int, _Slot] = {}

    def handle(self, kind: str, payload: Any) -> Any:
        if kind == "call":
            function, arguments = payload
            return function(*arguments)
        if kind == "reset":
            number, task, index, record = payload
            if number not in self.slots:
                assert self.data is not None
                self.slots[number] = _Slot(make_env(self.suite, self.data))
            return self.slots[number].begin().reset(task, index, record)
        number, actions = payload
        return self.slots[number].begin().steps(actions)

    def forget(self, kind: str, payload: Any) -> None:
        """Give up the simulator that a request failed in: the next reset of its slot builds a fresh one."""
        if kind != "call" and (slot := self.slots.pop(payload[0], None)) is not None:
            with contextlib.suppress(Exception):
                slot.env.close()


def main() -> None:
    """Serve until the parent closes its end."""
    connection = Connection(int(sys.argv[1]))
    die_with_parent(int(sys.argv[2]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    outputs: list[logging.Handler] = [logging.StreamHandler(), logging.StreamHandler(os.fdopen(int(sys.argv[3]), "w"))]
    logging.basicConfig(handlers=outputs, level=logging.WARNING, format="simulator: %(message)s")
    worker = _Worker()
    while True:
        try:
            kind, payload = connection.recv()
        except (EOFError, OSError):
            break
        if kind == "open":
            worker.suite, worker.data = payload
            continue
        try:
            answer: Any = worker.handle(kind, payload)
        except Exception as error:  # whatever went wrong belongs to the request, not to the process
            traceback.print_exc()
            worker.forget(kind, payload)
            answer = RuntimeError(f"{type(error).__name__}: {error}") if kind == "call" else str(error)
        connection.send(answer)
    os._exit(0)  # GL contexts need no orderly end, and a renderer's destructor may hang


if __name__ == "__main__":
    main()
