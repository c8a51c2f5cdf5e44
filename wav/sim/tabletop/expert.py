"""A privileged scripted expert for the tabletop suite: feedback on the simulator's state, no plan that is replayed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from wav.sim.arm import Action, Arm
from wav.sim.tabletop.tasks import BIN_CENTER, BIN_WALL, CUBE_HALF, GOALS, SCENES, TABLE_HEIGHT

if TYPE_CHECKING:
    from wav.sim.tabletop.env import TabletopEnv

HOVER = 0.07  #: Metres above the grasp point at which the gripper aligns before it descends.
GRASP_OFFSET = {"can": 0.02, "milk": 0.05, "bread": 0.0}  #: Metres above its origin to grasp an object at, if not 0.
CLOSE_STEPS = 4  #: Steps the fingers are given to close or open.


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
        what, names = GOALS[self.task]
        if what == "lift":
            return self._lift(names[0])
        return self._into_bin(names) if what == "bin" else self._stack(*names)

    def _lift(self, name: str) -> Action:
        if not self._pick(name):
            return self._pick_action
        above = self.env.object_position(name) * (1, 1, 0) + (0, 0, TABLE_HEIGHT + 0.16)
        return self.arm.toward(above, closed=True, yaw=self._yaw)

    def _stack(self, name: str, below: str) -> Action:
        target = self.env.object_position(below) + (0, 0, 2 * CUBE_HALF + 0.004)
        return self._pick_and_place(name, target, clearance=0.06, tolerance=0.006)

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
