"""Where a parallel gripper that points down can take an object, and how low things can be put: pure geometry.

Solids are clouds of points on their collision boxes, so nothing here knows an object by name. A grasp is a yaw, a
height and a run of the object's points that fits between the fingers: a whole can, the narrow side of a carton, or one
side of a bowl's rim all come out of the same rule. Heights come from a height map of everything around.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float64]  #: (n, 3), metres, world frame unless said otherwise.

SPACING = 0.005  #: Metres between the points of a cloud, twice that on large faces.
CELL = 0.01  #: Metres of one cell of a height map: solids grow by up to as much.
HUGE = 0.45  #: Half-length (m) from which a box counts as table, floor or wall and not as an obstacle.
FINGER_TIP = 0.0095  #: Metres the fingertips reach below the grip site.
HAND_BOTTOM = 0.030  #: Metres the hand's lower side lies above the grip site: nothing held may reach higher.
HAND_HALF = (0.021, 0.104)  #: Half-width and half-length (m) of the hand's lower part; it closes along its length.
WRIST = (0.065, 0.034)  #: Metres above the grip site from which the hand is wider, and its half-width (m) there.
FINGER_HALF = 0.0105  #: Half-width (m) of a finger across the closing direction.
FINGER_DEPTH, FINGER_TIP_DEPTH = 0.027, 0.015  #: Metres a finger, and its tip, take up along the closing direction.
PAD = 0.008  #: Half-height and half-width (m) of a finger's pad.
OPENING = 0.0385  #: Metres from the grip site to either pad when open.
MAX_WIDTH = 0.068  #: Widest run (m) that is grasped, a few millimetres less than the opening.
FLAT = 0.03  #: Metres of height up to which a thing is grasped by its upper edge only: a plate's rim.
YAWS = np.deg2rad(np.arange(-90, 90, 10))


@dataclass(frozen=True)
class Grasp:
    """A pose of the open gripper around part of an object."""

    position: NDArray[np.float64]  #: (3,) of the grip site (m).
    yaw: float  #: Of the gripper about the vertical (rad), equal modulo pi; 0 closes along y.
    width: float  #: Of what lies between the fingers (m).
    cost: float


def axes(yaw: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Unit vectors (2,) across and along the closing direction."""
    c, s = np.cos(yaw), np.sin(yaw)
    return np.array([c, s]), np.array([-s, c])


def box_points(center: Points, half: Points) -> Points:
    """Points on the faces of an axis-aligned box, at most :data:`SPACING` apart (twice that along long sides)."""
    steps = [SPACING if h < 0.03 else 2 * SPACING for h in half]
    grids = [np.linspace(-h, h, max(2, int(np.ceil(2 * h / step)) + 1)) for h, step in zip(half, steps, strict=True)]
    faces = []
    for axis in range(3):
        first, second = (k for k in range(3) if k != axis)
        a, b = np.meshgrid(grids[first], grids[second], indexing="ij")
        for side in (-1, 1):
            face = np.empty((a.size, 3))
            face[:, first], face[:, second], face[:, axis] = a.ravel(), b.ravel(), side * half[axis]
            faces.append(face)
    return np.concatenate(faces) + center


class Solids:
    """Clouds of the collision geometry of a MuJoCo simulation; the robot is left out.

    A body is named by its number: a top-level body stands for all that hangs on it, any other for itself alone.
    """

    def __init__(self, sim: Any) -> None:
        self._data = sim.data._data
        model = sim.model._model
        self._geoms: list[tuple[int, set[int], Points]] = []
        for geom in range(model.ngeom):
            solid = (model.geom_contype[geom] or model.geom_conaffinity[geom]) and model.geom_group[geom] == 0
            body = int(model.geom_bodyid[geom])
            root = int(model.body_rootid[body])
            robot = str(model.body(root).name).startswith(("robot", "gripper", "mount"))
            center, half = model.geom_aabb[geom, :3], model.geom_aabb[geom, 3:]
            if solid and not robot and (half < HUGE).all():
                self._geoms.append((geom, {body, root}, box_points(center, half)))

    def cloud(self, body: int) -> Points:
        """All points of ``body`` where it is now."""
        return self._placed(points for points in self._geoms if body in points[1])

    def others(self, body: int, center: NDArray[np.float64], radius: float = 0.5) -> Points:
        """Points of every other body within ``radius`` (m) of ``center`` (x, y)."""
        cloud = self._placed(points for points in self._geoms if body not in points[1])
        return cloud[(np.abs(cloud[:, :2] - center[:2]) < radius).all(axis=1)]

    def _placed(self, geoms: Iterable[tuple[int, set[int], Points]]) -> Points:
        placed = [np.empty((0, 3))]
        for geom, _, points in geoms:
            placed.append(points @ self._data.geom_xmat[geom].reshape(3, 3).T + self._data.geom_xpos[geom])
        return np.concatenate(placed)


def grasps(
    target: Points, others: Points, floor: float, extra: Callable[[Grasp], float] = lambda _: 0.0
) -> Iterator[Grasp]:
    """Grasps of ``target`` from above that touch nothing else, cheapest first; found as they are asked for.

    ``floor`` is the height (m) that the fingertips stay above, ``extra`` a cost added to a grasp's own.
    """
    top, bottom = target[:, 2].max(), max(target[:, 2].min(), floor)
    middle = (target.min(axis=0) + target.max(axis=0)) / 2
    lowest, highest = bottom + FINGER_TIP + 0.002, top - 0.004
    depths = (0.012, 0.02, 0.027) if top - bottom > FLAT else (0.004, 0.008, 0.012)
    heights = np.unique(np.clip(top - np.array(depths), lowest, max(lowest, highest)))
    found = [grasp for yaw in YAWS for height in heights for grasp in _at(target, middle, float(yaw), float(height))]
    found.sort(key=lambda grasp: grasp.cost + extra(grasp))
    reach = float(np.ptp(target[:, :2], axis=0).max()) / 2 + HAND_HALF[1] + 0.02
    near = others[(np.abs(others[:, :2] - middle[:2]).max(axis=1) < reach) & (others[:, 2] > bottom - 0.02)]
    return (grasp for grasp in found if _free(grasp, target, near))


def _at(target: Points, middle: Points, yaw: float, height: float) -> list[Grasp]:
    """Grasps at one yaw and height, over a few places across the closing direction."""
    across, along = axes(yaw)
    p, c = (target[:, :2] - middle[:2]) @ across, (target[:, :2] - middle[:2]) @ along
    level = np.abs(target[:, 2] - height) < PAD
    reach = float(np.abs(p).max())
    found: list[Grasp] = []
    for offset in np.unique(np.clip((0.0, -0.015, 0.015, -0.03, 0.03), -reach, reach)):
        row = np.sort(c[level & (np.abs(p - offset) < PAD)])
        if not len(row):
            continue
        breaks = np.flatnonzero(np.diff(row) > 2 * SPACING + 1e-6)
        starts, ends = np.r_[row[0], row[breaks + 1]], np.r_[row[breaks], row[-1]]
        for first in range(len(starts)):
            for last in range(first, len(starts)):
                width = ends[last] - starts[first]
                if width > MAX_WIDTH:
                    break
                center = (starts[first] + ends[last]) / 2
                xy = middle[:2] + offset * across + center * along
                cost = 8 * abs(offset) + 3 * abs(center) + 0.15 * abs(yaw) + 5 * max(0.0, width - 0.06)
                cost += 2.0 * abs(target[:, 2].max() - 0.02 - height)
                found.append(Grasp(np.array([*xy, height]), yaw, float(width), float(cost)))
    return found


def _free(grasp: Grasp, target: Points, others: Points) -> bool:
    """Whether the open gripper can come straight down to ``grasp``."""
    across, along = axes(grasp.yaw)
    for cloud, margin in ((target, 0.001), (others, 0.004)):
        offset = cloud - grasp.position
        p, c, z = np.abs(offset[:, :2] @ across), np.abs(offset[:, :2] @ along), offset[:, 2]
        half = np.where(z > WRIST[0], WRIST[1], HAND_HALF[0])
        hand = (p < half + margin) & (c < HAND_HALF[1] + margin) & (z > HAND_BOTTOM - margin)
        thick = np.where(z > 0.004, FINGER_DEPTH, FINGER_TIP_DEPTH)
        finger = (p < FINGER_HALF + margin) & (c > OPENING - margin) & (c < OPENING + thick + margin)
        finger &= z > -FINGER_TIP - margin
        between = (p < FINGER_HALF) & (c <= OPENING) & (z > -FINGER_TIP) & (z < HAND_BOTTOM)
        if hand.any() or finger.any() or (cloud is others and between.any()):
            return False
    return True


def gripper_points(yaw: float, opening: float = OPENING) -> Points:
    """The lower side of the gripper relative to the grip site, its pads ``opening`` (m) from the middle."""
    across, along = axes(yaw)
    parts = []
    for half, low, high, z in (
        (HAND_HALF[0], -HAND_HALF[1], HAND_HALF[1], HAND_BOTTOM),
        (WRIST[1], -HAND_HALF[1], HAND_HALF[1], WRIST[0]),
        (FINGER_HALF, opening, opening + FINGER_DEPTH, -FINGER_TIP),
        (FINGER_HALF, -opening - FINGER_DEPTH, -opening, -FINGER_TIP),
    ):
        p, c = np.meshgrid(np.arange(-half, half + 1e-9, CELL / 2), np.arange(low, high + 1e-9, CELL / 2))
        xy = p.reshape(-1, 1) * across + c.reshape(-1, 1) * along
        parts.append(np.column_stack([xy, np.full(len(xy), z)]))
    return np.concatenate(parts)


class HeightMap:
    """Highest point of a cloud in every cell of a square around ``center`` (x, y)."""

    def __init__(
        self, cloud: Points, center: NDArray[np.float64], floor: float, radius: float = 0.5, cell: float = CELL
    ) -> None:
        self._low, self._cell = np.asarray(center[:2]) - radius, cell
        self._size = int(np.ceil(2 * radius / cell)) + 1
        self._heights = np.full((self._size, self._size), floor)
        cells = self._cells(cloud)
        np.maximum.at(self._heights, (cells[:, 0], cells[:, 1]), cloud[:, 2])

    def _cells(self, points: Points) -> NDArray[np.int64]:
        cells = np.floor((points[:, :2] - self._low) / self._cell).astype(np.int64)
        return np.clip(cells, 0, self._size - 1)

    def clearance(self, shape: Points, place: NDArray[np.float64]) -> float:
        """Lowest height (m) of the origin of ``shape`` (points around it) at ``place`` (x, y) that touches nothing."""
        cells = self._cells(shape + np.array([place[0], place[1], 0.0]))
        return float((self._heights[cells[:, 0], cells[:, 1]] - shape[:, 2]).max())

    def path_clearance(self, shape: Points, start: NDArray[np.float64], end: NDArray[np.float64]) -> float:
        """:meth:`clearance` along a straight line from ``start`` to ``end`` (x, y)."""
        count = max(2, int(np.linalg.norm(end[:2] - start[:2]) / 0.02) + 1)
        line = np.linspace(start[:2], end[:2], count)
        return max(self.clearance(shape, place) for place in line)
