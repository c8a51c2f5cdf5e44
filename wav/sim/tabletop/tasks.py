"""The tabletop suite's tasks, scenes and initial states, as data: no simulator is imported here.

Initial states are a pure function of (scene, index): tasks of one scene share them, so the same pictures come with
different instructions. Indices 0-49 are evaluation's, 1000 and up are for demonstrations.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wav.errors import ConfigError
from wav.seeding import numpy_generator
from wav.sim.env import TaskSpec

TABLE_HEIGHT = 0.8  #: World z of the table top in metres; the table's centre is x = y = 0, the robot looks along +x.

CUBE_HALF = 0.025  #: Half the edge of a cube in metres.

BIN_CENTER = (0.02, 0.17)
BIN_HALF = (0.08, 0.08)
BIN_WALL = 0.05  #: Height of the bin's walls in metres.

SCENES: dict[str, tuple[str, ...]] = {
    "two_cubes": ("red_cube", "green_cube"),
    "bin": ("can", "milk", "bread"),
}

TASKS: dict[str, TaskSpec] = {
    spec.name: spec
    for spec in (
        TaskSpec("lift_red_cube", "lift the red cube", "two_cubes", 120),
        TaskSpec("lift_green_cube", "lift the green cube", "two_cubes", 120),
        TaskSpec("put_can_in_bin", "put the can in the bin", "bin", 200),
        TaskSpec("stack_red_on_green", "stack the red cube on the green cube", "two_cubes", 200),
        TaskSpec("put_milk_and_bread_in_bin", "put the milk and the bread in the bin", "bin", 400),
    )
}

GOALS: dict[str, tuple[str, tuple[str, ...]]] = {
    "lift_red_cube": ("lift", ("red_cube",)),
    "lift_green_cube": ("lift", ("green_cube",)),
    "put_can_in_bin": ("bin", ("can",)),
    "stack_red_on_green": ("stack", ("red_cube", "green_cube")),
    "put_milk_and_bread_in_bin": ("bin", ("milk", "bread")),
}
"""Task -> what is to be done, and with which objects."""


@dataclass(frozen=True)
class Placement:
    """Where one object starts: position in metres on the table, yaw in radians."""

    x: float
    y: float
    yaw: float


@dataclass(frozen=True)
class InitialState:
    """Initial state of a scene: object placements and a small offset of the arm's seven joints (rad)."""

    placements: dict[str, Placement]
    joint_offset: NDArray[np.float64]


def initial_state(task: str, index: int) -> InitialState:
    """Initial state ``index`` of ``task``: a pure function of (the task's scene, index).

    Raises:
        ConfigError: the index is below 0.
    """
    if index < 0:
        raise ConfigError(f"initial state index = {index}: must be 0 or more (0-49 evaluation, 1000+ demonstrations)")
    scene = TASKS[task].scene
    rng = numpy_generator(0, "tabletop.initial_state", scene, index)
    placements = _two_cubes(rng) if scene == "two_cubes" else _bin(rng)
    return InitialState(placements, rng.normal(0.0, 0.01, size=7))


def _two_cubes(rng: np.random.Generator) -> dict[str, Placement]:
    """One cube on each side of the centre line, colours on random sides, 2.5 cm of jitter."""
    sides = rng.permutation([-1.0, 1.0])
    return {
        name: Placement(
            float(rng.uniform(-0.025, 0.025)),
            float(side * 0.10 + rng.uniform(-0.025, 0.025)),
            float(rng.uniform(-0.2, 0.2)),
        )
        for name, side in zip(SCENES["two_cubes"], sides, strict=True)
    }


def _bin(rng: np.random.Generator) -> dict[str, Placement]:
    """Can, milk and bread on three sites in random order, 1.5 cm of jitter; the bin stands still."""
    sites = np.array([(-0.10, -0.16), (0.06, -0.13), (-0.06, -0.01)])[rng.permutation(3)]
    return {
        name: Placement(
            float(site[0] + rng.uniform(-0.015, 0.015)),
            float(site[1] + rng.uniform(-0.015, 0.015)),
            float(rng.uniform(-0.1, 0.1)),
        )
        for name, site in zip(SCENES["bin"], sites, strict=True)
    }
