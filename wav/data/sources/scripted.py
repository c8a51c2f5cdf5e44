"""Demonstrations by the scripted expert, recorded in simulator processes.

Each task gets the initial states ``first_index``, ``first_index + 1``, ...; failures are rejected with a reason and
replaced by further indices, up to :data:`TRIES_PER_EPISODE` tries per wanted episode. What comes out, and in which
order, is a pure function of the settings whatever the number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from wav.data.conventions import Conventions
from wav.data.episode import Episode
from wav.data.store import Rejection
from wav.errors import DataError, SimulationError
from wav.sim.env import TaskSpec
from wav.sim.registry import select_tasks

if TYPE_CHECKING:
    from wav.config import DataSettings, IngestSettings

Recorder = Callable[..., Episode]
#: (function, jobs, workers) -> (job index, result or exception) in any order
Mapper = Callable[[Recorder, Sequence[tuple[Any, ...]], int], Iterable[tuple[int, "Episode | Exception"]]]

TRIES_PER_EPISODE = 2


def in_order(
    results: Iterable[tuple[int, Episode | Exception]], count: int
) -> Iterator[tuple[int, Episode | Exception]]:
    """Yield (job index, result) in job order, holding back only what came early.

    Raises:
        SimulationError: results end before all ``count`` jobs have one.
    """
    waiting: dict[int, Episode | Exception] = {}
    following = 0
    for index, result in results:
        waiting[index] = result
        while following in waiting:
            yield following, waiting.pop(following)
            following += 1
    if following != count:
        raise SimulationError(f"demonstrations: {count - following} of {count} never came back; run again")


class ScriptedSource:
    """Records demonstrations of every task of ``data.tasks`` (all of the suite for none).

    Args:
        data: suite, tasks, cameras.
        settings: number, noise, detours, seed.
        record: records one demonstration; by default :func:`wav.sim.demonstrations.record_demonstration`.
        run: runs it over jobs; by default :func:`wav.sim.workers.map_in_processes`.
    """

    def __init__(
        self, data: DataSettings, settings: IngestSettings, record: Recorder | None = None, run: Mapper | None = None
    ) -> None:
        self.data, self.settings = data, settings
        self.tasks: tuple[TaskSpec, ...] = select_tasks(data.suite, tuple(data.tasks))
        self._record, self._run = record, run
        self._accepted = False

    def conventions(self) -> Conventions:
        """What the simulator records."""
        return Conventions.for_simulator(self.data)

    def expected(self) -> int:
        """Episodes wanted over all tasks."""
        return self.settings.episodes_per_task * len(self.tasks)

    def outcomes(self, workers: int) -> Iterator[Episode | Rejection]:
        """Task by task the first tries in index order, then further tries for the tasks that came short.

        Raises:
            DataError: a task has too few successes after all tries; names it and its last rejection.
            SimulationError: no simulator works (a later, single failure is a rejection).
        """
        wanted = self.settings.episodes_per_task
        missing = {task.name: wanted for task in self.tasks}
        tried = dict.fromkeys(missing, 0)
        last: dict[str, str] = {}
        while any(missing.values()):
            jobs: list[tuple[str, int]] = []
            for task, count in missing.items():
                more = min(count, TRIES_PER_EPISODE * wanted - tried[task])
                if count and not more:
                    raise DataError(
                        f"ingest: task {task!r} gave {wanted - count} of {wanted} episodes in {tried[task]} tries "
                        f"(last rejection: {last[task]}); lower ingest.noise or ingest.episodes_per_task, "
                        "or repair the expert"
                    )
                jobs += [(task, self.settings.first_index + tried[task] + i) for i in range(more)]
                tried[task] += more
            for outcome in self._round(jobs, workers):
                if isinstance(outcome, Rejection):
                    last[outcome.task] = outcome.reason
                else:
                    missing[outcome.task] -= 1
                yield outcome

    def _round(self, jobs: list[tuple[str, int]], workers: int) -> Iterator[Episode | Rejection]:
        """Record the demonstrations of (task, initial state) jobs, in job order."""
        record, run = self._functions()
        settings = self.settings
        how = (self.data, settings.noise, settings.detour, settings.seed)
        arguments = [(self.data.suite, task, index, *how, self._style(task, index)) for task, index in jobs]
        for number, result in in_order(run(record, arguments, workers), len(jobs)):
            task, index = jobs[number]
            yield self._judge(task, index, result)

    def _style(self, task: str, index: int) -> str:
        """How the expert moves in a demonstration."""
        from wav.sim.styles import draw_style

        return draw_style(self.settings.styles, self.settings.seed, task, index)

    def _judge(self, task: str, index: int, result: Episode | Exception) -> Episode | Rejection:
        """Accept an episode or say why not; errors that are no episode's fault are raised."""
        if isinstance(result, Episode):
            reason = self._fault(result)
            if not reason:
                self._accepted = True
                return result
            return Rejection(result.episode_id, task, reason)
        # a simulator that fails before any has worked is a missing renderer or the like, not a bad episode
        if isinstance(result, DataError) or (isinstance(result, SimulationError) and self._accepted):
            return Rejection(f"{self.data.suite}/{task}/{index:05d}", task, f"{type(result).__name__}: {result}")
        raise result

    def _fault(self, episode: Episode) -> str:
        """Why an episode is not fit for training; empty where it is."""
        try:
            episode.validate()
        except DataError as error:
            return str(error)
        if not episode.success:
            return f"the expert did not reach the task's goal in {episode.length} steps"
        if episode.length < self.settings.min_length:
            return f"{episode.length} frames, fewer than ingest.min_length = {self.settings.min_length}"
        return ""

    def _functions(self) -> tuple[Recorder, Mapper]:
        """Recorder and mapper; the simulator is imported only here."""
        record, run = self._record, self._run
        if record is None:
            from wav.sim.demonstrations import record_demonstration

            record = record_demonstration
        if run is None:
            from wav.sim.workers import map_in_processes

            run = map_in_processes
        return record, run
