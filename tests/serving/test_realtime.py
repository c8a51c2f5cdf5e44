"""Chunks at a robot's rate: which action is executed at which step, whatever a plan takes."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest

from tests.helpers.serving import FakePolicy, client, message, serving

from wav_client.realtime import Runner, Schedule  # isort: skip  (found by tests.helpers.serving)

CHUNK, EXECUTE = 15, 8


def simulate(delays: Any, steps: int = 80) -> tuple[list[int | None], Schedule]:
    """Steps of a robot whose plans take ``delays`` control steps: what is executed, named by the place it moves to.

    A plan made at place p holds the places p, p + 1, ...: a robot that never jumps goes through all of them in turn.
    """
    schedule, place, wait = Schedule(EXECUTE, lead=2), 0, None
    executed: list[int | None] = []
    schedule.asked()
    schedule.planned(list(range(CHUNK)))
    for step in range(steps):
        if wait is not None and step >= wait[0]:
            schedule.planned([wait[1] + i for i in range(CHUNK)])
            wait = None
        if schedule.wants_plan:
            schedule.asked()
            wait = (step + next(delays), place)
        action = schedule.action()
        executed.append(action)
        place += action is not None
    return executed, schedule


@pytest.mark.parametrize("delay", [1, 2, 5, 7])
def test_no_step_is_held_while_plans_come_in_time(delay: int) -> None:
    executed, schedule = simulate(iter([delay] * 99))
    assert executed == list(range(80))
    assert schedule.held == 0
    assert schedule.lead == delay + 1


@pytest.mark.parametrize("delay", [9, 14, 15, 40])
def test_a_late_plan_holds_and_never_jumps(delay: int) -> None:
    executed, schedule = simulate(iter([delay] * 99))
    moved = [place for place in executed if place is not None]
    assert moved == list(range(len(moved)))
    assert schedule.held == executed.count(None) > 0
    assert len(moved) > 80 * CHUNK / (CHUNK + delay) / 2


@pytest.mark.parametrize("seed", range(5))
def test_plans_of_any_length_never_jump(seed: int) -> None:
    random = np.random.default_rng(seed)
    executed, schedule = simulate(iter(random.integers(1, 30, 999).tolist()), 500)
    moved = [place for place in executed if place is not None]
    assert moved == list(range(len(moved)))
    assert schedule.held == executed.count(None)


class Robot:
    """Counts what it is told; its observation is the place it stands at."""

    def __init__(self) -> None:
        self.place, self.commands = 0, []

    def observe(self) -> dict[str, Any]:
        return {"place": self.place}

    def apply(self, action: Any) -> None:
        self.commands.append(None if action is None else int(action[0]))
        self.place += action is not None


def plan(observation: dict[str, Any], seconds: float = 0.0) -> dict[str, Any]:
    time.sleep(seconds)
    actions = np.float32([[observation["place"] + i] for i in range(CHUNK)])
    return {"actions": actions, "execute_steps": EXECUTE}


def test_a_run_ends_when_it_is_done_and_holds_at_its_end() -> None:
    robot = Robot()
    report = Runner(plan, robot.observe, robot.apply, rate=500).run(200, done=lambda: robot.place >= 40)
    moved = [place for place in robot.commands if place is not None]
    assert moved == list(range(40))
    assert robot.commands[-1] is None
    assert report.plans >= 5
    assert Runner(plan, robot.observe, robot.apply, rate=500).run(7).steps == 7
    stop = threading.Event()
    stop.set()
    assert Runner(plan, robot.observe, robot.apply, rate=500).run(200, stop=stop).steps == 0


def test_an_error_of_the_policy_ends_the_run_after_a_hold() -> None:
    robot = Robot()

    def fails(observation: dict[str, Any]) -> dict[str, Any]:
        if observation["place"]:
            raise ConnectionError("gone")
        return plan(observation)

    with pytest.raises(ConnectionError, match="gone"):
        Runner(fails, robot.observe, robot.apply, rate=500).run(200)
    assert robot.commands[-1] is None


def test_a_served_policy_drives_a_robot() -> None:
    commands: list[Any] = []
    with serving(FakePolicy()) as server, client(server) as one:
        report = Runner(one.act, message, commands.append, rate=200, execute_steps=3).run(20)
    assert report.steps == 20
    assert report.plans >= 1
    assert len(commands) == 21


@pytest.mark.long
@pytest.mark.parametrize(("seconds", "held"), [(0.25, False), (0.9, True)])
def test_at_20_hz_in_real_time(seconds: float, held: bool, caplog: pytest.LogCaptureFixture) -> None:
    """No control step is missed while a plan takes a quarter of a second; one that takes longer holds and says so."""
    robot = Robot()
    runner = Runner(lambda seen: plan(seen, seconds), robot.observe, robot.apply, rate=20)
    report = runner.run(200)
    moved = [place for place in robot.commands if place is not None]
    assert moved == list(range(len(moved)))
    assert report.missed == 0
    assert (report.held > 0) == held == ("the robot holds" in caplog.text)
