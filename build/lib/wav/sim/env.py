"""The types every simulator speaks and the protocol it keeps; the suites are in :mod:`wav.sim.registry`.

A simulator hosts one scene at a time. ``reset(task, index)`` puts it in the initial state that is a pure function of
(task, index) and returns the first :class:`Observation`; ``step`` takes one 7-D OSC_POSE delta action at 20 Hz.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


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


@dataclass(frozen=True)
class SimReply:
    """Answer of a simulator process to a reset or to a chunk of actions."""

    observation: Observation | None
    """What the policy sees now; None on an error."""
    success: bool = False
    """Success of the task that was reset (the chunk then stopped early)."""
    steps_done: int = 0
    """Environment steps made by this request; 0 for a reset."""
    frames: Sequence[Mapping[str, NDArray[np.uint8]]] = ()
    """view -> (H, W, 3), the reset's or one per step; empty unless recording."""
    successes: Mapping[str, bool] = field(default_factory=dict)
    """Every task of the scene: whether its predicate has held since the reset."""
    error: str | None = None
    """Why the simulator died or stalled; the next reset of the slot starts a fresh one."""
    lost: bool = False
    """The error came with another episode's request to the same process: this episode is not to blame."""
    busy_seconds: float = 0.0
    """What the request took in the simulator's process."""
    render_seconds: float = 0.0
    """The share of it spent on observations: drawing, reading pixels and state."""


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
