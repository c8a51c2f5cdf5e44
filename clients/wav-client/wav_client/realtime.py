"""Executes chunks at the robot's rate while the next plan is computed.

Action j of a plan belongs j steps after its observation. While a chunk is executed the next plan is asked for as many
steps ahead as planning takes; when it takes over, its first actions, whose steps have passed meanwhile, are left out. A
plan that is late takes over later, at the action of that step, so the robot never jumps back to where it was when the
observation was made. Where a chunk ends before the next plan is there, the robot holds: steps in which it holds do not
count, because it has not moved, and the late plan goes on where the robot stands.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

log = logging.getLogger(__name__)


class Schedule:
    """Which action is due at each control step, and when to ask for the next plan; knows no clock and no network.

    Args:
        execute_steps: actions of a chunk after which the next one shall take over.
        lead: control steps that a plan is expected to take, at first; later the longest of the last ones and one more.
    """

    def __init__(self, execute_steps: int, lead: int = 1) -> None:
        self.execute_steps, self.lead = execute_steps, lead
        self.held = 0  #: steps without an action
        self._moved = 0  #: steps with an action
        self._actions: Any = None
        self._start = 0  #: value of ``_moved`` at the observation that the chunk was planned from
        self._taken = 0  #: the same when it took over
        self._next: tuple[int, Any] | None = None
        self._asked: int | None = None
        self._waits = 0
        self._last: deque[int] = deque(maxlen=8)

    @property
    def wants_plan(self) -> bool:
        """Whether the observation of this step shall be planned from; call :meth:`asked` if so."""
        if self._asked is not None or self._next is not None:
            return False
        return self._actions is None or self._moved >= self._due - self.lead

    @property
    def _due(self) -> int:
        """Step at which the next plan shall take over: early enough for all of its actions, or at the chunk's end."""
        return min(self._taken + self.execute_steps, self._start + len(self._actions))

    def asked(self) -> None:
        """A plan is being made of this step's observation."""
        self._asked, self._waits = self._moved, 0

    def planned(self, actions: Any) -> None:
        """The plan (A, D) that was asked for has come."""
        assert self._asked is not None, "asked() comes before planned()"
        self._next, self._asked = (self._asked, actions), None
        if self._waits:
            self._last.append(self._waits)
            self.lead = max(self._last) + 1

    def action(self) -> Any:
        """The action (D,) of this control step; None: hold."""
        self._waits += self._asked is not None
        if self._next is not None and (self._actions is None or self._moved >= self._due):
            self._start, self._actions = self._next
            self._taken, self._next = self._moved, None
        index = self._moved - self._start
        if self._actions is None or index >= len(self._actions):
            self.held += 1
            return None
        self._moved += 1
        return self._actions[index]


@dataclass
class Report:
    """How a run went."""

    steps: int = 0
    held: int = 0  #: steps without an action, because a plan was late
    missed: int = 0  #: steps that began more than a whole step late
    plans: int = 0
    slowest_plan: float = 0.0  #: seconds


class Runner:
    """Drives a robot at a fixed rate; planning happens on another thread.

    Args:
        act: makes a plan of an observation, as :meth:`wav_client.Client.act` does.
        observe: the newest observation; called where a plan is wanted, must not block.
        apply: commands one action (D,); None: hold the position. Must not block.
        rate: control steps a second.
        execute_steps: see :class:`Schedule`; None: as the server advises.
    """

    def __init__(
        self,
        act: Callable[[dict[str, Any]], dict[str, Any]],
        observe: Callable[[], dict[str, Any]],
        apply: Callable[[Any], None],
        rate: float = 20.0,
        execute_steps: int | None = None,
    ) -> None:
        self.act, self.observe, self.apply, self.rate, self.execute_steps = act, observe, apply, rate, execute_steps

    def run(self, steps: int, done: Callable[[], bool] = lambda: False, stop: threading.Event | None = None) -> Report:
        """Run an episode of at most ``steps`` control steps; the robot stands still until the first plan is there.

        Ends earlier once ``done()`` says so or ``stop`` is set. Errors of ``act`` end it too, after a hold.
        """
        report, period = Report(), 1.0 / self.rate
        with ThreadPoolExecutor(1, "plan") as thread:
            first = self._timed(self.observe(), report)
            lead = math.ceil(report.slowest_plan / period) + 1
            schedule = Schedule(self.execute_steps or int(first["execute_steps"]), lead)
            schedule.asked()
            schedule.planned(np.asarray(first["actions"]))
            pending: Future[dict[str, Any]] | None = None
            due, holding = time.monotonic(), False
            try:
                while report.steps < steps and not done() and not (stop is not None and stop.is_set()):
                    if pending is not None and pending.done():
                        schedule.planned(np.asarray(pending.result()["actions"]))
                        pending = None
                    if schedule.wants_plan:
                        schedule.asked()
                        pending = thread.submit(self._timed, self.observe(), report)
                    action = schedule.action()
                    if action is None and not holding:
                        log.warning("step %d: the next plan is late, the robot holds", report.steps)
                    holding = action is None
                    self.apply(action)
                    report.held = schedule.held
                    report.steps += 1
                    due += period
                    late = time.monotonic() - due
                    if late > period:
                        report.missed += 1
                        due += late  # go on from here: catching up would move the robot faster than it was taught
                    time.sleep(max(0.0, -late))
            finally:
                self.apply(None)
        return report

    def _timed(self, observation: dict[str, Any], report: Report) -> dict[str, Any]:
        began = time.monotonic()
        plan = self.act(observation)
        report.plans += 1
        report.slowest_plan = max(report.slowest_plan, time.monotonic() - began)
        return plan
