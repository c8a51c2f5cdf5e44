"""Where a demonstration of LIBERO's HDF5 begins: a recorded simulator state, and what it does not hold.

LIBERO records time, positions and velocities. What robosuite keeps in Python beside them decides the next steps as
well: the gripper's commanded opening, which each action moves on by a quarter, and the orientation that the arm holds
under actions without rotation. Neither can be read from a file that begins in mid-episode, but the state recorded
after the first action tells both: :func:`begin_recorded` takes the values under which that action leads there.
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from wav.errors import DataError
from wav.sim.restore import SceneState, restore, save

if TYPE_CHECKING:
    from wav.sim.libero.env import LiberoEnv

Pose = tuple[NDArray[np.float64], NDArray[np.float64]]
State = NDArray[np.float64]  #: (1 + nq + nv,): time, positions, velocities.
_SEARCHED = 60  #: Recorded simulator states among which a demonstration's first frame is looked for.
_NEAR = 1e-4  #: Metres within which a state is the one of a frame.
_OPENINGS = np.linspace(-1, 1, 9)
"""What the gripper's command can be at a control step's end: it starts at 0 and an action moves it by 25 x 0.01."""
_TURN = 1e-3  #: Radians by which orientations are varied, to see what they change.
_ROUNDS = 8  #: Corrections of the orientation; six reach 1e-8 from half a radian.


def begin_recorded(
    env: LiberoEnv,
    task: str,
    index: int,
    recorded: tuple[NDArray[np.float64], dict[str, Pose]],
    first: NDArray[np.float32],
    action: NDArray[np.float32],
) -> NDArray[np.float32]:
    """Put ``env`` where a recorded demonstration of ``task`` begins.

    ``index`` draws the fixtures where no model was recorded; ``recorded`` is of :func:`read_recorded`, ``first`` (8,)
    the state of the first frame, ``action`` (7,) the first one executed. Frames may have been dropped or stored after
    their action, so the recorded state nearest to ``first`` is where the episode begins.

    Returns:
        (8,) state as LIBERO would have sampled it.
    """
    states, fixtures = recorded
    env.reset_to(task, states[0], index, settle=False, fixtures=fixtures)
    seen = [_sampled(env, states[0])]
    for state in states[1:_SEARCHED]:
        if np.abs(seen[-1][:3] - first[:3]).max() < _NEAR:
            break
        seen.append(_sampled(env, state))
    best = int(np.argmin([np.abs(state - first)[[0, 1, 2, 6, 7]].max() for state in seen]))
    env.reset_to(task, states[best], index, settle=False, fixtures=fixtures)
    held = save(env.scene)  # at its own orientation, which is what an arm at rest holds
    held = replace(held, goals={**held.goals, "goal_ori": _orientation(env)})
    if best + 1 < len(states):
        held = _fitted(env, held, states[best + 1], action)
    restore(env.scene, held, look=True)
    return seen[best]


def _sampled(env: LiberoEnv, state: State) -> NDArray[np.float32]:
    """(8,) what an observation held at the end of the control step that led to ``state``.

    LIBERO samples it one physics step before that end, and MuJoCo's bodies lag another one behind the joints; its
    integrator moves positions by the velocities it arrives at, so they are found by going back.
    """
    import mujoco  # not before the renderer has been chosen

    sim = env.scene.sim
    model, data = sim.model._model, sim.data._data
    sim.set_state_from_flattened(state)
    mujoco.mj_integratePos(model, data.qpos, data.qvel, -model.opt.timestep)
    fingers = data.qpos.copy()
    mujoco.mj_integratePos(model, data.qpos, data.qvel, -model.opt.timestep)
    mujoco.mj_kinematics(model, data)
    data.qpos[:] = fingers
    return env.state()


def _orientation(env: LiberoEnv) -> NDArray[np.float64]:
    """(3, 3) of the end effector now."""
    robot = env.scene.robots[0]
    return np.array(env.scene.sim.data.site_xmat[robot.eef_site_id]).reshape(3, 3)


def _fitted(env: LiberoEnv, held: SceneState, after: State, action: NDArray[np.float32]) -> SceneState:
    """``held`` with the gripper's opening and the arm's orientation under which ``action`` leads to state ``after``."""

    def missed(trial: SceneState) -> NDArray[np.float64]:
        restore(env.scene, trial)
        env.step(action, render=False)
        difference: NDArray[np.float64] = env.scene.sim.get_state().flatten() - after
        return difference

    robot, places = env.scene.robots[0], 1 + env.scene.sim.model.nq
    fingers = [*(1 + i for i in robot._ref_gripper_joint_pos_indexes)]
    fingers += [places + i for i in robot._ref_gripper_joint_vel_indexes]
    openings = [replace(held, gripper=np.array([-1.0, 1.0]) * opening) for opening in _OPENINGS]
    held = min(openings, key=lambda trial: float(np.abs(missed(trial)[fingers]).max()))
    if np.any(action[3:6]):
        return held  # the orientation follows from the action
    best, error = held, missed(held)
    for _ in range(_ROUNDS):  # Gauss and Newton: what one step changes is nearly linear in the orientation
        columns = [(missed(_turned(best, axis * _TURN)) - error) / _TURN for axis in np.eye(3)]
        rotation: NDArray[np.float64] = np.linalg.lstsq(np.stack(columns, axis=1), -error, rcond=None)[0].astype(float)
        trial = _turned(best, rotation)
        after_it = missed(trial)
        if np.abs(after_it).max() >= np.abs(error).max():
            break
        best, error = trial, after_it
    return best


def _turned(held: SceneState, rotation: NDArray[np.float64]) -> SceneState:
    """``held`` with its orientation turned by a rotation vector (3,)."""
    from robosuite.utils.transform_utils import axisangle2quat, quat2mat

    return replace(held, goals={**held.goals, "goal_ori": quat2mat(axisangle2quat(rotation)) @ held.goals["goal_ori"]})


def read_recorded(path: Path, demo: str) -> tuple[NDArray[np.float64], dict[str, Pose]]:
    """Simulator states (T, width) of one HDF5 demonstration, and body name -> (position, quaternion) of its model.

    Raises:
        DataError: the file, the demonstration or its states are missing.
    """
    import h5py

    try:
        with h5py.File(path, "r") as file:
            group = file["data"][demo]
            states = np.asarray(group["states"][()], dtype=np.float64)
            model = group.attrs.get("model_file", "")
    except (OSError, KeyError) as error:
        raise DataError(
            f"{path}: {demo}: simulator states cannot be read ({error}); replay needs the original file at "
            "ingest.path with its dataset 'states'"
        ) from None
    return states, body_poses(model.decode() if isinstance(model, bytes) else str(model))


def body_poses(model: str) -> dict[str, Pose]:
    """Body name -> (position 3, quaternion 4 as w, x, y, z) of a MuJoCo XML; empty for an empty text.

    Raises:
        DataError: the text is no XML.
    """
    if not model:
        return {}
    try:
        root = ElementTree.fromstring(model)
    except ElementTree.ParseError as error:
        raise DataError(f"model_file: is not XML ({error}); record the demonstration again") from None
    return {
        body.attrib["name"]: (_numbers(body, "pos", "0 0 0"), _numbers(body, "quat", "1 0 0 0"))
        for body in root.iter("body")
        if "name" in body.attrib
    }


def _numbers(element: Any, name: str, default: str) -> NDArray[np.float64]:
    return np.array([float(word) for word in element.get(name, default).split()])
