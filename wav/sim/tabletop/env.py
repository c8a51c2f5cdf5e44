"""The tabletop suite: language-conditioned pick-and-place in robosuite 1.4, LIBERO-shaped.

Two cameras (agentview, wrist), the 8-D state of :func:`wav.data.state.encode_state`, 7-D OSC_POSE delta actions at
20 Hz, images rotated by 180 degrees as LIBERO's are. Tasks and initial states are in :mod:`wav.sim.tabletop.tasks`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from wav.sim.env import Observation
from wav.sim.fast_control import use_fast_control
from wav.sim.rendering import simplify_model
from wav.sim.robosuite import SETTLE_STEPS, STILL, RobosuiteEnv, quiet, scene_options
from wav.sim.tabletop.tasks import (
    BIN_CENTER,
    BIN_HALF,
    BIN_WALL,
    CUBE_HALF,
    GOALS,
    SCENES,
    TABLE_HEIGHT,
    TASKS,
    InitialState,
    initial_state,
)

if TYPE_CHECKING:
    from wav.config import DataSettings

with quiet():
    from robosuite.environments.manipulation.single_arm_env import SingleArmEnv
    from robosuite.models.arenas import TableArena
    from robosuite.models.objects import BoxObject, BreadObject, CanObject, MilkObject
    from robosuite.models.tasks import ManipulationTask
    from robosuite.utils.mjcf_utils import new_body, new_geom

LIFT_HEIGHT = 0.04  #: Metres an object's bottom must be above the table to count as lifted.
SUPERSAMPLE = 2  #: Frames are drawn this many times larger and averaged down (no multisampling in fast rendering).
AGENTVIEW_POSITION = (0.55, 0.0, 1.45)
AGENTVIEW_FOVY = 40.0


class _Scene(SingleArmEnv):
    """A Panda at a table with one scene's objects; initial states are set from outside."""

    def __init__(self, scene: str, fast: bool) -> None:
        self.scene, self.fast = scene, fast
        super().__init__(robots="Panda", **scene_options(20))

    def reward(self, action: Any = None) -> float:
        """No reward: success predicates decide."""
        return 0.0

    def _load_model(self) -> None:
        super()._load_model()
        robot = self.robots[0].robot_model
        robot.set_base_xpos(robot.base_xpos_offset["table"](0.8))
        arena = TableArena(table_full_size=(0.8, 0.8, 0.05), table_offset=(0, 0, TABLE_HEIGHT))
        arena.set_origin([0, 0, 0])
        arena.set_camera(
            "agentview",
            pos=AGENTVIEW_POSITION,
            quat=[0.653, 0.271, 0.271, 0.653],
            camera_attribs={"fovy": str(AGENTVIEW_FOVY)},
        )
        if self.scene == "bin":
            arena.worldbody.append(_bin_body())
        self.scene_objects = {name: _make_object(name) for name in SCENES[self.scene]}
        self.model = ManipulationTask(
            mujoco_arena=arena, mujoco_robots=[robot], mujoco_objects=list(self.scene_objects.values())
        )

    def _initialize_sim(self, xml_string: str | None = None) -> None:
        super()._initialize_sim(xml_string)
        if self.fast:
            simplify_model(self.sim.model._model)

    def _setup_references(self) -> None:
        super()._setup_references()
        self.body_ids = {n: self.sim.model.body_name2id(o.root_body) for n, o in self.scene_objects.items()}

    def _setup_observables(self) -> dict[str, Any]:
        return {}  # observations are read from the simulation directly, once per step

    def _check_success(self) -> bool:
        return False


def _make_object(name: str) -> Any:
    """The robosuite object called ``name`` in SCENES."""
    if name == "red_cube":
        return BoxObject(name=name, size=[CUBE_HALF] * 3, rgba=[0.9, 0.05, 0.05, 1], density=300)
    if name == "green_cube":
        return BoxObject(name=name, size=[CUBE_HALF] * 3, rgba=[0.05, 0.75, 0.1, 1], density=300)
    return {"can": CanObject, "milk": MilkObject, "bread": BreadObject}[name](name=name)


def _bin_body() -> Any:
    """An open box standing on the table: a floor and four walls, seen and touched."""
    body = new_body(name="bin", pos=(BIN_CENTER[0], BIN_CENTER[1], TABLE_HEIGHT))
    wall, (hx, hy), hz = 0.005, BIN_HALF, BIN_WALL / 2
    boxes = {
        "floor": ((0, 0, wall), (hx, hy, wall)),
        "front": ((hx, 0, hz), (wall, hy, hz)),
        "back": ((-hx, 0, hz), (wall, hy, hz)),
        "left": ((0, hy, hz), (hx, wall, hz)),
        "right": ((0, -hy, hz), (hx, wall, hz)),
    }
    for part, (position, size) in boxes.items():
        box = {"type": "box", "pos": position, "size": size}
        body.append(new_geom(name=f"bin_{part}", **box, group=0, rgba=(0, 0, 0, 0)))
        seen = {"group": 1, "contype": 0, "conaffinity": 0, "rgba": (0.2, 0.3, 0.8, 1)}
        body.append(new_geom(name=f"bin_{part}_visual", **box, **seen))
    return body


class TabletopEnv(RobosuiteEnv):
    """The tabletop suite's simulator (:class:`wav.sim.env.SimEnv`)."""

    def __init__(self, data: DataSettings) -> None:
        super().__init__(data, TASKS, SUPERSAMPLE)

    def _build(self, task: str) -> _Scene:
        return _Scene(TASKS[task].scene, fast=self.data.render == "fast")

    def reset(self, task: str, index: int) -> Observation:
        """Initial state ``index`` of ``task``, settled for ten steps; a pure function of both."""
        scene = self._select(task)
        scene.reset()
        use_fast_control(scene.robots[0])
        self._set_state(initial_state(task, index))
        for _ in range(SETTLE_STEPS):
            scene.step(STILL)
        return self.observe()

    def _set_state(self, state: InitialState) -> None:
        scene = self.scene
        robot = scene.robots[0]
        robot.gripper.current_action = np.zeros(robot.gripper.dof)
        robot.set_robot_joint_positions(np.asarray(robot.init_qpos) + state.joint_offset)
        for name, place in state.placements.items():
            item = scene.scene_objects[name]
            height = TABLE_HEIGHT - item.bottom_offset[2] + 0.002
            quat = (np.cos(place.yaw / 2), 0.0, 0.0, np.sin(place.yaw / 2))
            scene.sim.data.set_joint_qpos(item.joints[0], np.array([place.x, place.y, height, *quat]))
        scene.sim.forward()
        robot.controller.update(force=True)
        robot.controller.reset_goal()

    def step(self, action: NDArray[np.float32], render: bool = True) -> Observation | None:
        """Advance one control step; actions are clipped to [-1, 1]."""
        self.scene.step(np.clip(action, -1.0, 1.0))
        return self.observe() if render else None

    def object_position(self, name: str) -> NDArray[np.float64]:
        """World position (m) of an object's body: privileged, for the expert and the predicates."""
        return np.array(self.scene.sim.data.body_xpos[self.scene.body_ids[name]])

    def object_yaw(self, name: str) -> float:
        """Rotation (rad) of an object about the vertical: privileged."""
        w, x, y, z = self.scene.sim.data.body_xquat[self.scene.body_ids[name]]
        return float(np.arctan2(2 * (w * z + x * y), 1 - 2 * (y * y + z * z)))

    def object_bottom(self, name: str) -> float:
        """Distance (m) from an object's origin down to its bottom."""
        return float(-self.scene.scene_objects[name].bottom_offset[2])

    def grasped(self, name: str) -> bool:
        """Whether both fingers touch the object."""
        scene = self.scene
        return bool(scene._check_grasp(gripper=scene.robots[0].gripper, object_geoms=scene.scene_objects[name]))

    def lifted(self, name: str) -> bool:
        """Bottom of the object at least LIFT_HEIGHT above the table."""
        return bool(self.object_position(name)[2] - self.object_bottom(name) > TABLE_HEIGHT + LIFT_HEIGHT)

    def in_bin(self, name: str) -> bool:
        """Centre inside the bin's walls, low, and let go."""
        offset = np.abs(self.object_position(name)[:2] - BIN_CENTER)
        low = self.object_position(name)[2] - self.object_bottom(name) < TABLE_HEIGHT + BIN_WALL
        return bool((offset < BIN_HALF).all() and low and not self.grasped(name))

    def _stacked(self, top: str, below: str) -> bool:
        a, b = self.object_position(top), self.object_position(below)
        resting = abs(a[2] - b[2] - 2 * CUBE_HALF) < 0.01 and float(np.linalg.norm(a[:2] - b[:2])) < CUBE_HALF
        return resting and not self.grasped(top)

    def success(self, task: str) -> bool:
        """Success predicate of ``task``, which must belong to the current scene."""
        what, names = GOALS[task]
        if what == "stack":
            return self._stacked(*names)
        return all(map(self.lifted if what == "lift" else self.in_bin, names))
