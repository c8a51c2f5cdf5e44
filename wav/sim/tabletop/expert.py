"""A privileged scripted expert for the tabletop suite, and the recording of demonstrations with any suite's expert.

An expert is feedback on the simulator's state: it looks at where gripper and objects are at every step and never
replays a plan, so its action is a correct label wherever execution noise has put the arm (DART-style data: noisy
actions are executed, clean ones are the labels). LIBERO's is in ``libero_expert``.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from wav.errors import ConfigError, DataError
from wav.seeding import derive_seed, numpy_generator
from wav.sim.arm import Action, Arm
from wav.sim.env import LIBERO_SUITES, Observation, SimEnv, make_env, simulator_versions, task_specs
from wav.sim.styles import Styled
from wav.sim.tabletop.tasks import BIN_CENTER, BIN_WALL, CUBE_HALF, SCENES, TABLE_HEIGHT

if TYPE_CHECKING:
    from wav.config import DataSettings
    from wav.data.episode import Episode
    from wav.sim.tabletop.env import TabletopEnv

log = logging.getLogger(__name__)

HOVER = 0.07
"""Metres above the grasp point at which the gripper aligns before it descends."""
GRASP_OFFSET = {"can": 0.02, "milk": 0.05, "bread": 0.0}
"""Metres above an object's origin to grasp at (0 where not listed)."""
CLOSE_STEPS = 4
"""Steps the fingers are given to close or open."""


class Expert(Protocol):
    """What :func:`run_expert` needs of a suite's expert."""

    arm: Arm

    def __call__(self) -> Action:
        """The clean action (7,) for the simulator's current state."""
        ...

    def random_pose(self, rng: np.random.Generator) -> tuple[NDArray[np.float64], float]:
        """Somewhere above the scene for the arm to start from: (x, y, z) in m and a yaw in rad."""
        ...


@dataclass
class TabletopExpert:
    """Feedback controller for one episode of ``task``; call once per step."""

    env: TabletopEnv
    task: str
    arm: Arm = field(init=False)
    _wait: int = 0
    _carrying: str = ""
    _down: bool = False
    _releasing: int = 0
    _pick_action: Action = field(default_factory=lambda: np.zeros(7, dtype=np.float32))
    _yaw: float = 0.0

    def __post_init__(self) -> None:
        self.arm = Arm(self.env.scene, turn=np.pi / 2)

    def __call__(self) -> Action:
        """The clean action (7,) for the simulator's current state."""
        match self.task:
            case "lift_red_cube":
                return self._lift("red_cube")
            case "lift_green_cube":
                return self._lift("green_cube")
            case "put_can_in_bin":
                return self._into_bin(("can",))
            case "put_milk_and_bread_in_bin":
                return self._into_bin(("milk", "bread"))
            case "stack_red_on_green":
                return self._stack()
        raise ConfigError(f"task {self.task!r}: the expert does not know it")

    def _lift(self, name: str) -> Action:
        if not self._pick(name):
            return self._pick_action
        above = self.env.object_position(name) * (1, 1, 0) + (0, 0, TABLE_HEIGHT + 0.16)
        return self.arm.toward(above, closed=True, yaw=self._yaw)

    def _stack(self) -> Action:
        below = self.env.object_position("green_cube")
        target = below + (0, 0, 2 * CUBE_HALF + 0.004)
        return self._pick_and_place("red_cube", target, clearance=0.06, tolerance=0.006)

    def _into_bin(self, names: tuple[str, ...]) -> Action:
        for slot, name in enumerate(names):
            if not self.env.in_bin(name):
                shift = 0.0 if len(names) == 1 else (-0.035, 0.035)[slot]
                height = TABLE_HEIGHT + BIN_WALL + 0.01 + self.env.object_bottom(name)
                target = np.array([BIN_CENTER[0] + shift, BIN_CENTER[1], height])
                return self._pick_and_place(name, target, clearance=0.08, tolerance=0.02)
        return self.arm.toward(self.arm.position() + (0, 0, 0.05), closed=False)

    def _pick_and_place(self, name: str, target: NDArray[np.float64], clearance: float, tolerance: float) -> Action:
        """Pick ``name`` and let it go with its origin at ``target`` (m)."""
        if self._releasing:
            return self._release(name)
        if not self._pick(name):
            return self._pick_action
        position, eef = self.env.object_position(name), self.arm.position()
        hold = eef - position  # where the gripper holds the object
        if np.linalg.norm(position[:2] - target[:2]) > tolerance and not self._down:
            high = target[2] + clearance
            lateral = target[:2] if position[2] > high - 0.03 else position[:2]
            return self.arm.toward(np.array([*lateral, high]) + hold, closed=True, yaw=self._yaw)
        self._down = bool(np.linalg.norm(position[:2] - target[:2]) < 2 * tolerance)
        if position[2] > target[2] + 0.008:
            return self.arm.toward(target + hold, closed=True, yaw=self._yaw, speed=0.6)
        return self._release(name)

    def _release(self, name: str) -> Action:
        """Open the fingers, then rise clear of the object."""
        self._releasing += 1
        eef = self.arm.position()
        if self._releasing <= 2 * CLOSE_STEPS:
            return self.arm.toward(eef, closed=False, yaw=self._yaw)
        clear = eef[2] - self.env.object_position(name)[2] > HOVER
        if clear or self._releasing > 8 * CLOSE_STEPS:
            self._carrying, self._down, self._wait, self._releasing = "", False, 0, 0
        return self.arm.toward(eef + (0, 0, 0.05), closed=False, yaw=self._yaw)

    def _pick(self, name: str) -> bool:
        """Whether ``name`` is held; otherwise ``_pick_action`` is the next action toward holding it."""
        grasp = self.env.object_position(name) + (0, 0, GRASP_OFFSET.get(name, 0.0))
        eef = self.arm.position()
        lateral, height = float(np.linalg.norm(eef[:2] - grasp[:2])), eef[2] - grasp[2]
        self._yaw = self.env.object_yaw(name)
        if self._carrying == name:
            if lateral < 0.03 and abs(height) < 0.04:
                return True
            self._carrying, self._down, self._wait = "", False, 0
        if lateral > 0.03 and height < HOVER - 0.02:  # too low to travel: rise first
            rise = np.array([eef[0], eef[1], grasp[2] + HOVER + 0.02])
            self._pick_action = self.arm.toward(rise + 0.3 * np.append(grasp[:2] - eef[:2], 0.0), closed=False)
        elif lateral > 0.012 and height > 0.02:
            self._pick_action = self.arm.toward(grasp + (0, 0, HOVER), closed=False, yaw=self._yaw)
        elif height > 0.008:
            self._pick_action = self.arm.toward(grasp, closed=False, yaw=self._yaw)
            self._wait = 0
        else:
            self._wait += 1
            self._pick_action = self.arm.toward(grasp, closed=True, yaw=self._yaw)
            if self._wait > CLOSE_STEPS and self.env.grasped(name):
                self._carrying, self._wait = name, 0
            elif self._wait > 4 * CLOSE_STEPS:  # closed on nothing: open and try again
                self._wait = -CLOSE_STEPS
            if self._wait < 0:
                self._pick_action = self.arm.toward(grasp + (0, 0, HOVER), closed=False, yaw=self._yaw)
        return False

    def random_pose(self, rng: np.random.Generator) -> tuple[NDArray[np.float64], float]:
        """Anywhere above the table, or right beside one of the objects."""
        names = SCENES[self.env.scene.scene]
        tall = max(self.env.object_bottom(name) for name in names) > 2 * CUBE_HALF  # things the hand would knock over
        floor = TABLE_HEIGHT + (0.20 if tall else 0.06)
        target = rng.uniform((-0.15, -0.2, floor), (0.12, 0.2, TABLE_HEIGHT + 0.24))
        if rng.random() < 0.5:
            place = self.env.object_position(names[rng.integers(len(names))])
            top = place[2] + self.env.object_bottom(names[0])
            target = place + (*rng.normal(0.0, 0.015, 2), 0.0)
            target[2] = max(top + 0.02, floor) + rng.uniform(0.0, 0.08)
        return target, float(rng.uniform(-0.3, 0.3))


_ENVIRONMENTS: dict[tuple[str, str], SimEnv] = {}
"""One simulator per (suite, settings) and process: building one costs seconds, resetting one milliseconds."""


def _environment(suite: str, data: DataSettings) -> SimEnv:
    key = (suite, data.model_dump_json())
    if key not in _ENVIRONMENTS:
        _ENVIRONMENTS[key] = make_env(suite, data)
    return _ENVIRONMENTS[key]


def begin(
    env: SimEnv, suite: str, task: str, index: int, detour: float, rng: np.random.Generator
) -> tuple[Expert, Observation]:
    """Initial state ``index`` of ``task`` with, at probability ``detour``, the arm moved elsewhere, unrecorded.

    Returns:
        the task's expert and what the first recorded step sees.
    """
    observation = env.reset(task, index)
    expert = _expert(env, suite, task)
    if rng.random() < detour:
        target, yaw = expert.random_pose(rng)
        for _ in range(int(rng.integers(4, 22))):
            env.step(expert.arm.toward(target, closed=False, yaw=yaw), render=False)
        observation = env.observe()
    return expert, observation


def _expert(env: SimEnv, suite: str, task: str) -> Expert:
    if suite in LIBERO_SUITES:
        from wav.sim.libero.expert import LiberoExpert

        return LiberoExpert(env, task)  # type: ignore[arg-type]
    return TabletopExpert(env, task)  # type: ignore[arg-type]


def run_expert(
    env: SimEnv,
    suite: str,
    task: str,
    index: int,
    noise: float = 0.0,
    detour: float = 0.0,
    seed: int = 0,
    on_step: Callable[[Observation, Action, Action], None] | None = None,
    style: str = "direct",
) -> tuple[bool, int]:
    """Run the expert from initial state ``index``; ``on_step(observation, executed, label)`` sees every step.

    Args:
        env: simulator of the suite.
        suite: its name.
        task: a task's name.
        index: initial state.
        noise: standard deviation of the motion noise added to executed actions, in action units.
        detour: probability that the arm is first moved, unrecorded, to a random pose above the table.
        seed: of noise and detour.
        on_step: called with the observation, the executed action and the clean label; None renders only the beginning.
        style: how the expert moves (:data:`wav.sim.styles.STYLES`).

    Returns:
        whether the task's predicate held within the step limit, and the steps made.
    """
    rng = numpy_generator(seed, "expert", task, index)
    expert, first = begin(env, suite, task, index, detour, rng)
    if style != "direct":
        expert = Styled(expert, style, numpy_generator(seed, "expert.style", task, index))
    observation: Observation | None = first
    limit = task_specs(suite)[task].max_steps
    for step in range(limit):
        try:
            label = expert()
        except DataError as error:  # where things lie now it knows no way
            log.info("%s, initial state %d: %s", task, index, error)
            return False, step
        executed = label.copy()
        executed[:6] += rng.normal(0.0, noise, 6).astype(np.float32) * (1, 1, 1, 0.3, 0.3, 0.3)
        executed = np.clip(executed, -1, 1).astype(np.float32)
        if on_step is not None and observation is not None:
            on_step(observation, executed, label)
        observation = env.step(executed, render=on_step is not None)
        if env.successes()[task]:
            if on_step is not None and observation is not None:
                hold = np.array([0, 0, 0, 0, 0, 0, label[6]], dtype=np.float32)
                on_step(observation, hold, hold)
            return True, step + 1
    return False, limit


@dataclass(frozen=True)
class Solved:
    """What came of one episode of an expert."""

    success: bool
    steps: int
    seconds: float
    """Of one core, the reset included."""


def solves(suite: str, task: str, index: int, data: DataSettings, noise: float, detour: float, seed: int) -> Solved:
    """Run the expert on one episode and record nothing. Runs in a simulator process."""
    env, before = _environment(suite, data), time.process_time()
    success, steps = run_expert(env, suite, task, index, noise, detour, seed)
    return Solved(success, steps, time.process_time() - before)


def record_demonstration(
    suite: str,
    task: str,
    init_index: int,
    data: DataSettings,
    noise: float,
    detour: float,
    seed: int,
    style: str = "direct",
) -> Episode:
    """One demonstration as an :class:`Episode`; a pure function of its arguments. Runs in a simulator process."""
    from wav.data.episode import Episode

    env = _environment(suite, data)
    observations: list[Observation] = []
    executed: list[Action] = []
    labels: list[Action] = []

    def keep(observation: Observation, action: Action, label: Action) -> None:
        observations.append(observation)
        executed.append(action)
        labels.append(label)

    success, _ = run_expert(env, suite, task, init_index, noise, detour, seed, keep, style)
    return Episode(
        episode_id=f"{suite}/{task}/{init_index:05d}",
        task=task,
        instruction=task_specs(suite)[task].instruction,
        images={view: np.stack([o.images[view] for o in observations]) for view in data.views},
        state=np.stack([o.state for o in observations]),
        joints=np.stack([o.joints for o in observations if o.joints is not None]),
        actions=np.stack(executed),
        expert_actions=np.stack(labels),
        success=success,
        init_index=init_index,
        seed=derive_seed(seed, "expert", task, init_index) % 2**31,
        style=style,
        source="scripted " + " ".join(f"{k}=={v}" for k, v in simulator_versions(suite).items()),
    )
