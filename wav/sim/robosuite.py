"""What every robosuite suite shares: robosuite imported once and quietly, and an environment around its scenes.

The renderer is chosen before robosuite imports mujoco, so import this module before any of robosuite.
"""

from __future__ import annotations

import abc
import contextlib
import logging
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from wav.data.state import encode_state
from wav.errors import ConfigError
from wav.sim.env import Observation, TaskSpec
from wav.sim.rendering import choose_backend

if TYPE_CHECKING:
    from wav.config import DataSettings


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep back the warnings that robosuite and LIBERO give while they are imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


choose_backend()  # before robosuite imports mujoco
logging.getLogger("robosuite_logs").setLevel(logging.ERROR)
with quiet():
    import robosuite.macros as macros
    from robosuite.controllers import load_controller_config
    from robosuite.utils.transform_utils import convert_quat

macros.CONSOLE_LOGGING_LEVEL = None
macros.FILE_LOGGING_LEVEL = None

CAMERAS = {"agentview": "agentview", "wrist": "robot0_eye_in_hand"}
SETTLE_STEPS = 10  #: Environment steps with a still arm and an open gripper before an episode begins.
STILL = np.array([0, 0, 0, 0, 0, 0, -1], dtype=np.float32)
KEPT_SCENES = 2  #: Scenes an environment keeps built: one of LIBERO's takes two seconds to build and about 0.3 GB.


def scene_options(control_hz: int) -> dict[str, Any]:
    """Options of every scene: OSC_POSE deltas, offscreen rendering by this class alone, no time limit of its own."""
    return {
        "controller_configs": load_controller_config(default_controller="OSC_POSE"),
        "initialization_noise": None,
        "use_camera_obs": False,
        "has_renderer": False,
        "has_offscreen_renderer": True,
        "hard_reset": False,
        "ignore_done": True,
        "control_freq": control_hz,
        "horizon": 1_000_000,
    }


class RobosuiteEnv(abc.ABC):
    """A suite's simulator (:class:`wav.sim.env.SimEnv`) but for its own reset, step and predicates.

    Scenes are built when first needed; pictures are drawn ``supersampling`` times larger a side and averaged down.
    Non-obvious: every rendering makes its own GL context current, so several environments may live in one process.

    Raises:
        ConfigError: a view that robosuite's Panda scenes do not have.
    """

    def __init__(self, data: DataSettings, tasks: Mapping[str, TaskSpec], supersampling: int) -> None:
        unknown = [view for view in data.views if view not in CAMERAS]
        if unknown:
            raise ConfigError(f"data.views: {unknown[0]!r} is no camera of {data.suite!r}; it has {list(CAMERAS)}")
        self.data, self.tasks, self.suite, self._supersampling = data, tasks, data.suite, supersampling
        self._scenes: OrderedDict[str, Any] = OrderedDict()
        self._task = ""

    @abc.abstractmethod
    def _build(self, task: str) -> Any:
        """A new robosuite environment for the scene of ``task``."""

    @abc.abstractmethod
    def success(self, task: str) -> bool:
        """Success predicate of ``task``, which must belong to the current scene."""

    @property
    def scene(self) -> Any:
        """The current robosuite environment."""
        if not self._task:
            raise ConfigError(f"{type(self).__name__}.step: called before reset; call reset(task, index) first")
        return self._scenes[self.tasks[self._task].scene]

    def _select(self, task: str) -> Any:
        """The scene of ``task``, built if need be; the one unused longest is closed."""
        if task not in self.tasks:
            raise ConfigError(f"task {task!r}: no task of suite {self.suite!r}; the tasks are {list(self.tasks)}")
        name = self.tasks[task].scene
        if name not in self._scenes:
            while len(self._scenes) >= KEPT_SCENES:
                self._scenes.popitem(last=False)[1].close()
            self._scenes[name] = self._build(task)
        self._scenes.move_to_end(name)
        self._task = task
        return self._scenes[name]

    def observe(self) -> Observation:
        """Render the views and read the state now."""
        images = {view: self._render(CAMERAS[view]) for view in self.data.views}
        robot = self.scene.robots[0]
        fingers = self.scene.sim.data.qpos[robot._ref_gripper_joint_pos_indexes]
        joints = np.append(robot._joint_positions, fingers[0] - fingers[1]).astype(np.float32)
        return Observation(images, self.state(), self.tasks[self._task].instruction, joints)

    def state(self) -> NDArray[np.float32]:
        """(8,) state as the policy sees it."""
        robot, sim = self.scene.robots[0], self.scene.sim
        quat = convert_quat(sim.data.get_body_xquat(robot.robot_model.eef_name), to="xyzw")
        position = sim.data.site_xpos[robot.eef_site_id]
        return encode_state(position, quat, sim.data.qpos[robot._ref_gripper_joint_pos_indexes])

    def _render(self, camera: str) -> NDArray[np.uint8]:
        """(H, W, 3): the raw OpenGL buffer rotated by 180 degrees, averaged down where drawn larger."""
        height, width, k = self.data.image_height, self.data.image_width, self._supersampling
        context = self.scene.sim._render_context_offscreen
        context.gl_ctx.make_current()
        context.render(width=width * k, height=height * k, camera_id=self.scene.sim.model.camera_name2id(camera))
        raw = context.read_pixels(width * k, height * k)[::-1, ::-1]
        if k > 1:
            mean = raw.reshape(height, k, width, k, 3).astype(np.uint16).sum(axis=(1, 3)) // (k * k)
            raw = mean.astype(np.uint8)
        return np.ascontiguousarray(raw)

    def successes(self) -> dict[str, bool]:
        """Predicates of all tasks that share the current scene."""
        scene = self.tasks[self._task].scene if self._task else self.scene
        return {name: self.success(name) for name, spec in self.tasks.items() if spec.scene == scene}

    def close(self) -> None:
        """Free the scenes."""
        for scene in self._scenes.values():
            scene.close()
        self._scenes.clear()
        self._task = ""
