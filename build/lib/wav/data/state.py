"""The one state encoder shared by simulators, ingest, training and evaluation.

State: end-effector position (m), axis-angle (rad), two gripper joint positions (m). Rotations follow robosuite's
``quat2axisangle``, which maps a quaternion and its antipode to different vectors; a gripper that points down sits at
angle pi, where the two meet. :func:`unwrap_axis_angle` makes an episode's rotations continuous where that matters
(differences and distances in the reward).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

STATE_LAYOUT = "eef_pos(3) axis_angle(3) gripper_qpos(2)"
_FULL_TURN = 2.0 * np.pi


def axis_angle_from_quat(quat_xyzw: ArrayLike) -> NDArray[np.float64]:
    """Axis-angle (..., 3) in rad of unit quaternions (..., 4) ordered x, y, z, w, as robosuite's quat2axisangle."""
    quat = np.asarray(quat_xyzw, dtype=np.float64)
    w = np.clip(quat[..., 3:], -1.0, 1.0)
    denominator = np.sqrt(1.0 - w * w)
    # robosuite's test: math.isclose(denominator, 0) is true for exactly 0 alone
    zero = denominator == 0.0
    return np.where(zero, 0.0, quat[..., :3] * 2.0 * np.arccos(w) / np.where(zero, 1.0, denominator))


def encode_state(eef_pos: ArrayLike, eef_quat_xyzw: ArrayLike, gripper_qpos: ArrayLike) -> NDArray[np.float32]:
    """(..., 8) float32 state of positions (..., 3), quaternions (..., 4) and gripper joints (..., 2)."""
    parts = [np.asarray(eef_pos), axis_angle_from_quat(eef_quat_xyzw), np.asarray(gripper_qpos)]
    return np.concatenate(parts, axis=-1).astype(np.float32)


def unwrap_axis_angle(state: NDArray[np.floating]) -> NDArray[np.floating]:
    """Copy of states (T, 8) whose axis-angles (columns 3:6) never jump by a full turn along the episode.

    Each rotation vector is replaced by the equal rotation (same axis, angle plus a multiple of 2 pi) nearest to the
    previous one; the first stays as it is.
    """
    result = np.array(state)
    previous = result[0, 3:6].astype(np.float64) if len(result) else np.zeros(3)
    for row in result[1:]:
        vector = row[3:6].astype(np.float64)
        angle = float(np.linalg.norm(vector))
        # no rotation has no axis of its own: a full turn about the previous axis is the same rotation
        along = vector if angle > 1e-9 else previous
        length = float(np.linalg.norm(along))
        if length > 1e-9:
            axis = along / length
            vector = vector + axis * _FULL_TURN * np.round((float(previous @ axis) - angle) / _FULL_TURN)
        row[3:6] = previous = vector
    return result
