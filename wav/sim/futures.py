"""Several futures of one state, executed for real: what a planner's ranking of them is compared with.

:func:`branch_points` runs the scripted expert on an initial state that no demonstration began from and keeps the
simulator's state on the way; :func:`execute` puts a simulator into one of them again and again and executes chunks of
actions from there. Both run in simulator processes (no torch)::

    for branch in branch_points("tabletop", data, "lift_red_cube", 3, count=4, every=5):
        segments = execute("tabletop", data, branch, chunks)     # (M, A, 7)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from wav.sim.demonstrations import kept_env, run_expert
from wav.sim.env import Observation
from wav.sim.restore import SceneState, restore, save

if TYPE_CHECKING:
    from wav.config import DataSettings
    from wav.sim.arm import Action


@dataclass(frozen=True)
class Branch:
    """A state from which several futures are executed."""

    task: str
    index: int
    """Initial state of the episode."""
    step: int
    """Environment steps made since then."""
    seen: tuple[Observation, ...]
    """What a policy that is called every few steps has seen, now last."""
    state: SceneState
    final: Observation
    """What the expert's episode ended with: the reference of Table 2."""


@dataclass(frozen=True)
class Segment:
    """One executed chunk of A actions."""

    seen: tuple[Observation, ...]
    """(A + 1) observations, the branch's own first."""
    solved: bool
    """Whether the task's predicate held at some step."""


def branch_points(suite: str, data: DataSettings, task: str, index: int, count: int, every: int) -> list[Branch]:
    """States along the expert's episode from initial state ``index``.

    Args:
        suite: of ``task``.
        data: views and sizes.
        task: a task of the suite.
        index: initial state; 0-49 are evaluation's, which no demonstration begins from.
        count: states wanted, evenly spread over the policy calls of the episode.
        every: environment steps between two policy calls.

    Returns:
        the branches in order; none where the expert does not solve the task.
    """
    env = kept_env(suite, data)
    kept: list[tuple[int, Observation, SceneState]] = []
    step = 0
    final: Observation | None = None

    def look(observation: Observation, executed: Action, label: Action) -> None:
        nonlocal step, final
        if step % every == 0:
            kept.append((step, observation, save(env.scene)))  # type: ignore[attr-defined]
        step, final = step + 1, observation

    solved, _ = run_expert(env, suite, task, index, on_step=look)
    if not solved or final is None:
        return []
    chosen = np.unique(np.linspace(0, len(kept) - 1, count + 1).round().astype(int)[:-1])
    seen = tuple(observation for _, observation, _ in kept)
    return [Branch(task, index, kept[i][0], seen[: i + 1], kept[i][2], final) for i in chosen]


def execute(suite: str, data: DataSettings, branch: Branch, chunks: NDArray[np.float32]) -> list[Segment]:
    """Execute each of ``chunks`` (M, A, 7) from the branch's state, whatever ran in this simulator before."""
    env = kept_env(suite, data)
    env.reset(branch.task, branch.index)
    segments = []
    for chunk in chunks:
        restore(env.scene, branch.state)  # type: ignore[attr-defined]
        seen, solved = [branch.seen[-1]], False
        for action in chunk:
            observation = env.step(action)
            assert observation is not None
            seen.append(observation)
            solved = solved or env.successes()[branch.task]
        segments.append(Segment(tuple(seen), solved))
    return segments
