"""Pick-and-place as feedback on the simulator's state, for any object and any place of a LIBERO scene.

Grasp and landing place come from geometry (:mod:`wav.sim.libero.grasps`) and LIBERO's own predicates; they are
computed again whenever the object is not where it was. Nothing is replayed: every action follows from where things are.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wav.errors import DataError
from wav.sim.arm import Action, Arm
from wav.sim.libero.expert_goals import Goal
from wav.sim.libero.grasps import CELL, Grasp, HeightMap, Points, Solids, grasps, gripper_points

STUCK_STEPS = 12  #: Steps over which a gripper that moves less than 3 mm counts as stuck.
CLOSE_STEPS = 5  #: Steps the fingers are given to close or to open.
ON_TOP = 0.012  #: Metres from its centre at which things are put on an object (LIBERO asks for 30 mm).
DRAWER_GRASPS = 96  #: Grasps that are compared when a thing goes into a drawer.
REACH = 0.70  #: Metres from the robot's base up to which it works with a bent elbow; at 0.78 m the elbow is straight.
INSET = 0.012  #: Metres a landing place keeps from the border of its region.


class PickPlace:
    """Puts the goal's subject in or on its place; call once per step until :attr:`finished`."""

    _around: HeightMap  #: of what lies around, once a grasp is planned
    _shape: Points  #: of what is held and the gripper, once it is

    def __init__(self, scene: Any, arm: Arm, solids: Solids, goal: Goal) -> None:
        self.scene, self.arm, self.solids, self.goal = scene, arm, solids, goal
        self.finished = False
        self._body = int(scene.obj_body_id[goal.subject])
        site = scene.object_sites_dict.get(goal.place)
        self._narrow = site is not None and bool(site.joints)  # a drawer leaves little room
        self._base = np.array(scene.sim.data.body_xpos[scene.sim.model.body_name2id("robot0_base")][:2])
        self._grasp: Grasp | None = None
        self._grasped_at = np.zeros(7)
        self._tried: list[Grasp] = []
        self._trace: deque[NDArray[np.float64]] = deque(maxlen=STUCK_STEPS)
        self._start_over()

    def _start_over(self) -> None:
        """Forget the hold, not what was tried."""
        self._grasp, self._landing = None, np.zeros(3)
        self._hold = np.zeros(3)
        self._closing = self._opening = self._releasing = self._slipped = 0
        self._held = self._down = self._out = False
        self._exit = np.zeros(3)

    def __call__(self) -> Action:
        """The next clean action (7,)."""
        self._trace.append(self.arm.position())
        if self._releasing:
            return self._release()
        if self._held and self._lost():
            self._start_over()
        if self._stuck():
            self._trace.clear()
            if self._held:  # as far as the arm goes: let go
                return self._release()
            if self._grasp is not None and not self._closing:
                self._give_up(self._grasp)
        return self._carry() if self._held else self._reach()

    def _stuck(self) -> bool:
        """Whether the gripper has hardly moved for a while, though it should."""
        full = len(self._trace) == self._trace.maxlen
        return full and bool(np.linalg.norm(self._trace[-1] - self._trace[0]) < 0.003) and not self._closing

    def _give_up(self, grasp: Grasp) -> None:
        """Open, rise and try another grasp."""
        self._tried.append(grasp)
        self._start_over()
        self._opening = CLOSE_STEPS

    # ---- picking ----

    def _reach(self) -> Action:
        """Above the grasp, down to it, close."""
        if self._opening:
            self._opening -= 1
            return self.arm.toward(self.arm.position() + (0, 0, 0.03), closed=False, yaw=self._tried[-1].yaw)
        if self._grasp is None or (not self._closing and self._moved()):
            self._plan_grasp()
        grasp, around, eef = self._grasp, self._around, self.arm.position()
        assert grasp is not None
        if self._closing:
            return self._close(grasp)
        lateral = float(np.linalg.norm(eef[:2] - grasp.position[:2]))
        turn = float(np.linalg.norm(self.arm.rotation_error(grasp.yaw)))
        height = eef[2] - grasp.position[2]
        aligned = lateral < (0.006 if not self._down else 0.014) and turn < 0.12
        if not aligned:
            self._down = False
            travel = around.path_clearance(gripper_points(grasp.yaw), eef, grasp.position) + 0.015
            if eef[2] < travel - 0.012 and lateral > 0.01:
                near = np.clip((eef[2] - travel + 0.03) / 0.02, 0.0, 1.0) if lateral < 0.04 else 0.0
                aim = np.append(eef[:2] + near * (grasp.position[:2] - eef[:2]), travel + 0.02)
                return self.arm.toward(aim, closed=False, yaw=grasp.yaw)
            return self.arm.toward(np.append(grasp.position[:2], max(travel, grasp.position[2])), False, grasp.yaw)
        self._down = True
        if height > 0.006 or lateral > 0.008:
            near = height < 0.03 and lateral > 0.006  # descending drags the arm aside: wait for it
            aim = np.append(grasp.position[:2], eef[2] - 0.004 if near and height > 0.006 else grasp.position[2])
            return self.arm.toward(aim, closed=False, yaw=grasp.yaw)
        self._closing = 1
        return self._close(grasp)

    def _close(self, grasp: Grasp) -> Action:
        self._closing += 1
        if self._closing > CLOSE_STEPS and self._touching():
            self._held, self._closing, self._down = True, 0, False
            self._trace.clear()
            self._hold = self.arm.position() - self._position()
            self._tried.clear()
            self._plan_landing()
            self._exit = self._way_out()
            return self._carry()
        if self._closing > 3 * CLOSE_STEPS:  # closed on nothing: another grasp
            self._give_up(grasp)
            return self._reach()
        return self.arm.toward(grasp.position, closed=True, yaw=grasp.yaw)

    def _plan_grasp(self) -> None:
        cloud = self.solids.cloud(self._body)
        others = self.solids.others(self._body, self._position())
        everything = np.concatenate([cloud, others])
        self._around = HeightMap(everything, self._position(), float(everything[:, 2].min()))
        floor = float(everything[:, 2].min())
        found = grasps(cloud, others, floor, self._reach_cost)
        fresh = (grasp for grasp in found if all(_differ(grasp, other) for other in self._tried))
        self._grasp = self._choose(fresh)
        if self._grasp is None and self._tried:  # every grasp was tried: from the start
            self._tried.clear()
            self._grasp = self._choose(grasps(cloud, others, floor, self._reach_cost))
        if self._grasp is None:
            raise DataError(f"expert: {self.goal.subject} cannot be grasped from above; try another state")
        self._grasped_at = self._pose()

    def _choose(self, found: Iterator[Grasp]) -> Grasp | None:
        """The cheapest grasp; for a drawer one that also lets the hand get down into it."""
        if not self._narrow:
            return next(found, None)
        position, few = self._position(), list(itertools.islice(found, DRAWER_GRASPS))
        around = HeightMap(self.solids.others(self._body, position), position, position[2], cell=CELL / 2)
        heights = [self._lowest(around, self._held_shape(g, g.position))[2] for g in few]
        order = sorted(range(len(few)), key=lambda k: few[k].cost + 10 * heights[k])
        return few[order[0]] if few else None

    def _reach_cost(self, grasp: Grasp) -> float:
        """What it costs to hold the object so that the arm is stretched, where it lies or where it goes."""
        offset = grasp.position[:2] - self._position()[:2]
        ends = (grasp.position[:2], self._center()[:2] + offset)
        return 10 * sum(max(0.0, float(np.linalg.norm(end - self._base)) - REACH) for end in ends)

    def _moved(self) -> bool:
        """Whether the object is not where the grasp was planned."""
        now = self._pose()
        turned = 1.0 - abs(float(now[3:] @ self._grasped_at[3:]))
        return bool(np.linalg.norm(now[:3] - self._grasped_at[:3]) > 0.004 or turned > 0.002)

    def _lost(self) -> bool:
        """Whether the object has left the fingers."""
        shifted = np.linalg.norm(self.arm.position() - self._position() - self._hold) > 0.03
        self._slipped = 0 if self._touching() else self._slipped + 1
        return bool(shifted or self._slipped > CLOSE_STEPS)

    def _touching(self) -> bool:
        """Whether both fingers touch the object."""
        parts = self.scene.robots[0].gripper.important_geoms
        fingers = [parts["left_finger"], parts["right_finger"]]
        return bool(self.scene._check_grasp(fingers, self.scene.get_object(self.goal.subject)))

    # ---- placing ----

    def _carry(self) -> Action:
        """Up, across and down to the landing place."""
        position, grasp, around = self._position(), self._grasp, self._around
        assert grasp is not None
        hold = self.arm.position() - position
        if not self._out:
            self._out = bool(np.linalg.norm(position[:2] - self._exit[:2]) < 0.006)
            return self.arm.toward(self._exit + hold, closed=True, yaw=grasp.yaw, speed=0.6)
        lateral = float(np.linalg.norm(position[:2] - self._landing[:2]))
        if lateral > (0.006 if not self._down else 0.015):
            self._down = False
            travel = around.path_clearance(self._shape, position, self._landing) + 0.02
            if position[2] < travel - 0.012:
                return self.arm.toward(np.append(position[:2], travel + 0.02) + hold, closed=True, yaw=grasp.yaw)
            aim = np.append(self._landing[:2], max(travel, self._landing[2]))
            return self.arm.toward(aim + hold, closed=True, yaw=grasp.yaw)
        self._down = True
        if position[2] > self._landing[2] + 0.008:
            return self.arm.toward(self._landing + hold, closed=True, yaw=grasp.yaw, speed=0.6)
        return self._release()

    def _plan_landing(self) -> None:
        """Choose where the held object goes: the lowest, most central point that the predicate accepts."""
        grasp, position = self._grasp, self._position()
        assert grasp is not None
        self._shape = self._held_shape(grasp, self.arm.position())
        others = self.solids.others(self._body, position)
        cell = CELL / 2 if self._narrow else CELL
        self._around = HeightMap(others, position, float(others[:, 2].min()), cell=cell)
        self._landing = self._lowest(self._around, self._shape)

    def _held_shape(self, grasp: Grasp, hand: NDArray[np.float64]) -> Points:
        """The object and the gripper that holds it at ``hand``, relative to the object's origin."""
        position, fingers = self._position(), gripper_points(grasp.yaw, grasp.width / 2)
        return np.concatenate([self.solids.cloud(self._body) - position, fingers + (hand - position)])

    def _lowest(self, around: HeightMap, shape: Points) -> NDArray[np.float64]:
        """Where the origin of ``shape`` comes to lie (m): low and central, at a point that the predicate accepts."""
        best, landing = np.inf, np.zeros(3)
        for place in self._candidates():
            height = around.clearance(shape, place)
            cost = 3 * height + float(np.linalg.norm(place - self._center()[:2]))
            if cost < best:
                best, landing = cost, np.array([*place, height])
        return landing

    def _way_out(self) -> NDArray[np.float64]:
        """Nearest point (m) from which the held object can rise: a bowl in a drawer is partly under the cabinet."""
        position, around = self._position(), self._around
        for radius in np.arange(0.0, 0.1, 0.01):
            for angle in np.arange(0.0, 2 * np.pi, np.pi / 6):
                place = position[:2] + radius * np.array([np.cos(angle), np.sin(angle)])
                if around.clearance(self._shape, place) < position[2] + 0.02:
                    return np.array([*place, position[2] + (0.005 if radius else 0.0)])
        return position

    def _center(self) -> NDArray[np.float64]:
        """(3,) of the place (m)."""
        if self.goal.place in self.scene.object_sites_dict:
            return np.array(self.scene.sim.data.get_site_xpos(self.goal.place))
        return np.array(self.scene.sim.data.body_xpos[self.scene.obj_body_id[self.goal.place]])

    def _candidates(self) -> list[NDArray[np.float64]]:
        """Points (x, y) at which the goal's predicate can hold, its height aside; the centre first."""
        center = self._center()
        site = self.scene.object_sites_dict.get(self.goal.place)
        if site is None:
            steps = (0.0, -ON_TOP, ON_TOP)
            return [center[:2] + (dx, dy) for dx in steps for dy in steps]
        mat = np.asarray(self.scene.sim.data.get_site_xmat(self.goal.place))
        local = np.abs(mat @ site.size) if self.goal.predicate == "in" else np.asarray(site.size)
        reach = np.maximum(local[:2] - INSET, 0.0)
        grid = [np.unique(np.r_[0.0, np.linspace(-r, r, 7)]) for r in reach]
        offsets = [np.array([a, b, 0.0]) for a in grid[0] for b in grid[1]]
        if self.goal.predicate == "on":  # LIBERO turns the offset by the site's matrix
            offsets = [mat.T @ offset for offset in offsets]
        return [center[:2] + offset[:2] for offset in offsets]

    def _release(self) -> Action:
        """Open the fingers, then rise clear of the object."""
        self._releasing += 1
        yaw = self._grasp.yaw if self._grasp is not None else 0.0
        eef = self.arm.position()
        if self._releasing <= 2 * CLOSE_STEPS:
            return self.arm.toward(eef, closed=False, yaw=yaw)
        if eef[2] - self.solids.cloud(self._body)[:, 2].max() > 0.03 or self._releasing > 8 * CLOSE_STEPS:
            self.finished = bool(self.scene._eval_predicate(self.goal.state))
            self._start_over()
        return self.arm.toward(eef + (0, 0, 0.05), closed=False, yaw=yaw)

    def _position(self) -> NDArray[np.float64]:
        return np.array(self.scene.sim.data.body_xpos[self._body])

    def _pose(self) -> NDArray[np.float64]:
        return np.concatenate([self._position(), self.scene.sim.data.body_xquat[self._body]])


def _differ(grasp: Grasp, other: Grasp) -> bool:
    """Whether a grasp is another one than one that failed."""
    turn = abs((grasp.yaw - other.yaw + np.pi / 2) % np.pi - np.pi / 2)
    return bool(np.linalg.norm(grasp.position - other.position) > 0.012 or turn > 0.3)
