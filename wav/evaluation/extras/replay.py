"""``wav replay``: do the stored demonstrations still succeed when their actions are replayed open loop?

A gripper of the other sign, a wrong control rate or a wrong controller shows here, before a GPU week is spent. The
verdict is written next to the store and evaluation refuses a store that failed (:mod:`wav.evaluation.verdict`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from wav.data.names import own_task, suites_of
from wav.data.store import EpisodeInfo, EpisodeStore
from wav.errors import DataError
from wav.evaluation.intervals import wilson
from wav.evaluation.pictures import evenly
from wav.evaluation.verdict import report_path
from wav.io.files import write_json
from wav.sim.registry import simulator_versions
from wav.sim.replay import ReplayOutcome, ReplayStart, replay_episode
from wav.sim.workers import map_in_processes

if TYPE_CHECKING:
    from wav.config import DataSettings, IngestSettings

REQUIRED_SHARE = 0.95  #: Share of demonstrations that must succeed again.


@dataclass(frozen=True)
class ReplayReport:
    """Verdict on a store; ``worst`` holds the largest errors of any episode and which one had the largest position."""

    suite: str
    store: str
    digest: str
    of: int
    episodes: int
    successes: int
    success_share: float
    wilson_low: float
    wilson_high: float
    required_share: float
    passed: bool
    worst: dict[str, Any]
    outcomes: list[dict[str, Any]]
    not_replayed: list[dict[str, str]]
    simulator: dict[str, str]

    @property
    def line(self) -> str:
        """One line for a terminal."""
        worst = self.worst
        return (
            f"{self.suite}: {self.successes} of {self.episodes} demonstrations succeed again "
            f"({100 * self.success_share:.0f}%, needed {100 * self.required_share:.0f}%); largest state error "
            f"{1000 * worst['position_error']:.1f} mm, {worst['rotation_error']:.3f} rad, gripper "
            f"{1000 * worst['gripper_error']:.1f} mm ({worst['episode']}): {'passed' if self.passed else 'FAILED'}"
        )


def _start(info: EpisodeInfo, ingest: IngestSettings, suite: str) -> ReplayStart:
    """Where an episode begins; DataError if its source does not tell."""
    kind, _, rest = info.source.partition(":")
    start = ReplayStart.of(info, ingest)
    if info.source.startswith("scripted"):
        return start
    if kind == "libero_hdf5":
        from wav.data.sources.libero_hdf5 import dataset_files

        name, _, demo = rest.rpartition("#")
        files = dataset_files(ingest.path, own_task(suite, info.task)[0])
        path = next((path for path in files if path.name == name), None)
        if path is None:
            raise DataError(
                f"{info.episode_id}: its file {name} is not under ingest.path = {ingest.path!r}; restore it"
            )
        return replace(start, file=str(path), demo=demo)
    raise DataError(
        f"{info.episode_id}: source {info.source[:40]!r} holds no simulator state to start from; "
        "replay a store ingested from LIBERO's HDF5 files instead"
    )


def replay(
    store: EpisodeStore,
    data: DataSettings,
    ingest: IngestSettings,
    *,
    episodes: int = 20,
    workers: int = 0,
    progress: Callable[[ReplayOutcome], None] | None = None,
) -> ReplayReport:
    """Replay demonstrations in the simulator and write the verdict next to the store.

    ``data`` and ``ingest`` are what the store was made with. ``episodes`` are spread evenly over it (0: all).

    Raises:
        DataError: most episodes cannot be replayed.
        ServiceError: the simulator is not ready here.
    """
    suite = store.conventions.suite
    data = data.model_copy(update={"suites": suites_of(suite), "views": store.conventions.views})
    versions = simulator_versions(suite)
    jobs, skipped = [], []
    for i in evenly(len(store), episodes or len(store)):
        episode = store[i]
        try:
            start = _start(store.episodes[i], ingest, suite)
        except DataError as error:
            skipped.append({"episode": episode.episode_id, "reason": str(error)})
            continue
        jobs.append((data, start, np.array(episode.actions), np.array(episode.state)))
    outcomes: dict[int, ReplayOutcome] = {}
    for number, result in map_in_processes(replay_episode, jobs, workers):
        if isinstance(result, Exception):
            skipped.append({"episode": jobs[number][1].episode_id, "reason": str(result)})
            continue
        outcomes[number] = result
        if progress is not None:
            progress(result)
    done = [outcomes[number] for number in sorted(outcomes)]
    report = _verdict(store, suite, done, skipped, versions)
    write_json(report_path(store.path), asdict(report))
    return report


def _verdict(
    store: EpisodeStore,
    suite: str,
    done: Sequence[ReplayOutcome],
    skipped: list[dict[str, str]],
    versions: dict[str, str],
) -> ReplayReport:
    """Success share and largest errors; an episode that could not be replayed is neither success nor failure."""
    if not done:
        why = skipped[0]["reason"] if skipped else "the store is empty"
        raise DataError(f"{store.path}: no demonstration could be replayed: {why}")
    if len(skipped) > len(done):
        raise DataError(
            f"{store.path}: {len(skipped)} of {len(done) + len(skipped)} demonstrations could not be replayed, too "
            f"many for a verdict; the first, {skipped[0]['episode']}: {skipped[0]['reason']}"
        )
    solved = sum(outcome.success for outcome in done)
    rate = wilson(solved, len(done))
    far = max(done, key=lambda outcome: outcome.position_error)
    names = ("position_error", "rotation_error", "gripper_error", "start_error")
    return ReplayReport(
        suite=suite,
        store=str(store.path),
        digest=store.digest,
        of=len(store),
        episodes=len(done),
        successes=solved,
        success_share=rate.success_rate,
        wilson_low=rate.wilson_low,
        wilson_high=rate.wilson_high,
        required_share=REQUIRED_SHARE,
        passed=rate.success_rate >= REQUIRED_SHARE,
        worst={**{name: max(getattr(o, name) for o in done) for name in names}, "episode": far.episode_id},
        outcomes=[asdict(outcome) for outcome in done],
        not_replayed=skipped,
        simulator=versions,
    )
