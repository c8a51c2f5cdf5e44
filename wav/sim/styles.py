"""Styles of scripted demonstrations: the same task done well and less well, so that there is something to choose.

Demonstrations by one expert all look alike, and a planner that searches among futures finds nothing to prefer. A style
wraps an expert (:class:`wav.sim.arm.Expert`) and changes how it moves, never what it does in the end:

    direct    the expert itself
    slow      every motion at most 0.3 of the full speed
    hesitant  pauses of a few steps, again and again
    detour    by way of another place above the scene first
    fumble    the first grasp closes above the object, opens, and is tried again
    recover   begins where the hand has closed beside or on top of the object: it opens, rises, and grasps

The way into a missed grasp is not recorded, so that a policy learns the way out and not the mistake. The model never
sees the style; the episode records it, so that reports can tell the futures apart. Actions stay feedback on the
simulator's state, so they remain correct labels of their style wherever execution noise puts the arm.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wav.seeding import numpy_generator
from wav.sim.arm import Action, Arm, Expert

SLOW = 0.3  #: Largest commanded motion of the slow style, as a share of the action range.
PAUSE_EVERY, PAUSE = 8, (3, 8)  #: Mean steps between pauses of the hesitant style, and the range of their lengths.
ARRIVED, DETOUR_STEPS = 0.03, 20  #: Metres from a detour's place that count as there, and the most steps toward it.
MISS, MISS_STEPS = (0.025, 0.04), 80
"""Range in metres by which a missed grasp is off, sideways or upward, and the most steps before it."""


class Styled:
    """An expert in a style; it is called once per step like the expert that it wraps."""

    def __init__(self, expert: Expert, style: str, rng: np.random.Generator) -> None:
        self._expert, self._actions = expert, STYLES[style](expert, rng)
        self.arm: Arm = expert.arm

    def __call__(self) -> Action:
        """The clean action (7,) of this style for the simulator's current state."""
        return next(self._actions)

    def random_pose(self, rng: np.random.Generator) -> tuple[NDArray[np.float64], float]:
        """As the expert's."""
        return self._expert.random_pose(rng)


def direct(expert: Expert, rng: np.random.Generator) -> Iterator[Action]:
    """The expert itself."""
    while True:
        yield expert()


def slow(expert: Expert, rng: np.random.Generator) -> Iterator[Action]:
    """Every motion limited to :data:`SLOW`; the gripper opens and closes as ever."""
    while True:
        action = expert()
        action[:6] = np.clip(action[:6], -SLOW, SLOW)
        yield action


def hesitant(expert: Expert, rng: np.random.Generator) -> Iterator[Action]:
    """Pauses of :data:`PAUSE` steps after about :data:`PAUSE_EVERY` steps of motion."""
    while True:
        action = expert()
        yield action
        if rng.random() < 1 / PAUSE_EVERY:
            for _ in range(int(rng.integers(*PAUSE))):
                yield _hold(action[6])


def detour(expert: Expert, rng: np.random.Generator) -> Iterator[Action]:
    """First to another place above the scene, with the gripper open."""
    target, yaw = expert.random_pose(rng)
    for _ in range(DETOUR_STEPS):
        if np.linalg.norm(expert.arm.position() - target) < ARRIVED:
            break
        yield expert.arm.toward(target, closed=False, yaw=yaw)
    yield from direct(expert, rng)


def fumble(expert: Expert, rng: np.random.Generator) -> Iterator[Action]:
    """At the first grasp the hand rises, closes on nothing and opens again; then the expert goes on."""
    action = expert()
    while action[6] < 0:
        yield action
        action = expert()
    for rise, gripper, steps in ((0.5, -1.0, 3), (0.0, 1.0, 5), (0.0, -1.0, 4)):
        for _ in range(steps):
            yield _hold(gripper, rise)
    yield from direct(expert, rng)


def miss(expert: Expert, rng: np.random.Generator) -> Iterator[Action]:
    """The way into a missed grasp: what the style ``recover`` begins after, unrecorded."""
    for _ in range(MISS_STEPS):
        action = expert()
        if action[6] > 0:
            break
        yield action
    angle, distance, yaw = rng.uniform(0.0, 2 * np.pi), rng.uniform(*MISS), float(rng.normal(0.0, 0.3))
    off = (0, 0, 1) if rng.random() < 0.3 else (np.cos(angle), np.sin(angle), rng.uniform(0.0, 0.5))
    target = expert.arm.position() + distance * np.array(off)
    for _ in range(3):
        yield expert.arm.toward(target + (0, 0, 0.03), closed=False, yaw=yaw)
    for _ in range(4):
        yield expert.arm.toward(target, closed=False, yaw=yaw)
    for _ in range(int(rng.integers(3, 10))):
        yield expert.arm.toward(target, closed=True, yaw=yaw)


def recover(expert: Expert, rng: np.random.Generator) -> Iterator[Action]:
    """Opens and rises, then the expert."""
    for _ in range(4):
        yield _hold(-1.0, 0.6)
    yield from direct(expert, rng)


def _hold(gripper: float, rise: float = 0.0) -> Action:
    """No motion but ``rise`` (share of the action range), the gripper as told."""
    return np.array([0, 0, rise, 0, 0, 0, gripper], dtype=np.float32)


#: Style name -> actions of an expert in that style.
STYLES = {style.__name__: style for style in (direct, slow, hesitant, detour, fumble, recover)}


def draw_style(shares: Mapping[Any, float], seed: int, task: str, index: int) -> str:
    """The style of a demonstration, drawn by ``shares`` (they need not add up to 1)."""
    names: list[str] = sorted(shares)
    weights = np.array([shares[name] for name in names], dtype=np.float64)
    return names[int(numpy_generator(seed, "style", task, index).choice(len(names), p=weights / weights.sum()))]
