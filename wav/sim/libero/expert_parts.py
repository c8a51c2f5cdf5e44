"""Working the moving parts of LIBERO's fixtures: drawers are pulled open and pushed shut, knobs are turned.

Joints say which way a part moves, collision boxes where its handle is, LIBERO's predicates when it is done.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from wav.errors import ConfigError, DataError
from wav.sim.arm import Action, Arm, pointing
from wav.sim.libero.expert_goals import Goal
from wav.sim.libero.grasps import Grasp, HeightMap, Solids, grasps, gripper_points

CLOSE_STEPS = 7  #: Steps the fingers are given to close or to open.
HANDLE_DEPTH = 0.018  #: Metres from a drawer's outermost point within which all points are its handle.
PITCH = np.deg2rad(5.0)  #: Below the horizontal, to reach for a drawer's handle: more, and it meets the one above.
SLANT = np.deg2rad(50.0)  #: Angle below the horizontal at which the gripper pushes a drawer shut.
STANDOFF = 0.09  #: Metres before a handle at which the gripper aligns.
TURN_BEYOND = 0.6  #: Radians a knob is turned beyond what its predicate asks for.
SLIDE = 2  #: MuJoCo's number of the joint type mjJNT_SLIDE.
UP = np.array([0.0, 0.0, 1.0])


class Part:
    """A joint of a fixture and the body that moves with it.

    Raises:
        DataError: the name has no joint.
        ConfigError: it is a region behind a door on hinges.
    """

    def __init__(self, scene: Any, name: str) -> None:
        self.scene = scene
        site = scene.object_sites_dict.get(name)
        self.fixture = scene.get_object(site.parent_name if site is not None else name)
        joints = list((site if site is not None else self.fixture).joints)
        if not joints:
            raise DataError(f"expert: {name} has no joint to work; choose another task")
        model = scene.sim.model
        self._joint = model.joint_name2id(joints[0])
        if site is not None and model._model.jnt_type[self._joint] != SLIDE:
            raise ConfigError(
                f"expert: {name} is behind a door of {site.parent_name}: it works drawers and knobs, no doors; choose "
                "another task"
            )
        self._address = model.get_joint_qpos_addr(joints[0])
        self.body = int(model._model.jnt_bodyid[self._joint])

    @property
    def angle(self) -> float:
        """Where the joint stands (m or rad)."""
        return float(self.scene.sim.data.qpos[self._address])

    @property
    def axis(self) -> NDArray[np.float64]:
        """(3,) unit vector of the joint in the world."""
        return np.array(self.scene.sim.data._data.xaxis[self._joint])

    def wanted(self, ranges: str) -> tuple[float, float]:
        """LIBERO's range of the joint for a state such as ``default_open_ranges``, lower end first."""
        low, high = sorted(self.fixture.object_properties["articulation"][ranges])
        return float(low), float(high)


class Drawer:
    """Opens or closes the drawer that the goal names; call once per step until :attr:`finished`.

    ``share`` is how far it is pulled, as a share of what LIBERO calls open.
    """

    def __init__(self, scene: Any, arm: Arm, solids: Solids, goal: Goal, share: float = 1.0) -> None:
        self.scene, self.arm, self.goal = scene, arm, goal
        self.part = Part(scene, goal.subject)
        low, high = self.part.wanted("default_open_ranges")
        self._out = self.part.axis * np.sign(low + high)
        self._enough = share * abs(low + high) / 2
        cloud = solids.cloud(self.part.body)
        reach = cloud @ self._out
        handle = cloud[reach > reach.max() - HANDLE_DEPTH]
        self._handle = (handle.min(axis=0) + handle.max(axis=0)) / 2 - self.part.axis * self.part.angle
        self._thickness = float(np.ptp(handle @ self._out))
        others = solids.others(-1, arm.position())
        self._around = HeightMap(others, arm.position(), float(others[:, 2].min()))
        self.finished = False
        self._closing = self._releasing = 0
        self._held = self._low = False

    def handle(self) -> NDArray[np.float64]:
        """(3,) middle of the handle now (m)."""
        return np.asarray(self._handle + self.part.axis * self.part.angle)

    def __call__(self) -> Action:
        """The next clean action (7,)."""
        return self._pull() if self.goal.predicate == "open" else self._push()

    def _pull(self) -> Action:
        approach = -np.cos(PITCH) * self._out - np.sin(PITCH) * UP
        frame = pointing(approach, np.sin(PITCH) * self._out - np.cos(PITCH) * UP)
        eef, handle = self.arm.position(), self.handle()
        if self._releasing or abs(self.part.angle) > self._enough:
            return self._let_go(eef, approach, frame)
        offset = eef - handle
        along = float(offset @ approach)
        lateral = float(np.linalg.norm(offset - along * approach))
        if self._held:
            if np.linalg.norm(offset) > 0.03:
                self._held, self._closing = False, 0
            return self.arm.toward(handle + 0.05 * self._out, closed=True, frame=frame, speed=0.7)
        turn = float(np.linalg.norm(self.arm.rotation_to(frame)))
        self._low = lateral < (0.02 if self._low else 0.006) and turn < (0.2 if self._low else 0.08)
        if not self._low and not self._closing:
            return self.arm.toward(handle - STANDOFF * approach, closed=False, frame=frame)
        if along < -0.004 and not self._closing:
            return self.arm.toward(handle, closed=False, frame=frame, speed=0.6)
        self._closing += 1
        self._held = self._closing > CLOSE_STEPS
        return self.arm.toward(handle, closed=True, frame=frame)

    def _let_go(self, eef: NDArray[np.float64], approach: NDArray[np.float64], frame: NDArray[np.float64]) -> Action:
        """Open the fingers, back off, rise."""
        self._releasing += 1
        if self._releasing <= CLOSE_STEPS // 2:
            return self.arm.toward(eef, closed=False, frame=frame)
        if self._releasing <= 2 * CLOSE_STEPS:
            return self.arm.toward(eef - 0.05 * approach, closed=False, frame=frame)
        self.finished = self._releasing > 3 * CLOSE_STEPS
        return self.arm.toward(eef + 0.05 * UP, closed=False)

    def _push(self) -> Action:
        """Come down before the handle with closed fingers, slanted to pass under what is above; push until shut."""
        yaw = float(np.arctan2(self._out[1], self._out[0]))
        aside = np.cross(UP, self._out)
        approach = -np.cos(SLANT) * self._out - np.sin(SLANT) * UP
        frame = max((pointing(approach, side * aside) for side in (1, -1)), key=self.arm.likeness)
        eef = self.arm.position()
        before = self.handle() + (self._thickness / 2 + 0.03) * self._out
        if self._releasing or self.scene._eval_predicate(self.goal.state):
            self._releasing += 1
            self.finished = self._releasing > CLOSE_STEPS
            return self.arm.toward(eef + 0.05 * self._out, closed=True, frame=frame)
        lateral = float(np.linalg.norm((eef - before)[:2]))
        if not self._low and (lateral > 0.012 or self.arm.likeness(frame) < 2.9):
            travel = self._around.path_clearance(gripper_points(yaw, 0.0), eef, before) + 0.02
            place = eef[:2] if eef[2] < travel - 0.012 and lateral > 0.02 else before[:2]
            return self.arm.toward(np.append(place, travel + 0.01), closed=True, frame=frame)
        if not self._low and eef[2] > before[2] + 0.008:
            return self.arm.toward(before, closed=True, frame=frame)
        off = (eef - before) - ((eef - before) @ self._out) * self._out
        self._low = bool(np.linalg.norm(off) < 0.03)
        return self.arm.toward(eef - off - 0.04 * self._out, closed=True, frame=frame)


class Knob:
    """Turns the knob that the goal names on or off; call once per step until :attr:`finished`."""

    def __init__(self, scene: Any, arm: Arm, solids: Solids, goal: Goal) -> None:
        self.scene, self.arm, self.goal = scene, arm, goal
        self.part = Part(scene, goal.subject)
        on, off = self.part.wanted("default_turnon_ranges")[0], self.part.wanted("default_turnoff_ranges")[0]
        self._target = on + TURN_BEYOND if goal.predicate == "turnon" else off
        cloud, others = solids.cloud(self.part.body), solids.others(self.part.body, arm.position())
        self._around = HeightMap(np.concatenate([cloud, others]), arm.position(), float(others[:, 2].min()))
        grasp = next(grasps(cloud, others, float(cloud[:, 2].min()), self._turned_cost), None)
        if grasp is None:
            raise DataError(f"expert: the knob of {goal.subject} cannot be grasped from above; try another state")
        self._grasp = grasp
        self._start = self.part.angle
        self.finished = False
        self._closing = self._releasing = 0

    def _turned_cost(self, grasp: Grasp) -> float:
        """Prefer a grasp that is flush with the knob, and of those the one from which the wrist can turn."""
        return 20 * max(grasp.width, 0.02) + (1.0 if grasp.yaw * (self._target - self.part.angle) > 0.3 else 0.0)

    def __call__(self) -> Action:
        """The next clean action (7,)."""
        grasp, eef = self._grasp, self.arm.position()
        turned = (self.part.angle - self._start) * float(np.sign(self.part.axis[2]))
        if self._releasing or (self._closing and self.scene._eval_predicate(self.goal.state)):
            self._releasing += 1
            self.finished = self._releasing > 3 * CLOSE_STEPS
            rise = 0.05 * UP if self._releasing > CLOSE_STEPS else 0.0 * UP
            return self.arm.toward(eef + rise, closed=False, yaw=grasp.yaw + turned)
        if self._closing > CLOSE_STEPS:
            ahead = float(np.clip(self._target - self.part.angle, -0.8, 0.8)) * float(np.sign(self.part.axis[2]))
            return self.arm.toward(grasp.position, closed=True, yaw=grasp.yaw + turned + ahead)
        yaw = grasp.yaw + turned
        lateral = float(np.linalg.norm(eef[:2] - grasp.position[:2]))
        if not self._closing and (lateral > 0.008 or np.linalg.norm(self.arm.rotation_error(yaw)) > 0.12):
            travel = self._around.path_clearance(gripper_points(yaw), eef, grasp.position) + 0.015
            place = eef[:2] if eef[2] < travel - 0.012 and lateral > 0.02 else grasp.position[:2]
            return self.arm.toward(np.append(place, travel), closed=False, yaw=yaw)
        if not self._closing and eef[2] > grasp.position[2] + 0.006:
            return self.arm.toward(grasp.position, closed=False, yaw=yaw)
        self._closing += 1
        return self.arm.toward(grasp.position, closed=True, yaw=yaw)
