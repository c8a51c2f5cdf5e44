"""ingest: demonstrations from a source into one episode store, with statistics and a quarantine report.

Datasets on disk are read by several processes into a staging folder beside the output
(:mod:`wav.data.sources.staging`); an interrupted ingest continues from there::

    report = ingest(settings.data, settings.ingest, Path("data/episodes"), workers=2)
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from wav.config import DataSettings, IngestSettings
from wav.data.episode import Episode
from wav.data.sources import Source, open_source
from wav.data.sources.scripted import kept
from wav.data.sources.staging import DatasetSource, Staged, collect, remember
from wav.data.store import EpisodeStore, Rejection
from wav.data.writer import EpisodeStoreWriter
from wav.errors import ConfigError, DataError
from wav.io.files import require_free_space
from wav.shards import Mapper, staging_folder
from wav.sim.registry import has_simulator

Progress = Callable[[int, int, int], None]
"""(episodes tried, episodes wanted, episodes accepted)"""
_LOG = logging.getLogger(__name__)


@contextlib.contextmanager
def ticking(bar: tqdm, seconds: float = 5.0) -> Iterator[None]:
    """Redraw the bar now and then: simulators take a while to start, and a silent terminal looks like a hang."""
    stop = threading.Event()

    def tick() -> None:
        while not stop.wait(seconds):
            bar.refresh()

    thread = threading.Thread(target=tick, name="ingest-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@dataclass(frozen=True)
class IngestReport:
    """What a run of :func:`ingest` made."""

    episodes: int
    frames: int
    rejected: int
    per_task: dict[str, int]
    """Accepted episodes by task."""
    seconds: float
    digest: str
    """Identity of the store."""


def ingest(
    data: DataSettings,
    settings: IngestSettings,
    out: str | Path,
    *,
    workers: int = 0,
    callback: Progress | None = None,
    source: Source | DatasetSource | None = None,
    run: Mapper | None = None,
) -> IngestReport:
    """Write the episodes of a source to the store at ``out`` (replaced as a whole, or left alone on an error).

    ``callback`` is told (tried, wanted, accepted) after every episode (datasets: every few). ``source`` takes the place
    of ``settings.source``; ``run`` runs the jobs elsewhere (:mod:`wav.cluster`), where they are resumable.

    Raises:
        ConfigError: the source or a task is unknown, or the pictures are rendered otherwise than evaluation's.
        DataError: too few episodes are fit, or one does not fit the conventions.
        StorageError: the disk is or would be full.
    """
    began, out = time.monotonic(), Path(out)
    source = source or open_source(data, settings)
    _check_render(source, data)
    expected = source.expected()
    # a lower bound: no episode is shorter
    require_free_space(out, expected * settings.min_length * len(data.views) * data.image_height * data.image_width * 3)
    with (
        EpisodeStoreWriter(out, source.conventions()) as writer,
        tqdm(total=expected, desc="ingest", unit="episode", mininterval=1.0) as bar,
        ticking(bar),
    ):
        progress, jobs = _Tally(bar, expected, callback), {}
        count = workers or os.cpu_count() or 1
        if isinstance(source, DatasetSource):
            jobs = _write_dataset(source, writer, out, count, progress, run)
        else:
            if run is not None:  # what is recorded elsewhere is kept beside the output until that is complete
                run = kept(run, staging_folder(out), writer.conventions)
            for outcome in source.outcomes(count, run):
                if isinstance(outcome, Episode):
                    writer.add(outcome)
                    progress(1, 0)
                else:
                    _quarantine(writer, outcome)
                    progress(0, 1)
    if jobs:
        remember(out, jobs)
    else:
        shutil.rmtree(staging_folder(out), ignore_errors=True)
    store = EpisodeStore.open(out)
    return IngestReport(
        episodes=len(store),
        frames=store.frames,
        rejected=len(store.rejected),
        per_task=dict(Counter(info.task for info in store.episodes)),
        seconds=time.monotonic() - began,
        digest=store.digest,
    )


def _check_render(source: Source | DatasetSource, data: DataSettings) -> None:
    """Refuse pictures that the evaluation's simulator would not draw: it would say so only after the training."""
    render = source.conventions().render
    if has_simulator(data.suite) and render != data.render:
        raise ConfigError(
            f"data.render = {data.render!r}: the dataset's pictures are rendered with {render!r}, and evaluation must "
            f"draw the same; set data.render: {render}"
        )


class _Tally:
    """Episodes so far, to the bar and the callback."""

    def __init__(self, bar: tqdm, expected: int, callback: Progress | None) -> None:
        self.bar, self.expected, self.callback = bar, expected, callback
        self.accepted = self.rejected = 0

    def __call__(self, accepted: int, rejected: int) -> None:
        """Count some more."""
        self.accepted, self.rejected = self.accepted + accepted, self.rejected + rejected
        self.bar.set_postfix(rejected=self.rejected, refresh=False)
        self.bar.update(accepted)
        if self.callback is not None:
            tried = self.accepted + self.rejected
            self.callback(tried, max(self.expected, tried), self.accepted)


def _quarantine(writer: EpisodeStoreWriter, rejection: Rejection) -> None:
    writer.quarantine(rejection.episode, rejection.task, rejection.reason)
    _LOG.info("rejected %s: %s", rejection.episode, rejection.reason)


def _write_dataset(
    source: DatasetSource,
    writer: EpisodeStoreWriter,
    out: Path,
    workers: int,
    progress: _Tally,
    run: Mapper | None,
) -> dict[str, Staged]:
    """Read a dataset's jobs, continuing what an earlier run left, and put them together in their order.

    Returns each job by its key, with the shards of the store that are its episodes.
    """
    parts: dict[int, Staged] = {}
    jobs = source.jobs()
    for index, part in collect(jobs, source.conventions(), out, workers, run):
        parts[index] = part
        progress(part.accepted, len(part.rejected))
    store: EpisodeStore | None = None
    places: dict[str, Staged] = {}
    refused: dict[str, Rejection] = {}
    for index, job in enumerate(jobs):
        part, shards = parts[index], range(0)
        if part.shards:
            if store is None or store.path != part.store:
                store = EpisodeStore.open(part.store)
            shards = writer.adopt(store, part.shards)
        places[job.key] = replace(part, shards=shards)
        for rejection in part.rejected:
            refused.setdefault(rejection.task, rejection)
            _quarantine(writer, rejection)
    for task, first in refused.items():
        if task not in writer.tasks:
            sentence = f"ingest: no episode of task {task!r} is fit (first: {first.episode}: {first.reason})"
            if task in source.data.tasks:
                raise DataError(f"{sentence}; repair the dataset, or leave the task out of data.tasks")
            _LOG.warning(sentence)
    writer.describe(source.describe())
    return places
