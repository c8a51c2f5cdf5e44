"""Where demonstrations of LIBERO's HDF5 begin, and how exactly they are replayed from there."""

from __future__ import annotations

import h5py
import numpy as np
import pytest

from tests.helpers.libero import needs_assets
from tests.sim.libero.conftest import SPATIAL
from wav.errors import DataError
from wav.sim.recorded import body_poses
from wav.sim.registry import task_specs
from wav.sim.replay import ReplayStart, replay_episode


@needs_assets
def test_a_recorded_demonstration_is_replayed_from_its_simulator_states(env, tmp_path):
    """LIBERO's HDF5 layout: states and model_file say where it began, and the next state what robosuite held there.

    The gripper closes from the fourth action on; the last ones have no rotation and keep the arm's from before.
    """
    task, rng = next(iter(task_specs("libero_spatial"))), np.random.default_rng(5)
    seen, actions, states = [env.reset(task, 1003)], [], []
    for step in range(12):
        rotation = rng.uniform(-1, 1, 3) if step < 5 else np.zeros(3)
        actions.append(np.array([*rng.uniform(-1, 1, 3), *rotation, 1 if step > 2 else -1], np.float32))
        states.append(env.scene.sim.get_state().flatten())
        seen.append(env.step(actions[-1]))
    for first, whole in ((0, True), (5, True), (7, False)):  # frames dropped, or the file cut as well
        path = tmp_path / f"{first}.hdf5"
        with h5py.File(path, "w") as file:
            demo = file.create_group("data/demo_0")
            demo["states"] = np.stack(states if whole else states[first:])
            demo.attrs["model_file"] = env.scene.sim.model.get_xml()
        start = ReplayStart("one", task, -1, -1, 0.0, 0, str(path), "demo_0")
        executed, frames = np.stack(actions[first:]), np.stack([o.state for o in seen[first:-1]])
        outcome = replay_episode(SPATIAL, start, executed, frames)
        assert outcome.steps == 12 - first
        assert outcome.position_error < 1e-4
        assert outcome.rotation_error < 1e-3
        assert outcome.gripper_error < 1e-5
    with h5py.File(path, "a") as file:
        del file["data/demo_0/states"]
    with pytest.raises(DataError, match="states"):
        replay_episode(SPATIAL, start, executed, frames)


def test_body_poses_are_read_from_a_model():
    xml = '<mujoco><worldbody><body name="a" pos="1 2 3"><body name="b" quat="0 1 0 0"/></body></worldbody></mujoco>'
    poses = body_poses(xml)
    np.testing.assert_array_equal(poses["a"][0], (1, 2, 3))
    np.testing.assert_array_equal(poses["b"][1], (0, 1, 0, 0))
    with pytest.raises(DataError, match="not XML"):
        body_poses("<mujoco>")
