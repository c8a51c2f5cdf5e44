"""A privileged scripted expert for LIBERO: it reads the task's goal and works its conjuncts off, one after the other.

Like the tabletop expert it is feedback on the simulator's state, so its action is a correct label wherever execution
noise has put the arm.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from wav.errors import ConfigError
from wav.sim.arm import Action, Arm
from wav.sim.libero.expert_goals import PLACED, Goal, ordered_goals
from wav.sim.libero.expert_parts import Drawer, Knob, Part
from wav.sim.libero.expert_place import PickPlace
from wav.sim.libero.grasps import HeightMap, Solids, gripper_points

if TYPE_CHECKING:
    from wav.sim.libero.env import LiberoEnv


AJAR = 0.85  #: Share of open that a drawer is pulled to put something in: further, it covers what lies before it.
Skill = PickPlace | Drawer | Knob


class LiberoExpert:
    """Feedback controller for one episode of the task that ``env`` was reset to; call once per step.

    Raises:
        DataError: the task's goal has a predicate the expert does not know.
        ConfigError: when called, for a goal the expert cannot work on.
    """

    def __init__(self, env: LiberoEnv, task: str) -> None:
        self.scene, self.task = env.scene, task
        self.arm = Arm(self.scene, turn=np.pi, gain=2.0)
        self.solids = Solids(self.scene.sim)
        self.goals = ordered_goals(self.scene.parsed_problem["goal_state"])
        self._skill: Skill | None = None

    def __call__(self) -> Action:
        """The clean action (7,) for the simulator's current state."""
        if self._skill is None or self._skill.finished:
            open_goals = [goal for goal in self.goals if not self.scene._eval_predicate(goal.state)]
            if not open_goals:
                return self.arm.toward(self.arm.position() + (0, 0, 0.05), closed=False)
            self._skill = self._begin(open_goals[0])
        return self._skill()

    def _begin(self, goal: Goal) -> Skill:
        """The skill for ``goal``, or for what must be done before it."""
        if goal.predicate in PLACED:
            shut = self._shut_drawer(goal.place)
            if shut is not None:
                return Drawer(self.scene, self.arm, self.solids, shut, share=AJAR)
            return PickPlace(self.scene, self.arm, self.solids, goal)
        if goal.predicate in ("turnon", "turnoff"):
            return Knob(self.scene, self.arm, self.solids, goal)
        if goal.subject in self.scene.object_sites_dict:
            return Drawer(self.scene, self.arm, self.solids, goal)
        raise ConfigError(f"task {self.task!r}: the expert cannot reach its goal {goal.state}; choose another task")

    def _shut_drawer(self, place: str) -> Goal | None:
        """The goal of opening the drawer that ``place`` is, if it is one and open too little."""
        site = self.scene.object_sites_dict.get(place)
        if site is None or not site.joints:
            return None
        part = Part(self.scene, place)
        low, high = part.wanted("default_open_ranges")
        return Goal("open", place) if abs(part.angle) < 0.9 * AJAR * abs(low + high) / 2 else None

    def random_pose(self, rng: np.random.Generator) -> tuple[NDArray[np.float64], float]:
        """Somewhere to start from, (x, y, z) in m and a yaw in rad: above the workspace, or close above an object."""
        start, yaw = self.arm.position(), float(rng.uniform(-0.3, 0.3))
        target = start + rng.uniform((-0.10, -0.20, -0.10), (0.16, 0.20, 0.04))
        names = sorted(self.scene.objects_dict)
        lift = rng.uniform(0.03, 0.10)
        near = self.scene.sim.data.body_xpos[self.scene.obj_body_id[names[rng.integers(len(names))]]]
        if rng.random() < 0.5:
            target[:2] = near[:2] + rng.normal(0.0, 0.015, 2)
            target[2] = -np.inf
        cloud = self.solids.others(-1, start, radius=0.6)
        around = HeightMap(cloud, start, float(cloud[:, 2].min()), radius=0.6)
        clear = around.path_clearance(gripper_points(yaw), start, target)
        target[2] = max(target[2], clear + lift)
        return target, yaw
