"""The state encoder."""

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from wav.data.state import axis_angle_from_quat, encode_state, unwrap_axis_angle


def test_axis_angle_is_robosuites():
    from robosuite.utils.transform_utils import quat2axisangle

    quats = np.random.default_rng(0).normal(size=(50, 4))
    quats /= np.linalg.norm(quats, axis=1, keepdims=True)
    quats = np.concatenate([quats, -quats, [[0, 0, 0, 1], [0, 0, 0, -1], [1, 0, 0, 0], [0, 0, 0, 1.0000001]]])
    expected = np.array([quat2axisangle(q.copy()) for q in quats])
    np.testing.assert_allclose(axis_angle_from_quat(quats), expected, rtol=1e-14)
    np.testing.assert_allclose(axis_angle_from_quat(quats[0]), expected[0], rtol=1e-14)


def test_layout():
    state = encode_state([1, 2, 3], [np.sin(0.25), 0, 0, np.cos(0.25)], [0.04, -0.04])
    assert state.dtype == np.float32
    np.testing.assert_allclose(state, [1, 2, 3, 0.5, 0, 0, 0.04, -0.04], atol=1e-6)


@pytest.mark.parametrize("canonical", [True, False], ids=["shortest rotations", "no rotation on the way"])
def test_unwrap_keeps_rotations_and_removes_jumps(canonical):
    """A gripper swaying about angle pi, in the shortest form, flips sign; or turning through no rotation at all."""
    t = np.linspace(0, 1, 80)
    if canonical:
        sway = Rotation.from_euler("yz", np.stack([0.1 * np.sin(20 * t), 0.2 * np.cos(15 * t)], 1))
        vectors = (sway * Rotation.from_euler("x", np.pi)).as_rotvec()
    else:
        vectors = np.array([1.0, 0, 0]) * np.mod(np.linspace(-2.0, 2.0, 81), 2 * np.pi)[:, None]
    state = np.zeros((len(vectors), 8), np.float32)
    state[:, 3:6] = vectors
    state[:, 0] = 7
    assert np.linalg.norm(np.diff(state[:, 3:6], axis=0), axis=1).max() > 3
    before = state.copy()
    result = unwrap_axis_angle(state)
    np.testing.assert_array_equal(state, before)
    assert result.dtype == np.float32
    assert np.linalg.norm(np.diff(result[:, 3:6], axis=0), axis=1).max() < 0.5
    np.testing.assert_allclose(
        Rotation.from_rotvec(result[:, 3:6]).as_matrix(), Rotation.from_rotvec(vectors).as_matrix(), atol=1e-5
    )
    np.testing.assert_array_equal(result[0], state[0])
    np.testing.assert_array_equal(result[:, [0, 6, 7]], state[:, [0, 6, 7]])


def test_unwrap_leaves_smooth_episodes_alone():
    state = np.zeros((10, 8), np.float32)
    state[:, 3] = np.linspace(0, 1, 10)
    np.testing.assert_allclose(unwrap_axis_angle(state), state, atol=1e-7)
