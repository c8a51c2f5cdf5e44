"""LIBERO's simulator behind :class:`wav.sim.env.SimEnv`, under the published protocol.

An episode is a pure function of (suite, task, index). Indices 0-49 are LIBERO's fixed initial states; 1000 and up are
drawn from the task's own placement regions, as LIBERO's demonstrations were. Non-obvious: a LIBERO state does not hold
the poses of fixtures (cabinet, stove), which every reset draws from numpy's global generator. Left alone, they depend
on what ran before; here the generator is seeded by (suite, task, index) for the length of the reset. And LIBERO's
observations are not those of a step's end: robosuite samples them at the 24th of a step's 25 substeps, which is kept.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from wav.data.state import encode_state
from wav.errors import ConfigError, DataError, SimulationError
from wav.seeding import derive_seed
from wav.sim.env import Observation
from wav.sim.libero.assets import bootstrap
from wav.sim.libero.tasks import INIT_STATES, bddl_file, initial_states, task_specs
from wav.sim.quick import quicken
from wav.sim.rendering import simplify_model
from wav.sim.robosuite import quiet

if TYPE_CHECKING:
    from wav.config import DataSettings

with quiet():
    bootstrap()
    import libero.libero.envs.bddl_utils as bddl_utils
    from libero.libero.envs import TASK_MAPPING
    from robosuite.controllers import load_controller_config
    from robosuite.utils.errors import RandomizationError
    from robosuite.utils.observables import Observable, sensor
    from robosuite.utils.transform_utils import convert_quat

Pose = tuple[NDArray[np.float64], NDArray[np.float64]]
"""Position (m) and quaternion (w, x, y, z) of a body."""
CAMERAS = {"agentview": "agentview", "wrist": "robot0_eye_in_hand"}
SETTLE_STEPS = 10
"""Environment steps with a still arm and an open gripper before an episode begins."""
STILL = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0)
FIRST_DRAWN = 1000
"""Indices from here on are drawn from the task's placement regions; below lie LIBERO's fixed initial states."""
FAST_MAX_FACES = 3000
"""Triangles an untextured visual mesh keeps under render: fast (1500 show on round rims)."""
FAST_MIN_PIXELS = 128
"""Smaller pictures are rendered larger and averaged down under render: fast, as multisampling is off."""
KEPT_SCENES = 2
"""Scenes an environment keeps built: one takes two seconds to build and about 0.3 GB."""
_RESET_ATTEMPTS = 50


@contextlib.contextmanager
def _global_seed(*index: int | str) -> Iterator[None]:
    """Seed numpy's global generator for the block and leave it as it was."""
    before = np.random.get_state()
    np.random.seed(derive_seed(0, "libero.reset", *index) % 2**32)
    try:
        yield
    finally:
        np.random.set_state(before)


class LiberoEnv:
    """One LIBERO suite's simulator (:class:`wav.sim.env.SimEnv`); scenes are built when first needed.

    Raises:
        ConfigError: a view LIBERO does not have.
        ServiceError: LIBERO is not ready here (:func:`wav.sim.libero.assets.bootstrap`).
    """

    def __init__(self, data: DataSettings) -> None:
        unknown = [view for view in data.views if view not in CAMERAS]
        if unknown:
            raise ConfigError(f"data.views: {unknown[0]!r} is no camera of {data.suite!r}; it has {list(CAMERAS)}")
        self.data, self.suite = data, data.suite
        self.tasks = task_specs(data.suite)
        self._scenes: OrderedDict[str, Any] = OrderedDict()
        self._task = ""

    @property
    def scene(self) -> Any:
        """The current robosuite environment."""
        if not self._task:
            raise ConfigError("LiberoEnv.step: called before reset; call reset(task, index) first")
        return self._scenes[self._task]

    def reset(self, task: str, index: int) -> Observation:
        """Initial state ``index`` of ``task``, settled for ten steps; a pure function of both.

        Raises:
            ConfigError: no such task or index.
        """
        if not (0 <= index < INIT_STATES or index >= FIRST_DRAWN):
            raise ConfigError(
                f"initial state index = {index}: {self.suite} has 0-{INIT_STATES - 1} for evaluation and "
                f"{FIRST_DRAWN} and up for demonstrations"
            )
        state = initial_states(self.suite, task)[index] if index < INIT_STATES else None
        return self.reset_to(task, state, index)

    def reset_to(
        self,
        task: str,
        state: NDArray[np.float64] | None,
        index: int | str,
        settle: bool = True,
        fixtures: Mapping[str, Pose] | None = None,
    ) -> Observation:
        """Put ``task`` into a MuJoCo state (time, qpos, qvel), or a drawn one for None.

        Args:
            task: a task of the suite.
            state: (1 + nq + nv,) as stored in LIBERO's init files and demonstrations.
            index: names the draw of whatever the state does not hold (fixtures).
            settle: make the ten still steps.
            fixtures: body -> (position, quaternion) of a recorded model, in place of the drawn ones.

        Raises:
            ConfigError: no such task.
            DataError: the state has another width than the scene.
            SimulationError: LIBERO finds no placement.
        """
        scene = self._select(task)
        with _global_seed(self.suite, task, index):
            _attempt(scene.reset, f"{self.suite}: {task}, initial state {index}")
        robot = scene.robots[0]
        quicken(robot)
        robot.gripper.current_action = np.zeros(robot.gripper.dof)
        if state is not None:
            width = 1 + scene.sim.model.nq + scene.sim.model.nv
            if state.shape != (width,):
                raise DataError(
                    f"{self.suite}: {task}: initial state {index} has shape {state.shape}, the scene needs ({width},); "
                    "the assets and hf-libero must be of one release"
                )
            scene.sim.set_state_from_flattened(state)
        for fixture in scene.fixtures_dict.values():
            if fixtures and fixture.root_body in fixtures:
                body = scene.sim.model.body_name2id(fixture.root_body)
                scene.sim.model.body_pos[body], scene.sim.model.body_quat[body] = fixtures[fixture.root_body]
        scene.sim.forward()
        scene._check_success()
        scene._post_process()
        scene._update_observables(force=True)  # as LIBERO's set_init_state: decides when steps are sampled
        observation: Observation | None = None
        for left in reversed(range(SETTLE_STEPS if settle else 0)):
            observation = self.step(np.array(STILL, dtype=np.float32), render=left == 0)
        return observation or self.observe()

    def _select(self, task: str) -> Any:
        """The scene of ``task``, built if need be; the one unused longest is closed."""
        if task not in self.tasks:
            raise ConfigError(f"task {task!r}: no task of suite {self.suite!r}; the tasks are {list(self.tasks)}")
        if task not in self._scenes:
            while len(self._scenes) >= KEPT_SCENES:
                self._scenes.popitem(last=False)[1].close()
            with _global_seed(self.suite, task, "build"):
                self._scenes[task] = _attempt(lambda: self._build(task), f"{self.suite}: {task}")
        self._scenes.move_to_end(task)
        self._task = task
        return self._scenes[task]

    def _build(self, task: str) -> Any:
        """LIBERO's environment of one task, without its own camera observations and time limit."""
        path = str(bddl_file(self.suite, task))
        problem = TASK_MAPPING[bddl_utils.get_problem_info(path)["problem_name"]]
        fast = self.data.render == "fast"

        look = self.observe

        class Scene(problem):  # type: ignore[misc, valid-type]
            """The task's problem, drawn cheaply where asked for, with one observable in the place of LIBERO's."""

            wanted = False
            seen: Observation | None = None

            def _initialize_sim(self, xml_string: str | None = None) -> None:
                super()._initialize_sim(xml_string)
                if fast:
                    simplify_model(self.sim.model._model, FAST_MAX_FACES)

            def _setup_observables(self) -> dict[str, Any]:
                @sensor(modality="image")
                def observation(_: Any) -> Any:
                    if self.wanted:
                        self.seen = look()
                    return np.zeros(1)

                return {"observation": Observable("observation", observation, sampling_rate=self.control_freq)}

            def _assert_problem_name(self) -> None:
                """The class has another name than the problem by design."""

        return Scene(
            path,
            robots=["Panda"],
            controller_configs=load_controller_config(default_controller="OSC_POSE"),
            gripper_types="default",
            initialization_noise=None,
            use_camera_obs=False,
            has_renderer=False,
            has_offscreen_renderer=True,
            render_camera="frontview",
            control_freq=self.data.control_hz,
            horizon=1_000_000,
            ignore_done=True,
            hard_reset=False,
        )

    def step(self, action: NDArray[np.float32], render: bool = True) -> Observation | None:
        """Advance one control step; actions are clipped to [-1, 1]. The observation is sampled when LIBERO samples."""
        scene = self.scene
        scene.wanted, scene.seen = render, None
        scene.step(np.clip(np.asarray(action, dtype=np.float64), -1.0, 1.0))
        scene.wanted = False
        if render and scene.seen is None:
            raise SimulationError(f"{self.suite}: {self._task}: a step gave no observation; run `wav doctor`")
        return scene.seen if render else None

    def observe(self) -> Observation:
        """Render the views and read the state now, rather than when LIBERO samples them during a step."""
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
        """(H, W, 3): LIBERO's raw buffer rotated by 180 degrees."""
        height, width = self.data.image_height, self.data.image_width
        small = self.data.render == "fast" and min(height, width) < FAST_MIN_PIXELS
        k = -(-FAST_MIN_PIXELS // min(height, width)) if small else 1
        sim = self.scene.sim
        context = sim._render_context_offscreen
        context.gl_ctx.make_current()
        context.render(width=width * k, height=height * k, camera_id=sim.model.camera_name2id(camera))
        raw = context.read_pixels(width * k, height * k)[::-1, ::-1]
        if k > 1:
            mean = raw.reshape(height, k, width, k, 3).astype(np.uint32).sum(axis=(1, 3)) // (k * k)
            raw = mean.astype(np.uint8)
        return np.ascontiguousarray(raw)

    def success(self, task: str) -> bool:
        """LIBERO's own predicate of the current task."""
        if task != self._task:
            raise ConfigError(f"task {task!r}: the scene is that of {self._task!r}; reset it first")
        return bool(self.scene._check_success())

    def successes(self) -> dict[str, bool]:
        """The current task's predicate: every LIBERO task is a scene of its own."""
        return {self._task: self.success(self._task)}

    def close(self) -> None:
        """Free the scenes."""
        for scene in self._scenes.values():
            scene.close()
        self._scenes.clear()
        self._task = ""


def _attempt(make: Any, where: str) -> Any:
    """Call ``make`` until LIBERO's samplers find a placement (each try draws further)."""
    for _ in range(_RESET_ATTEMPTS):
        try:
            return make()
        except RandomizationError:
            continue
    raise SimulationError(f"{where}: LIBERO found no placement in {_RESET_ATTEMPTS} tries; run `wav doctor`")
