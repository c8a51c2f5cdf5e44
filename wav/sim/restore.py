"""Put a robosuite scene back into a state it was in, to the last bit: what executing several futures for real needs.

``sim.set_state_from_flattened`` restores time, positions and velocities alone. An object in the hand is then 150 to
350 mm off after a few steps, because the controller's goal, the gripper's integrator and the solver's warm start are
still those of whatever ran before. :func:`save` keeps everything the next control step reads, and :func:`restore` puts
it back, so that the same actions give the same joints, objects, success and pictures::

    state = save(env.scene)                 # right after a step has returned, and nowhere else
    for chunk in candidates:
        restore(env.scene, state)
        for action in chunk:
            env.step(action, render=False)

A saved state is numpy arrays and numbers: it can be pickled and restored in another process, in a scene of the same
task that was built and reset at least once, to whatever initial state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_GOALS = ("goal_ori", "goal_pos", "initial_joint")
_CLOCK = ("timestep", "cur_time", "done")

Pose = tuple[NDArray[np.float64], NDArray[np.float64]]


@dataclass(frozen=True)
class SceneState:
    """What decides a scene's future, at the end of a control step."""

    physics: NDArray[np.float64]
    """MuJoCo's integration state: time, positions, velocities, activations, warm start, controls, applied forces."""
    gripper: NDArray[np.float64]  #: The gripper's commanded opening, which each physics step integrates.
    goals: dict[str, NDArray[np.float64]]  #: The arm controller's; a rotation of exactly zero keeps the goal before.
    clock: dict[str, Any]  #: robosuite's own step count and time.
    sampling: dict[str, tuple[float, bool]]
    """Observable -> (seconds since its last sample, whether it was sampled); it decides when LIBERO looks."""
    fixtures: dict[int, Pose]  #: Body -> (position, quaternion) of LIBERO's fixtures: no part of any MuJoCo state.


def save(scene: Any) -> SceneState:
    """The state of a robosuite ``scene`` whose last ``step`` has returned."""
    import mujoco  # not before the renderer has been chosen

    model, data, robot = scene.sim.model._model, scene.sim.data._data, scene.robots[0]
    kind = mujoco.mjtState.mjSTATE_INTEGRATION.value
    physics = np.empty(mujoco.mj_stateSize(model, kind))
    mujoco.mj_getState(model, data, physics, kind)
    controller = robot.controller
    return SceneState(
        physics,
        np.array(robot.gripper.current_action, dtype=np.float64),
        {name: np.array(getattr(controller, name)) for name in _GOALS if getattr(controller, name) is not None},
        {name: getattr(scene, name) for name in _CLOCK},
        {name: (seen._time_since_last_sample, seen._sampled) for name, seen in _observables(scene).items()},
        {body: (model.body_pos[body].copy(), model.body_quat[body].copy()) for body in _fixtures(scene)},
    )


def restore(scene: Any, state: SceneState, look: bool = False) -> None:
    """Put ``scene``, of the task that ``state`` was saved in, into it; the next thing done must be a step.

    Unless ``look``, which also computes what rendering and success predicates read. A picture then shows the bodies
    where the joints have them, which is up to one physics step newer than the observation that the step returned.

    Raises:
        ValueError: the state is of another scene (its physics has another size).
    """
    import mujoco

    model, data, robot = scene.sim.model._model, scene.sim.data._data, scene.robots[0]
    kind = mujoco.mjtState.mjSTATE_INTEGRATION.value
    size = mujoco.mj_stateSize(model, kind)
    if state.physics.shape != (size,):
        raise ValueError(f"state of {state.physics.size} numbers, this scene has {size}: restore it in its own task")
    for body, (position, quaternion) in state.fixtures.items():
        model.body_pos[body], model.body_quat[body] = position, quaternion
    mujoco.mj_setState(model, data, state.physics, kind)
    if look:
        mujoco.mj_forward(model, data)
        mujoco.mj_setState(model, data, state.physics, kind)  # the call above overwrites the warm start
    robot.gripper.current_action = state.gripper.copy()
    for name, value in state.goals.items():
        setattr(robot.controller, name, value.copy())
    robot.controller.new_update = True
    for name, value in state.clock.items():
        setattr(scene, name, value)
    observables = _observables(scene)
    for name, (elapsed, sampled) in state.sampling.items():
        observables[name]._time_since_last_sample, observables[name]._sampled = elapsed, sampled


def _observables(scene: Any) -> dict[str, Any]:
    return dict(scene._observables)


def _fixtures(scene: Any) -> list[int]:
    """Root bodies of LIBERO's fixtures; a tabletop scene has none."""
    return [scene.sim.model.body_name2id(item.root_body) for item in getattr(scene, "fixtures_dict", {}).values()]
