"""Demonstrations by the scripted expert, recorded in simulator processes.

Each task gets the initial states ``first_index``, ``first_index + 1``, ...; failures are rejected with a reason and
replaced by further indices, up to :data:`TRIES_PER_EPISODE` tries per wanted episode. What comes out, and in which
order, is a pure function of the settings whatever the number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from wav.config import DataSettings, IngestSettings
from wav.data.conventions import Conventions
from wav.data.episode import Episode
from wav.data.names import full_name
from wav.data.sources.staging import judged, stage, staged
from wav.data.store import EpisodeStore, Rejection
from wav.errors import DataError, SimulationError
from wav.io.files import canonical_digest
from wav.shards import Mapper, in_order, made
from wav.sim.env import TaskSpec
from wav.sim.registry import select_tasks
from wav.source_code import library_versions, module_digests

Recorder = Callable[..., Episode]

TRIES_PER_EPISODE = 2


def kept(run: Mapper, staging: Path, conventions: Conventions) -> Mapper:
    """``run`` for a recorder, whose demonstrations are kept in ``staging``, so that none is recorded twice.

    A recorder's arguments are settings, texts and numbers.
    """

    def mapped(record: Recorder, jobs: Sequence[tuple[Any, ...]], workers: int) -> Iterator[tuple[int, Any]]:
        what = [recording_code(), record.__module__, record.__qualname__]
        keys = [canonical_digest([*what, *(_plain(value) for value in job)]) for job in jobs]
        meant = conventions.to_json()
        wanted = {key: (recorded, (record, *job), meant) for key, job in zip(keys, jobs, strict=True)}
        for index, outcome in made(stage, wanted, staging, run, prune=False):
            yield index, EpisodeStore.open(staged(outcome).store)[0] if isinstance(outcome, Path) else outcome

    return mapped


def recorded(record: Recorder, *arguments: Any) -> Iterator[Episode]:
    """One demonstration, whatever it is worth."""
    yield record(*arguments)


def _plain(value: Any) -> Any:
    return value.model_dump(mode="json") if hasattr(value, "model_dump") else value


@lru_cache(maxsize=1)
def recording_code() -> str:
    """Digest of the code and the libraries that decide a demonstration."""
    entries = ("wav.sim.demonstrations", "wav.sim.worker")
    return canonical_digest([module_digests(entries), library_versions(entries)])


class ScriptedSource:
    """Records demonstrations of every task of ``data.tasks`` (all of the suite for none).

    ``record`` records one demonstration and ``run`` runs it over jobs; by default what :mod:`wav.sim` has for it.
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

    def outcomes(self, workers: int, run: Mapper | None = None) -> Iterator[Episode | Rejection]:
        """Task by task the first tries in index order, then further tries for the tasks that came short.

        ``run`` records elsewhere than in this machine's processes.

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
            for outcome in self._round(jobs, workers, run):
                if isinstance(outcome, Rejection):
                    last[outcome.task] = outcome.reason
                else:
                    missing[outcome.task] -= 1
                yield outcome

    def _round(self, jobs: list[tuple[str, int]], workers: int, run: Mapper | None) -> Iterator[Episode | Rejection]:
        """Record the demonstrations of (task, initial state) jobs, in job order; the simulator is imported here."""
        record, run, settings = self._record, run or self._run, self.settings
        if record is None:
            from wav.sim.demonstrations import record_demonstration

            record = record_demonstration
        if run is None:
            from wav.sim.workers import map_in_processes

            run = map_in_processes
        from wav.sim.styles import draw_style

        how = (self.data, settings.noise, settings.detour, settings.seed)
        arguments = [
            (self.data.suite, task, index, *how, draw_style(settings.styles, settings.seed, task, index))
            for task, index in jobs
        ]
        for number, result in in_order(run(record, arguments, workers), len(jobs)):
            yield self._judge(*jobs[number], result)

    def _judge(self, task: str, index: int, result: Episode | Exception) -> Episode | Rejection:
        """Accept an episode or say why not; errors that are no episode's fault are raised."""
        name = f"{full_name(self.data.suite, task)}/{index:05d}"
        if isinstance(result, Episode):
            outcome = judged(result.episode_id, task, "", self.settings, _successful, result)
            self._accepted |= isinstance(outcome, Episode)
            return outcome
        # a simulator that fails before any has worked is a missing renderer or the like, not a bad episode
        if isinstance(result, DataError) or (isinstance(result, SimulationError) and self._accepted):
            return Rejection(name, task, f"{type(result).__name__}: {result}")
        raise result


def _successful(episode: Episode) -> Episode:
    if not episode.success:
        raise DataError(f"the expert did not reach the task's goal in {episode.length} steps")
    return episode
