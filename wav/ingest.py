"""ingest: demonstrations from a source into one episode store, with statistics and a quarantine report.

::

    report = ingest(settings.data, settings.ingest, Path("data/episodes"), workers=2)
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from wav.data.episode import Episode
from wav.data.files import require_free_space
from wav.data.sources import Source, open_source
from wav.data.store import EpisodeStore, EpisodeStoreWriter

if TYPE_CHECKING:
    from wav.config import DataSettings, IngestSettings

Progress = Callable[[int, int, int], None]
"""(episodes tried, episodes wanted, episodes accepted)"""
_LOG = logging.getLogger(__name__)


@contextlib.contextmanager
def _ticking(bar: tqdm, seconds: float = 5.0) -> Iterator[None]:
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
    source: Source | None = None,
) -> IngestReport:
    """Write the episodes of a source to the store at ``out`` (replaced as a whole, or left alone on an error).

    Args:
        data: cameras and sizes.
        settings: the source and its parameters.
        out: folder of the store.
        workers: simulator processes; 0: the machine's cores.
        callback: told (tried, wanted, accepted) after every episode.
        source: a source to read instead of ``settings.source``.

    Raises:
        ConfigError: the source or a task is unknown.
        DataError: too few episodes are fit, or one does not fit the conventions.
        StorageError: the disk is or would be full.
    """
    began, out = time.monotonic(), Path(out)
    source = source or open_source(data, settings)
    expected = source.expected()
    # a lower bound: no episode is shorter
    require_free_space(out, expected * settings.min_length * len(data.views) * data.image_height * data.image_width * 3)
    per_task: Counter[str] = Counter()
    tried = 0
    with (
        EpisodeStoreWriter(out, source.conventions()) as writer,
        tqdm(total=expected, desc="ingest", unit="episode", mininterval=1.0) as bar,
        _ticking(bar),
    ):
        for outcome in source.outcomes(workers or os.cpu_count() or 1):
            tried += 1
            if isinstance(outcome, Episode):
                writer.add(outcome)
                per_task[outcome.task] += 1
                bar.update()
            else:
                writer.quarantine(outcome.episode, outcome.task, outcome.reason)
                _LOG.info("rejected %s: %s", outcome.episode, outcome.reason)
            bar.set_postfix(rejected=tried - writer.count, refresh=False)
            if callback is not None:
                callback(tried, max(expected, tried), writer.count)
    store = EpisodeStore.open(out)
    return IngestReport(
        episodes=len(store),
        frames=store.frames,
        rejected=len(store.rejected),
        per_task=dict(per_task),
        seconds=time.monotonic() - began,
        digest=store.digest,
    )
