"""LIBERO's simulator behind :class:`wav.sim.env.SimEnv`, under the published protocol.

An episode is a pure function of (suite, task, index). Indices 0-49 are LIBERO's fixed initial states; 1000 and up are
drawn from the task's own placement regions, as LIBERO's demonstrations were. Non-obvious: a LIBERO state does not hold
the poses of fixtures (cabinet, stove), which every reset draws from numpy's global generator. Left alone, they depend
on what ran before; here the generator is seeded by (suite, task, index) for the length of the reset. The draw of an
object's place on or in a fixture reads where the fixture is before it is moved and adds where it is moved to, so the
model's own poses are put back first. And LIBERO's observations are not those of a step's end: robosuite samples them
at the 24th of a step's 25 substeps, which is kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from wav.data.names import own_task
from wav.errors import ConfigError, DataError, SimulationError
from wav.seeding import derive_seed
from wav.sim.env import Observation
from wav.sim.fast_control import use_fast_control
from wav.sim.libero.assets import bootstrap
from wav.sim.libero.tasks import INIT_STATES, bddl_file, initial_states, task_specs
from wav.sim.rendering import simplify_model
from wav.sim.robosuite import SETTLE_STEPS, STILL, RobosuiteEnv, quiet, scene_options

if TYPE_CHECKING:
    from wav.config import DataSettings

with quiet():
    bootstrap()
    import libero.libero.envs.bddl_utils as bddl_utils
    from libero.libero.envs import TASK_MAPPING
    from robosuite.utils.errors import RandomizationError
    from robosuite.utils.observables import Observable, sensor

Pose = tuple[NDArray[np.float64], NDArray[np.float64]]  #: Position (m) and quaternion (w, x, y, z) of a body.
FIRST_DRAWN = 1000  #: From here on indices are drawn from a task's placement regions; below are LIBERO's fixed states.
FAST_MAX_FACES = 3000  #: Triangles an untextured visual mesh keeps under render: fast (1500 show on round rims).
FAST_MIN_PIXELS = 128  #: Smaller pictures are drawn larger and averaged down under render: fast (no multisampling).
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


class LiberoEnv(RobosuiteEnv):
    """Simulator of one or several LIBERO suites (:class:`wav.sim.env.SimEnv`); every task is a scene of its own.

    Raises:
        ConfigError: a view LIBERO does not have.
        ServiceError: LIBERO is not ready here (:func:`wav.sim.libero.assets.bootstrap`).
    """

    def __init__(self, data: DataSettings) -> None:
        smallest = min(data.image_height, data.image_width)
        super().__init__(data, task_specs(data.suite), -(-FAST_MIN_PIXELS // smallest) if data.render == "fast" else 1)

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
        """Put ``task`` into a state (1 + nq + nv,) of LIBERO's init files and demonstrations, or a drawn one for None.

        ``index`` names the draw of whatever the state does not hold (fixtures); ``fixtures`` are those of a recorded
        model, body -> (position, quaternion), in place of the drawn ones; ``settle``: make the ten still steps.

        Raises:
            ConfigError: no such task.
            DataError: the state has another width than the scene.
            SimulationError: LIBERO finds no placement.
        """
        scene = self._select(task)
        with _global_seed(*own_task(self.suite, task), index):
            _attempt(scene.reset, f"{self.suite}: {task}, initial state {index}")
        robot = scene.robots[0]
        use_fast_control(robot)
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
            observation = self.step(STILL, render=left == 0)
        return observation or self.observe()

    def _build(self, task: str) -> Any:
        """LIBERO's environment of one task, its fixtures drawn from the task's own seed."""
        with _global_seed(*own_task(self.suite, task), "build"):
            return _attempt(lambda: self._new_scene(task), f"{self.suite}: {task}")

    def _new_scene(self, task: str) -> Any:
        """One try of it, without its own camera observations and time limit."""
        path = str(bddl_file(self.suite, task))
        problem = TASK_MAPPING[bddl_utils.get_problem_info(path)["problem_name"]]
        fast, look = self.data.render == "fast", self.observe

        class Scene(problem):  # type: ignore[misc, valid-type]
            """The task's problem, drawn cheaply where asked for, with one observable in the place of LIBERO's."""

            wanted = False
            seen: Observation | None = None

            def _initialize_sim(self, xml_string: str | None = None) -> None:
                super()._initialize_sim(xml_string)
                model = self.sim.model._model
                self.compiled = model.body_pos.copy(), model.body_quat.copy()
                if fast:
                    simplify_model(model, FAST_MAX_FACES)

            def _reset_internal(self) -> None:
                """With the fixtures where the model has them, as after LIBERO's own slower reset that compiles anew."""
                model = self.sim.model._model
                model.body_pos[:], model.body_quat[:] = self.compiled
                super()._reset_internal()

            def _setup_observables(self) -> dict[str, Any]:
                @sensor(modality="image")
                def observation(_: Any) -> Any:
                    if self.wanted:
                        self.seen = look()
                    return np.zeros(1)

                return {"observation": Observable("observation", observation, sampling_rate=self.control_freq)}

            def _assert_problem_name(self) -> None:
                """The class has another name than the problem by design."""

        options = scene_options(self.data.control_hz)
        return Scene(path, robots=["Panda"], gripper_types="default", render_camera="frontview", **options)

    def step(self, action: NDArray[np.float32], render: bool = True) -> Observation | None:
        """Advance one control step; actions are clipped to [-1, 1]. The observation is sampled when LIBERO samples.

        Raises:
            SimulationError: LIBERO gave no observation.
        """
        scene = self.scene
        scene.wanted, scene.seen = render, None
        scene.step(np.clip(np.asarray(action, dtype=np.float64), -1.0, 1.0))
        scene.wanted = False
        if render and scene.seen is None:
            raise SimulationError(f"{self.suite}: {self._task}: a step gave no observation; run `wav doctor`")
        return scene.seen if render else None

    def success(self, task: str) -> bool:
        """LIBERO's own predicate of the current task."""
        if task != self._task:
            raise ConfigError(f"task {task!r}: the scene is that of {self._task!r}; reset it first")
        return bool(self.scene._check_success())


def _attempt(make: Any, where: str) -> Any:
    """Call ``make`` until LIBERO's samplers find a placement (each try draws further)."""
    for _ in range(_RESET_ATTEMPTS):
        try:
            return make()
        except RandomizationError:
            continue
    raise SimulationError(f"{where}: LIBERO found no placement in {_RESET_ATTEMPTS} tries; run `wav doctor`")
