"""The protocol every simulator keeps, and the registry of task suites.

A simulator hosts one scene at a time. ``reset(task, index)`` puts it in the initial state that is a pure function of
(task, index) and returns the first :class:`Observation`; ``step`` takes one 7-D OSC_POSE delta action at 20 Hz.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from wav.errors import ConfigError

if TYPE_CHECKING:
    from wav.config import DataSettings

LIBERO_SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90")
SUITES = ("tabletop", *LIBERO_SUITES)
"""Suites with a simulator."""


@dataclass(frozen=True)
class TaskSpec:
    """One task of a suite."""

    name: str
    instruction: str
    scene: str
    """Tasks of one scene share their initial states: only the instruction tells them apart."""
    max_steps: int
    """Environment steps an evaluation episode may take."""


@dataclass(frozen=True)
class Observation:
    """What the policy sees at one step."""

    images: Mapping[str, NDArray[np.uint8]]
    """view -> (H, W, 3) uint8, in the convention the data records (raw OpenGL buffer rotated by 180 degrees)."""
    state: NDArray[np.float32]
    """(8,): end-effector position 3 (m), axis-angle 3 (rad), gripper joint positions 2 (m)."""
    instruction: str
    joints: NDArray[np.float32] | None = None
    """(8,): seven joint angles (rad) and the gripper opening (m), where the simulator has them."""


class SimEnv(Protocol):
    """A simulator of one suite."""

    def reset(self, task: str, index: int) -> Observation:
        """Put the scene of ``task`` into initial state ``index`` and return the first observation."""
        ...

    def step(self, action: NDArray[np.float32], render: bool = True) -> Observation | None:
        """Advance 1/20 s under ``action`` (7,); the observation, or None with ``render=False``."""
        ...

    def observe(self) -> Observation:
        """Render and read the state now."""
        ...

    def successes(self) -> dict[str, bool]:
        """Success predicate of every task that shares the current scene."""
        ...

    def close(self) -> None:
        """Free the renderer and the simulation."""
        ...


def task_specs(suite: str) -> dict[str, TaskSpec]:
    """Tasks of ``suite`` by name; raises ConfigError for an unknown suite."""
    if suite == "tabletop":
        from wav.sim.tabletop.tasks import TASKS

        return dict(TASKS)
    if suite in LIBERO_SUITES:
        from wav.sim.libero import tasks as libero_tasks

        return libero_tasks.task_specs(suite)
    raise _unknown(suite)


def has_simulator(suite: str) -> bool:
    """Whether ``suite`` can be simulated; False for the dataset of a robot that nobody simulates here.

    Raises:
        ConfigError: the name is nearly that of a suite with a simulator.
    """
    if suite in SUITES:
        return True
    if difflib.get_close_matches(suite, SUITES, n=1):
        raise _unknown(suite)
    return False


def _unknown(suite: str) -> ConfigError:
    near = difflib.get_close_matches(suite, SUITES, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else f"; the suites are {', '.join(SUITES)}"
    return ConfigError(f"data.suite = {suite!r}: unknown suite{hint}")


def select_tasks(suite: str, names: tuple[str, ...]) -> tuple[TaskSpec, ...]:
    """The named tasks of ``suite`` (all of them for an empty tuple); raises ConfigError with the nearest known name."""
    specs = task_specs(suite)
    for name in names:
        if name not in specs:
            near = difflib.get_close_matches(name, specs, n=1, cutoff=0.0)[0]
            raise ConfigError(f"data.tasks: {name!r} is no task of suite {suite!r}; did you mean {near!r}?")
    return tuple(specs[name] for name in (names or specs))


def make_env(suite: str, data: DataSettings) -> SimEnv:
    """Create a simulator of ``suite`` rendering as ``data`` says (image size, views, render mode)."""
    if suite == "tabletop":
        from wav.sim.tabletop.env import TabletopEnv

        return TabletopEnv(data)
    if suite in LIBERO_SUITES:
        from wav.sim.libero.env import LiberoEnv

        return LiberoEnv(data.model_copy(update={"suite": suite}))
    raise _unknown(suite)


def simulator_versions(suite: str = "tabletop") -> dict[str, str]:
    """What decides physics and pixels of ``suite``, recorded with data and evaluations: versions, LIBERO's assets.

    Raises:
        ServiceError: a LIBERO suite, and LIBERO is not ready here (:func:`wav.sim.libero.assets.bootstrap`).
    """
    from importlib.metadata import version

    if suite in LIBERO_SUITES:
        from wav.sim.libero import assets as libero_assets

        return libero_assets.simulator_versions()
    return {name: version(name) for name in ("mujoco", "robosuite")}
