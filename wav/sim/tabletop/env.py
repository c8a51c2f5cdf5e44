"""The tabletop suite: language-conditioned pick-and-place in robosuite 1.4, LIBERO-shaped.

Two cameras (agentview, wrist), the 8-D state of :func:`wav.data.state.encode_state`, 7-D OSC_POSE delta actions at
20 Hz, images rotated by 180 degrees as LIBERO's are. Tasks and initial states are in ``tabletop_tasks``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from wav.data.state import encode_state
from wav.errors import ConfigError
from wav.sim.env import Observation
from wav.sim.quick import quicken
from wav.sim.rendering import simplify_model
from wav.sim.robosuite import quiet
from wav.sim.tabletop.tasks import (
    BIN_CENTER,
    BIN_HALF,
    BIN_WALL,
    CUBE_HALF,
    SCENES,
    TABLE_HEIGHT,
    TASKS,
    InitialState,
    initial_state,
)

if TYPE_CHECKING:
    from wav.config import DataSettings

with quiet():
    from robosuite.controllers import load_controller_config
    from robosuite.environments.manipulation.single_arm_env import SingleArmEnv
    from robosuite.models.arenas import TableArena
    from robosuite.models.objects import BoxObject, BreadObject, CanObject, MilkObject
    from robosuite.models.tasks import ManipulationTask
    from robosuite.utils.mjcf_utils import new_body, new_geom
    from robosuite.utils.transform_utils import convert_quat

CAMERAS = {"agentview": "agentview", "wrist": "robot0_eye_in_hand"}
SETTLE_STEPS = 10
"""Environment steps with a still arm and an open gripper before an episode begins, as in LIBERO."""
LIFT_HEIGHT = 0.04
"""Metres an object's bottom must be above the table to count as lifted."""
OPEN, CLOSED = -1.0, 1.0
"""Gripper commands."""
SUPERSAMPLE = 2
"""Frames are rendered this many times larger and averaged down (multisampling is off in fast rendering)."""
AGENTVIEW_POSITION = (0.55, 0.0, 1.45)
AGENTVIEW_FOVY = 40.0


class _Scene(SingleArmEnv):
    """A Panda at a table with one scene's objects; initial states are set from outside."""

    def __init__(self, scene: str, fast: bool) -> None:
        self.scene, self.fast = scene, fast
        super().__init__(
            robots="Panda",
            controller_configs=load_controller_config(default_controller="OSC_POSE"),
            initialization_noise=None,
            use_camera_obs=False,
            has_renderer=False,
            has_offscreen_renderer=True,
            hard_reset=False,
            ignore_done=True,
            control_freq=20,
            horizon=1_000_000,
        )

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
        body.append(new_geom(name=f"bin_{part}", type="box", pos=position, size=size, group=0, rgba=(0, 0, 0, 0)))
        body.append(
            new_geom(
                name=f"bin_{part}_visual",
                type="box",
                pos=position,
                size=size,
                group=1,
                contype=0,
                conaffinity=0,
                rgba=(0.2, 0.3, 0.8, 1),
            )
        )
    return body


class TabletopEnv:
    """The tabletop suite's simulator (:class:`wav.sim.env.SimEnv`); scenes are built when first needed.

    Non-obvious: every rendering makes its own GL context current, so several environments may live in one process.
    """

    def __init__(self, data: DataSettings) -> None:
        unknown = [view for view in data.views if view not in CAMERAS]
        if unknown:
            raise ConfigError(f"data.views: {unknown[0]!r} is no camera of suite 'tabletop'; it has {list(CAMERAS)}")
        self.data = data
        self._scenes: dict[str, _Scene] = {}
        self._scene: _Scene | None = None
        self._task = ""

    @property
    def scene(self) -> _Scene:
        """The current scene."""
        if self._scene is None:
            raise ConfigError("TabletopEnv.step: called before reset; call reset(task, index) first")
        return self._scene

    def reset(self, task: str, index: int) -> Observation:
        """Initial state ``index`` of ``task``, settled for ten steps; a pure function of both."""
        name = TASKS[task].scene
        if name not in self._scenes:
            self._scenes[name] = _Scene(name, fast=self.data.render == "fast")
        self._scene, self._task = self._scenes[name], task
        self._scene.reset()
        quicken(self._scene.robots[0])
        self._set_state(initial_state(task, index))
        still = np.array([0, 0, 0, 0, 0, 0, OPEN], dtype=np.float32)
        for _ in range(SETTLE_STEPS):
            self._scene.step(still)
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

    def observe(self) -> Observation:
        """Render the views and read the state now."""
        images = {view: self._render(CAMERAS[view]) for view in self.data.views}
        robot = self.scene.robots[0]
        fingers = self.scene.sim.data.qpos[robot._ref_gripper_joint_pos_indexes]
        joints = np.append(robot._joint_positions, fingers[0] - fingers[1]).astype(np.float32)
        return Observation(images, self.state(), TASKS[self._task].instruction, joints)

    def state(self) -> NDArray[np.float32]:
        """(8,) state as the policy sees it."""
        robot, sim = self.scene.robots[0], self.scene.sim
        quat = convert_quat(sim.data.get_body_xquat(robot.robot_model.eef_name), to="xyzw")
        position = sim.data.site_xpos[robot.eef_site_id]
        return encode_state(position, quat, sim.data.qpos[robot._ref_gripper_joint_pos_indexes])

    def _render(self, camera: str) -> NDArray[np.uint8]:
        height, width = self.data.image_height, self.data.image_width
        context = self.scene.sim._render_context_offscreen
        context.gl_ctx.make_current()
        k = SUPERSAMPLE
        context.render(width=width * k, height=height * k, camera_id=self.scene.sim.model.camera_name2id(camera))
        raw = context.read_pixels(width * k, height * k)[::-1, ::-1]
        mean = raw.reshape(height, k, width, k, 3).astype(np.uint16).sum(axis=(1, 3)) // (k * k)
        return np.ascontiguousarray(mean.astype(np.uint8))

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
        match task:
            case "lift_red_cube":
                return self.lifted("red_cube")
            case "lift_green_cube":
                return self.lifted("green_cube")
            case "stack_red_on_green":
                return self._stacked("red_cube", "green_cube")
            case "put_can_in_bin":
                return self.in_bin("can")
            case "put_milk_and_bread_in_bin":
                return self.in_bin("milk") and self.in_bin("bread")
        raise ConfigError(f"task {task!r}: no success predicate; the tasks are {list(TASKS)}")

    def successes(self) -> dict[str, bool]:
        """Predicates of all tasks that share the current scene."""
        return {name: self.success(name) for name, spec in TASKS.items() if spec.scene == self.scene.scene}

    def close(self) -> None:
        """Free the scenes."""
        for scene in self._scenes.values():
            scene.close()
        self._scenes.clear()
        self._scene = None
