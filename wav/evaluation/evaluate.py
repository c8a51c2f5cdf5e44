"""Closed-loop evaluation from start checks to metrics.json.

A killed evaluation is resumed without repeating finished episodes.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from wav.config import DataSettings, EvalLiberoSettings, PlannerSettings, Settings
from wav.data.conventions import Conventions
from wav.errors import ConfigError, ServiceError
from wav.evaluation import pictures
from wav.evaluation.protocol import (
    EpisodeSpec,
    build_episodes,
    check_conventions,
    code_digest,
    episode_key,
    versions,
)
from wav.evaluation.records import (
    ASKED,
    REACHED,
    EpisodeRecord,
    finished_record,
    record_path,
    summarise,
    write_record,
)
from wav.evaluation.rollout import Clock, Rollout, Scheduler
from wav.io.files import write_json
from wav.planning import Variant
from wav.policy.policy import Policy
from wav.sim.workers import SimPool

if TYPE_CHECKING:
    from wav.evaluation.shares import Elsewhere

log = logging.getLogger(__name__)

#: Predicted-future pictures per recorded episode.
_PREDICTIONS = 3


@dataclass(frozen=True)
class Sections:
    """The sections of params.yaml that an evaluation reads."""

    data: DataSettings
    planner: PlannerSettings
    eval_libero: EvalLiberoSettings


EvaluationSettings = Settings | Sections


@dataclass(frozen=True)
class Progress:
    """State of an evaluation after an episode; ``eta_seconds`` is the time left at the rate so far."""

    done: int
    total: int
    successes: int
    finished: int
    eta_seconds: float
    label: str

    @property
    def message(self) -> str:
        """One line for a log or progress bar; successes leave the swapped probes out."""
        share = f"{self.successes}/{self.finished} solved" if self.finished else "none solved yet"
        return f"{self.done}/{self.total} episodes, {share}, {self.eta_seconds:.0f} s left ({self.label})"


def check_start(policy: Policy, data: DataSettings, data_conventions: Conventions | None = None) -> None:
    """Refuse an evaluation whose simulator or data are not the ones the policy was trained with.

    ``data_conventions`` are the episode store's, where known; the simulator's are always compared.

    Raises:
        ConfigError: a convention differs; names the field and both values.
    """
    check_conventions(policy.conventions, Conventions.for_simulator(data), "simulator")
    if data_conventions is not None:
        check_conventions(policy.conventions, data_conventions, "episode store")


def applicable(
    variants: Sequence[Variant], value_expert: bool, field: str = "eval_libero.variants"
) -> tuple[tuple[Variant, ...], dict[str, str]]:
    """The variants that can be evaluated, and why the others cannot.

    ``field`` names ``variants`` in the error.

    Raises:
        ConfigError: none of them can be evaluated.
    """
    if value_expert:
        return tuple(variants), {}
    if "unplanned" not in variants:
        raise ConfigError(
            f"{field} = {', '.join(variants)}: the model has no value expert (model.value_expert: false) to plan "
            "with; ask for unplanned"
        )
    reason = "not applicable, the model has no value expert (model.value_expert: false) to plan with"
    return ("unplanned",), {variant: reason for variant in variants if variant != "unplanned"}


def evaluate(
    settings: EvaluationSettings,
    policy: Policy,
    out: Path,
    *,
    pool: SimPool,
    checkpoint: str,
    data_conventions: Conventions | None = None,
    start: Mapping[str, Any] | None = None,
    limits: Mapping[str, int] | None = None,
    progress: Callable[[Progress], None] | None = None,
    elsewhere: Elsewhere | None = None,
) -> dict[str, Any]:
    """Run every episode that is not finished yet and write records, videos, pictures and ``metrics.json``.

    Args:
        settings: sections ``data``, ``planner``, ``eval_libero``.
        policy: batched policy whose padded batch is ``eval_libero.batch_size``.
        out: evaluation folder (``reports/eval``); ``metrics.json`` is written last.
        pool: open simulators for ``data.suite``.
        checkpoint: digest of the weights, part of every episode's key.
        data_conventions: see :func:`check_start`.
        start: what :func:`wav.evaluation.start.check_all` found, kept in ``metrics.json``.
        limits: steps by task within which success is reported too (:func:`wav.evaluation.records.step_limits`).
        progress: called after every episode.
        elsewhere: where the episodes run, if not in ``pool``.

    Returns:
        The content of ``metrics.json``. Variants that need a value expert which the model lacks are left out and named
        under ``not_applicable`` with the reason.

    Raises:
        ConfigError: see :func:`check_start` and :func:`applicable`.
        SimulationError: a simulator kept dying.
        StorageError: the disk is full.
    """
    check_start(policy, settings.data, data_conventions)
    variants, left_out = applicable(settings.eval_libero.variants, policy.has_values)
    for variant, reason in left_out.items():
        log.warning("evaluation: variant %s is %s", variant, reason)
    wanted = settings.eval_libero.model_copy(update={"variants": variants})
    session = Session(settings, policy, Path(out), checkpoint, progress, build_episodes(settings.data, wanted))
    timing = session.run(pool, elsewhere)
    session.remove_stale_pictures()
    metrics = summarise([session.records[spec] for spec in session.episodes], timing, limits)
    metrics["not_applicable"], metrics["start"] = left_out, dict(start or {})
    write_json(session.out / "metrics.json", metrics)
    return metrics


class Session:
    """Episodes of one evaluation, their records, and what is written when one finishes."""

    def __init__(
        self,
        settings: EvaluationSettings,
        policy: Policy,
        out: Path,
        checkpoint: str,
        progress: Callable[[Progress], None] | None,
        episodes: Sequence[EpisodeSpec],
    ) -> None:
        self.settings, self.policy, self.out, self.progress = settings, policy, out, progress
        self.checkpoint, self.conventions = checkpoint, policy.conventions.to_json()
        self.versions = versions(policy.compiled)
        self.episodes = episodes
        self.records: dict[EpisodeSpec, EpisodeRecord] = {}
        self.began, self.resumed = time.perf_counter(), 0

    def run(self, pool: SimPool, elsewhere: Elsewhere | None) -> dict[str, float]:
        """Run the episodes that are left; where the time went."""
        waiting, began = self.resume(), time.perf_counter()
        if elsewhere is None:
            clock = self.roll_out(waiting, pool)
        else:
            clock = asdict(Clock())
            for share, part in elsewhere.roll_out(self, waiting):
                clock = {name: seconds + part[name] for name, seconds in clock.items()}
                self._take(share)
        wall = time.perf_counter() - began
        return {
            **clock,
            "wall_seconds": wall,
            "episodes_run": len(waiting),
            "episodes_resumed": self.resumed,
            "episodes_per_hour": 3600 * len(waiting) / wall if waiting else 0.0,
        }

    def roll_out(self, specs: Sequence[EpisodeSpec], pool: SimPool) -> dict[str, float]:
        """Run these episodes here; where the time went."""
        protocol = self.settings.eval_libero
        sizes = {"execute_steps": protocol.execute_steps, "batch_size": protocol.batch_size}
        scheduler = Scheduler(pool, self.policy, on_finish=self.finish, **sizes)
        scheduler.run(specs)
        return asdict(scheduler.clock)

    def _take(self, share: Sequence[EpisodeSpec]) -> None:
        """Take over the records of episodes that ran elsewhere."""
        if lost := self.left(share):
            raise ServiceError(
                f"{record_path(self.out, lost[0])}: was written elsewhere and is not here; let all workers share this "
                "folder's disk"
            )
        self._report(share[-1])

    def key(self, spec: EpisodeSpec) -> str:
        """Key of the episode's record."""
        return episode_key(
            spec,
            checkpoint=self.checkpoint,
            statistics=self.policy.statistics.digest,
            conventions=self.conventions,
            planner=self.settings.planner,
            settings=self.settings.eval_libero,
            levels=self.policy.levels,
            compiled=self.policy.compiled,
        )

    def video_path(self, spec: EpisodeSpec) -> Path:
        """Video of a recorded episode."""
        return self.out / "videos" / f"{spec.picture}.mp4"

    def resume(self) -> list[EpisodeSpec]:
        """Take over finished records of the same key; the episodes that are left.

        Records of other episodes, which an earlier protocol left, go: what lies in the folder is its result.
        """
        asked = {record_path(self.out, spec) for spec in self.episodes}
        for path in {*(self.out / "episodes").rglob("*.json")} - asked:
            path.unlink()
        waiting = self.left(self.episodes)
        self.resumed = len(self.records)
        if self.resumed:
            log.info("evaluation: %d of %d episodes are already there", self.resumed, len(self.episodes))
        return waiting

    def left(self, specs: Sequence[EpisodeSpec]) -> list[EpisodeSpec]:
        """Those that have no finished record of the same key; the others' are taken over."""
        for spec in specs:
            record = finished_record(record_path(self.out, spec), self.key(spec))
            if record is not None and not (spec.record and not self.video_path(spec).exists()):
                self.records[spec] = record
        return [spec for spec in specs if spec not in self.records]

    def finish(self, rollout: Rollout) -> None:
        """Pictures first, then the record that marks the episode as finished."""
        spec = rollout.spec
        if spec.record and rollout.frames:
            self._pictures(rollout)
        record = self._record(rollout)
        write_record(record_path(self.out, spec), record)
        self.records[spec] = record
        self._report(spec)

    def _record(self, rollout: Rollout) -> EpisodeRecord:
        """What is kept of an episode, and what it takes to run it again."""
        spec, protocol = rollout.spec, self.settings.eval_libero
        return EpisodeRecord(
            **{name: getattr(spec, name) for name in ASKED},
            **{name: getattr(rollout, name) for name in REACHED},
            key=self.key(spec),
            policy_calls=rollout.calls,
            wall_seconds=round(rollout.finished - rollout.started, 3),
            versions=self.versions,
            checkpoint=self.checkpoint,
            statistics=self.policy.statistics.digest,
            conventions=self.conventions,
            render=self.settings.data.render,
            budget=protocol.budget,
            execute_steps=protocol.execute_steps,
            batch=[protocol.batch_size, spec.row % protocol.batch_size],
            planner=self.settings.planner.model_dump(mode="json"),
            code=code_digest(),
            protocol_steps=spec.protocol_steps or spec.max_steps,
        )

    def _report(self, spec: EpisodeSpec) -> None:
        """Tell the caller how far the evaluation is."""
        if self.progress is None:
            return
        own = [record for record in self.records.values() if not record.swapped]
        run = len(self.records) - self.resumed
        left = len(self.episodes) - len(self.records)
        eta = (time.perf_counter() - self.began) / run * left
        solved = sum(record.solved for record in own)
        self.progress(Progress(len(self.records), len(self.episodes), solved, len(own), eta, spec.group))

    def _pictures(self, rollout: Rollout) -> None:
        """Video, strip and predicted-against-real frames of a recorded episode."""
        data, video = self.settings.data, self.video_path(rollout.spec)
        frames = [pictures.join_views(frame, data.views) for frame in rollout.frames]
        pictures.write_mp4(video, frames, data.control_hz)
        strip = pictures.strip([frame[data.views[0]] for frame in rollout.frames])
        pictures.write_png(self.out / "strips" / f"{video.stem}.png", strip, 96)
        ahead = data.frame_stride * (1 + np.arange(data.future_frames))
        complete = [(step, future) for step, future in rollout.predictions if step + ahead[-1] < len(rollout.frames)]
        for step, future in [complete[i] for i in pictures.evenly(len(complete), _PREDICTIONS)]:
            real = np.stack([[rollout.frames[t][view] for t in step + ahead] for view in data.views])
            path = self.out / "predictions" / f"{video.stem}-step{step:03d}.png"
            pictures.write_prediction(path, real, self.policy.decode_future(future))

    def remove_stale_pictures(self) -> None:
        """Remove pictures of episodes that this evaluation does not ask for; make the folders."""
        names = {self.video_path(spec).stem for spec in self.episodes if spec.record}
        for folder in ("videos", "strips", "predictions"):
            (self.out / folder).mkdir(parents=True, exist_ok=True)
            for path in (self.out / folder).glob("*.*"):
                if path.stem.split("-step")[0] not in names and "-held-out-" not in path.name:
                    path.unlink()


def without_simulator(settings: EvaluationSettings, out: Path, checkpoint: str) -> dict[str, Any]:
    """The evaluation of a suite without simulator, such as a real robot's dataset: nothing runs.

    ``metrics.json`` names every variant as not applicable; the folders of the stage's outputs are empty. What can be
    said of such a policy is in the pictures along held-out demonstrations (:mod:`wav.evaluation.held_out`).

    Returns:
        The content of ``metrics.json``.
    """
    suite = settings.data.suite
    reason = f"not applicable, suite {suite!r} has no simulator"
    log.warning("evaluation: %s; held-out demonstrations are all there is to see", reason)
    for name in ("episodes", "videos", "strips", "predictions"):
        shutil.rmtree(out / name, ignore_errors=True)
        (out / name).mkdir(parents=True)
    metrics = {
        "suite": suite,
        "seed": settings.eval_libero.seed,
        "checkpoint": checkpoint,
        "execute_steps": settings.eval_libero.execute_steps,
        "not_applicable": dict.fromkeys(settings.eval_libero.variants, reason),
    }
    write_json(out / "metrics.json", metrics)
    return metrics
