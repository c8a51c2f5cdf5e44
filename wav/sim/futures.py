"""Several futures of one state, executed for real: what a planner's ranking of them is compared with.

:func:`branch_points` runs the scripted expert on an initial state that no demonstration began from and keeps the
simulator's state on the way; :func:`execute` puts a simulator into one of them again and again and executes chunks of
actions from there. Both run in simulator processes (no torch); :func:`branches` and :func:`of_all` run many of them::

    found = branches(data, range(4), count=2, every=5, workers=2)
    segments = of_all(execute, [(data.suite, data, branch, chunks) for branch in found], workers=2)  # chunks (M, A, 7)
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from wav.sim.demonstrations import kept_env, run_expert
from wav.sim.env import Observation
from wav.sim.registry import select_tasks
from wav.sim.restore import SceneState, restore, save
from wav.sim.workers import map_in_processes

if TYPE_CHECKING:
    from wav.config import DataSettings
    from wav.sim.arm import Action

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Branch:
    """A state from which several futures are executed."""

    task: str
    index: int  #: Initial state of the episode.
    step: int  #: Environment steps made since then.
    seen: tuple[Observation, ...]  #: What a policy that is called every few steps has seen, now last.
    state: SceneState
    final: Observation  #: What the expert's episode ended with: the reference of Table 2.


@dataclass(frozen=True)
class Segment:
    """One executed chunk of A actions."""

    seen: tuple[Observation, ...]  #: (A + 1) observations, the branch's own first.
    solved: bool  #: Whether the task's predicate held at some step.


def branch_points(suite: str, data: DataSettings, task: str, index: int, count: int, every: int) -> list[Branch]:
    """States along the expert's episode from initial state ``index``.

    ``count`` states are spread evenly over the policy calls of the episode, which are ``every`` steps apart. Initial
    states 0-49 are evaluation's, which no demonstration begins from.

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


def executed(suite: str, data: DataSettings, branch: Branch, chunks: NDArray[np.float32]) -> Iterator[Segment]:
    """Execute each of ``chunks`` (M, A, 7) from the branch's state, whatever ran in this simulator before.

    One after the other, as they are asked for: all their pictures together may be gigabytes.
    """
    env = kept_env(suite, data)
    env.reset(branch.task, branch.index)
    for chunk in chunks:
        restore(env.scene, branch.state)  # type: ignore[attr-defined]
        seen, solved = [branch.seen[-1]], False
        for action in chunk:
            observation = env.step(action)
            assert observation is not None
            seen.append(observation)
            solved = solved or env.successes()[branch.task]
        yield Segment(tuple(seen), solved)


def execute(suite: str, data: DataSettings, branch: Branch, chunks: NDArray[np.float32]) -> list[Segment]:
    """All of :func:`executed`."""
    return list(executed(suite, data, branch, chunks))


def branches(data: DataSettings, indices: Iterable[int], count: int, every: int, workers: int) -> list[Branch]:
    """:func:`branch_points` of every task of ``data`` and initial state of ``indices``, in ``workers`` processes.

    Where the expert cannot do a task, it is left out and the log says why.
    """
    tasks = [task.name for task in select_tasks(data.suite, data.tasks)]
    jobs = [(data.suite, data, task, index, count, every) for index in indices for task in tasks]
    found: list[Branch] = []
    for number, result in sorted(map_in_processes(branch_points, jobs, workers), key=lambda item: item[0]):
        if isinstance(result, Exception):  # a goal that the expert does not know
            log.warning("%s, initial state %d: left out: %s", *jobs[number][2:4], result)
        else:
            found += result
    return found


def of_all(function: Callable[..., Any], jobs: Sequence[tuple[Any, ...]], workers: int) -> list[Any]:
    """Results of ``function`` for all ``jobs`` in their order, in simulator processes.

    Raises:
        SimulationError: a simulator kept dying; else what a job raised.
    """
    found = dict(map_in_processes(function, jobs, workers))
    for result in found.values():
        if isinstance(result, Exception):
            raise result
    return [found[number] for number in range(len(jobs))]
