"""Proportional control of a Panda whose gripper points down: the actions every scripted expert is made of."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Action = NDArray[np.float32]

POSITION_SCALE = 0.05  #: Metres of commanded displacement per unit of action (robosuite's OSC_POSE default).
ROTATION_SCALE = 0.5  #: Radians of commanded rotation per unit of action.
DOWN = np.array([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, -1.0]])
"""Orientation of the gripper site when it points down with its fingers along y."""


class Arm:
    """The first robot of a robosuite scene, steered by its gripper site.

    Yaws are equal modulo ``turn`` (rad), and the nearest one is taken: pi is the gripper's own symmetry, half of it
    that of things as wide as they are long. ``gain``: commanded displacement per distance to the target; 1 lags behind
    a target that moves.
    """

    def __init__(self, scene: Any, turn: float, gain: float = 1.0) -> None:
        self._data, self._site = scene.sim.data, scene.robots[0].eef_site_id
        self._turn, self._gain = turn, gain

    def position(self) -> NDArray[np.float64]:
        """(3,) of the gripper site (m)."""
        return np.array(self._data.site_xpos[self._site])

    def toward(
        self,
        target: NDArray[np.float64],
        closed: bool,
        yaw: float = 0.0,
        speed: float = 1.0,
        frame: NDArray[np.float64] | None = None,
    ) -> Action:
        """Proportional action toward a position (m) with the gripper pointing down and turned by ``yaw`` (rad).

        ``frame`` (3, 3) is another orientation to take instead (:func:`pointing`).
        """
        error = self.rotation_error(yaw) if frame is None else self.rotation_to(frame)
        action = np.zeros(7)
        action[:3] = np.clip(self._gain * (target - self.position()) / POSITION_SCALE, -speed, speed)
        action[3:6] = np.clip(self._gain * error / ROTATION_SCALE, -0.5, 0.5)
        action[6] = 1.0 if closed else -1.0
        return action.astype(np.float32)

    def rotation_error(self, yaw: float) -> NDArray[np.float64]:
        """World-frame rotation vector (rad) from the gripper's orientation to pointing down at ``yaw``."""
        half = self._turn / 2
        yaw = (yaw + half) % self._turn - half
        c, s = np.cos(yaw), np.sin(yaw)
        return self.rotation_to(np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ DOWN)

    def likeness(self, frame: NDArray[np.float64]) -> float:
        """How near the gripper's orientation is to another: 1 + 2 cos of the angle between them, 3 at best."""
        now = np.asarray(self._data.site_xmat[self._site]).reshape(3, 3)
        return float((now * frame).sum())

    def rotation_to(self, frame: NDArray[np.float64]) -> NDArray[np.float64]:
        """World-frame rotation vector (sine of the angle, for small ones rad) to another orientation (3, 3)."""
        now = np.asarray(self._data.site_xmat[self._site]).reshape(3, 3)
        return 0.5 * sum((np.cross(now[:, k], frame[:, k]) for k in range(3)), np.zeros(3))


def pointing(approach: NDArray[np.float64], closing: NDArray[np.float64]) -> NDArray[np.float64]:
    """Orientation (3, 3) of the gripper site for unit vectors along which it points and along which it closes."""
    return np.column_stack([closing, np.cross(approach, closing), approach])


class Expert(Protocol):
    """A suite's scripted expert for one episode (:func:`wav.sim.registry.make_expert`)."""

    arm: Arm

    def __call__(self) -> Action:
        """The clean action (7,) for the simulator's current state."""
        ...

    def random_pose(self, rng: np.random.Generator) -> tuple[NDArray[np.float64], float]:
        """Somewhere above the scene for the arm to start from: (x, y, z) in m and a yaw in rad."""
        ...
