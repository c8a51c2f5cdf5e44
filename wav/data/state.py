"""The one state encoder shared by simulators, ingest and evaluation."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

STATE_LAYOUT = "eef_pos(3) axis_angle(3) gripper_qpos(2)"


def axis_angle_from_quat(quat_xyzw: ArrayLike) -> NDArray[np.float64]:
    """Axis-angle (rad) of a unit quaternion (x, y, z, w), as robosuite's quat2axisangle."""
    quat = np.array(quat_xyzw, dtype=np.float64)
    w = min(1.0, max(-1.0, float(quat[3])))
    denominator = math.sqrt(1.0 - w * w)
    if math.isclose(denominator, 0.0):
        return np.zeros(3)
    return quat[:3] * 2.0 * math.acos(w) / denominator


def encode_state(eef_pos: ArrayLike, eef_quat_xyzw: ArrayLike, gripper_qpos: ArrayLike) -> NDArray[np.float32]:
    """(8,) float32: end-effector position (m), axis-angle (rad), gripper joint positions (m)."""
    return np.concatenate([np.asarray(eef_pos), axis_angle_from_quat(eef_quat_xyzw), np.asarray(gripper_qpos)]).astype(
        np.float32
    )
