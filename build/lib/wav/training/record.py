"""What a run reports while it goes: progress lines, dvclive's curves, and the history that survives a restart."""

from __future__ import annotations

import logging
import shutil
import statistics
import time
from datetime import timedelta
from pathlib import Path

from dvclive import Live

from wav.config import Runtime
from wav.training.spec import TrainSpec
from wav.training.step import Row
from wav.training.tracking import RunFacts, Tracker, open_tracker

LOG = logging.getLogger("wav.training")
PROGRESS_S = 8.0
HISTORY, YOUNG = 10, 5  #: recorded losses that say what is usual, at most and at least


class Progress:
    """A line every few seconds: step, loss, samples per second, time to go. Silent on ranks other than 0."""

    def __init__(self, stage: str, steps: int, batch_size: int, start: int, speak: bool) -> None:
        self.stage, self.steps, self.batch_size, self.speak = stage, steps, batch_size, speak
        self._begin = self._last = time.monotonic()
        self._start = start

    def rate(self, step: int) -> float:
        """Samples per second since this process began to train."""
        return (step - self._start) * self.batch_size / max(1e-9, time.monotonic() - self._begin)

    def step(self, step: int, loss: float, waited: float) -> None:
        """Report step ``step`` (of ``steps``) where the last line is old enough; ``waited``: seconds for data."""
        now = time.monotonic()
        first = step == self._start + 1
        if not self.speak or not (first or now - self._last >= PROGRESS_S or step == self.steps):
            return
        self._last = now
        elapsed = now - self._begin
        left = timedelta(seconds=round((self.steps - step) * elapsed / max(1, step - self._start)))
        LOG.info(
            "%s step %d/%d  loss %.4f  %.1f samples/s  data wait %.0f%%  ETA %s",
            self.stage, step, self.steps, loss, self.rate(step), 100 * waited / max(1e-9, elapsed), left,
        )  # fmt: skip


def spec_tracker(spec: TrainSpec) -> Tracker | None:
    """The tracker of a run that ``WAV_TRACK`` asks for; ConfigError as from :func:`.tracking.open_tracker`."""
    sections = {name: getattr(spec, name).model_dump(mode="json") for name in ("data", "model", "train", "coupling")}
    facts = RunFacts(f"{spec.stage}-{spec.key}", spec.paths.cache / "tracking", sections)
    return open_tracker(Runtime().track, facts)


class Recorder:
    """Rows of metrics by step, mirrored as dvclive curves in ``folder``, and in a tracker where there is one.

    Rows are part of the checkpoint; :meth:`restore` rebuilds the curves from them, so a resumed run's curves hold
    every step once.
    """

    def __init__(self, folder: Path, enabled: bool, tracker: Tracker | None = None) -> None:
        self.folder, self.enabled, self.tracker = folder, enabled, tracker
        self.rows: list[tuple[int, Row]] = []
        if enabled:
            shutil.rmtree(folder, ignore_errors=True)
            self._live = Live(
                str(folder), save_dvc_exp=False, dvcyaml=False, report=None, monitor_system=False, resume=False
            )

    def restore(self, rows: list[tuple[int, Row]]) -> None:
        """Start from the rows of a checkpoint."""
        for step, row in rows:
            self.add(step, row)

    def add(self, step: int, row: Row) -> None:
        """Record metrics of ``step``; their names may hold a ``/`` (a folder of curves)."""
        self.rows.append((step, row))
        if self.enabled:
            self._live.step = step
            for name, value in row.items():
                self._live.log_metric(name, value)
            if self.tracker is not None:
                self.tracker.log(step, row)

    def latest(self, name: str) -> float | None:
        """The last recorded value of a metric."""
        return next((row[name] for _, row in reversed(self.rows) if name in row), None)

    def usual_loss(self) -> float | None:
        """Median loss of the last recorded rows; None while there are too few to say."""
        losses = [row["loss"] for _, row in self.rows if "loss" in row][-HISTORY:]
        return statistics.median(losses) if len(losses) >= YOUNG else None

    def is_spike(self, loss: float, factor: float) -> bool:
        """Whether ``loss`` is more than ``factor`` times the usual one (never where ``factor`` is 0)."""
        usual = self.usual_loss()
        return bool(factor) and usual is not None and usual > 0 and loss > factor * usual

    def close(self) -> None:
        """Finish the curves."""
        if self.enabled:
            self._live.end()
            if self.tracker is not None:
                self.tracker.close()
