"""Datasets on disk into an episode store: in parallel, resumable, in memory that does not grow with the dataset.

A :class:`DatasetSource` cuts its dataset into jobs of a few episodes. Each job becomes a small episode store of its
own in a folder beside the output (:mod:`wav.shards`), written by a process of its own; at the end the staged files
are linked into the final store without a copy. An ingest that is interrupted, or whose dataset gained a file, does
again only the jobs whose key (settings, reader code, source files) has no folder yet. Of a finished ingest
:func:`remember` keeps which shards of the store are which job's, so that the next one takes them from there::

    for index, part in collect(source.jobs(), source.conventions(), out, workers=4):
        ...
"""

from __future__ import annotations

import inspect
import logging
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from wav.config import DataSettings, IngestSettings
from wav.data.conventions import Conventions
from wav.data.episode import Episode
from wav.data.sources.open_files import files_closed
from wav.data.store import EpisodeStore, Rejection
from wav.data.writer import EpisodeStoreWriter
from wav.errors import DataError, SimulationError, StorageError, WavError
from wav.io.files import atomic_folder, canonical_digest, read_json, require_free_space, write_json
from wav.shards import Mapper, grouped, made, staging_folder
from wav.source_code import code_digest, digests, library_versions, modules

_LOG = logging.getLogger(__name__)
_STORE, _REJECTED, _NOTES = "store", "rejected.json", "store.json"
#: gives an Episode or a Rejection for each episode of a job
Read = Callable[..., Iterator[Episode | Rejection]]


@dataclass(frozen=True)
class Job:
    """A few episodes to read.

    ``read(*arguments)`` yields an Episode or a Rejection for each; it is importable at top level, and ``key``
    identifies everything its result depends on.
    """

    read: Read
    arguments: tuple[Any, ...]
    label: str
    """File and episodes, for messages."""
    episodes: int
    bytes: int
    """Pixels it will write, estimated."""
    key: str


@dataclass(frozen=True)
class Item:
    """One episode to read."""

    what: Any
    """Stands for it; its ``repr`` tells all that does not stand in the files."""
    bytes: int
    """Pixels that it will write, estimated."""
    files: tuple[Path, ...]
    name: str
    """For messages."""


@dataclass(frozen=True)
class Staged:
    """A finished job: the shards of a store that hold its episodes (none where no episode was fit), its rejections."""

    store: Path
    shards: range
    accepted: int
    rejected: tuple[Rejection, ...]


class DatasetSource(ABC):
    """Base of the readers of datasets on disk: a source whose episodes are read in jobs."""

    def __init__(self, data: DataSettings, settings: IngestSettings) -> None:
        self.data, self.settings = data, settings

    @abstractmethod
    def conventions(self) -> Conventions:
        """What the arrays of every episode mean, after reading."""

    @abstractmethod
    def jobs(self) -> list[Job]:
        """The whole dataset in jobs, in the order of the store."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What was read, detected, declared and changed, as plain data; becomes ``source.json`` of the store."""

    def expected(self) -> int:
        """Episodes to read."""
        return sum(job.episodes for job in self.jobs())

    @property
    def frame_bytes(self) -> int:
        """Size of one step's pictures in the store."""
        return len(self.data.views) * self.data.image_height * self.data.image_width * 3

    def job(self, read: Read, arguments: tuple[Any, ...], size: int, **what: Any) -> Job:
        """A job with its key. ``what``: label, episodes (number), files (paths), identity (plain data)."""
        files: list[Path] = sorted(set(what["files"]))
        key = {
            "code": [reader_code(), code_digest(Path(inspect.getfile(type(self))))],
            "data": self.data.model_dump(mode="json"),
            "ingest": self.settings.model_dump(mode="json"),
            "conventions": self.conventions().to_json(),
            "files": [[str(path.absolute()), path.stat().st_size, path.stat().st_mtime_ns] for path in files],
            "identity": what["identity"],
        }
        return Job(read, arguments, what["label"], what["episodes"], size, canonical_digest(key))

    def jobs_of(self, read: Read, items: Sequence[Item], label: str, plan: Any = None, identity: Any = "") -> list[Job]:
        """Jobs ``read(plan, (item.what, ...), data, settings)`` of a few items each, in their order.

        Of ``plan``, which says how, only what ``identity`` (plain data) tells of it is part of a job's key; ``label``
        is what the items are parts of.
        """
        jobs = []
        for part in grouped([item.bytes for item in items]):
            some = items[part.start : part.stop]
            whats = tuple(item.what for item in some)
            what = {
                "label": f"{label}: {some[0].name} to {some[-1].name}",
                "episodes": len(some),
                "files": [path for item in some for path in item.files],
                "identity": [identity, repr(whats)],
            }
            size = sum(item.bytes for item in some)
            jobs.append(self.job(read, (plan, whats, self.data, self.settings), size, **what))
        return jobs


def judged(
    name: str, task: str, where: str, settings: IngestSettings, read: Callable[..., Episode], *arguments: Any
) -> Episode | Rejection:
    """The episode that ``read(*arguments)`` gives, or why not: its DataError in one that begins with ``where``."""
    try:
        episode = read(*arguments)
        episode.validate()
        if episode.length < settings.min_length:
            raise DataError(f"{episode.length} steps, fewer than ingest.min_length = {settings.min_length}")
    except (WavError, OSError, RuntimeError, KeyError) as error:
        reason = flat(error) if isinstance(error, WavError) else f"damaged ({flat(error)}); download it again"
        return Rejection(name, task, f"{where}: {reason}" if where else reason)
    return episode


def flat(error: Exception) -> str:
    """An error's message on one line."""
    return " ".join(str(error).split())


@lru_cache(maxsize=1)
def reader_code() -> str:
    """Digest of the code, without comments, and of the libraries that decide what a staged store holds."""
    which = ("wav.data.sources",), ("wav/sim",)
    return canonical_digest([digests(modules(*which)), library_versions(*which)])


def stage(read: Read, arguments: tuple[Any, ...], conventions: Mapping[str, Any], folder: str) -> None:
    """Run one job: ``folder`` appears with its rejections and, where an episode is fit, a store."""
    rejected: list[Rejection] = []
    meant = Conventions.from_json(conventions)
    with atomic_folder(folder) as new:
        with ExitStack() as stack:
            writer: EpisodeStoreWriter | None = None
            for outcome in read(*arguments):
                if isinstance(outcome, Rejection):
                    rejected.append(outcome)
                    continue
                writer = writer or stack.enter_context(EpisodeStoreWriter(new / _STORE, meant))
                writer.add(outcome)
        write_json(new / _REJECTED, [asdict(rejection) for rejection in rejected])


def staged(folder: Path) -> Staged:
    """What :func:`stage` left in a folder; DataError, KeyError or TypeError where that is damaged."""
    rejected = tuple(Rejection(**row) for row in read_json(folder / _REJECTED, ""))
    if not (folder / _STORE).is_dir():
        return Staged(folder, range(0), 0, rejected)
    store = EpisodeStore.open(folder / _STORE)
    return Staged(store.path, range(len(store.shard_rows)), len(store), rejected)


def _drop_damaged(jobs: Sequence[Job], folder: Path) -> None:
    """Remove staged copies that cannot be read, so that they are made again."""
    for job in jobs:
        if (path := folder / job.key).is_dir():
            try:
                staged(path)
            except (DataError, KeyError, TypeError):
                _LOG.warning("%s: its staged copy is damaged and will be made again", job.label)
                shutil.rmtree(path)


def remember(out: Path, jobs: Mapping[str, Staged]) -> None:
    """Note which shards of the finished store ``out`` hold which job's episodes, by key, and remove what was staged."""
    folder = staging_folder(out)
    notes = {
        key: {
            "accepted": job.accepted,
            "rejected": [asdict(rejection) for rejection in job.rejected],
            "shards": [job.shards.start, job.shards.stop],
        }
        for key, job in jobs.items()
    }
    shutil.rmtree(folder)
    folder.mkdir()
    write_json(folder / _NOTES, {"store": EpisodeStore.open(out).digest, "jobs": notes})


def _remembered(out: Path) -> dict[str, Staged]:
    """Jobs by key whose episodes lie in the store ``out``; none where it is another one than was noted."""
    try:
        raw = read_json(staging_folder(out) / _NOTES, "")
        if raw["store"] != EpisodeStore.open(out).digest:
            return {}
        return {
            key: Staged(out, range(*job["shards"]), job["accepted"], tuple(Rejection(**row) for row in job["rejected"]))
            for key, job in raw["jobs"].items()
        }
    except (DataError, KeyError, TypeError):
        return {}


def collect(
    jobs: Sequence[Job], conventions: Conventions, out: Path, workers: int, run: Mapper | None = None
) -> Iterator[tuple[int, Staged]]:
    """Run the jobs that have no finished stage yet; DataError where a reading process died.

    The caller keeps the staging folder of ``out`` until that is complete. With one worker everything runs in this
    process; ``run`` runs the jobs elsewhere (:mod:`wav.cluster`).

    Yields:
        place in the list and result of finished jobs, those of an earlier run first, the others as they finish.
    """
    folder, there, meant = staging_folder(out), _remembered(out), conventions.to_json()
    yield from ((index, there[job.key]) for index, job in enumerate(jobs) if job.key in there)
    todo = [index for index, job in enumerate(jobs) if job.key not in there]
    left = [jobs[index] for index in todo]
    if len(left) < len(jobs):
        _LOG.info("ingest continues: %d of %d parts are in the store already", len(jobs) - len(left), len(jobs))
    _drop_damaged(left, folder)
    require_free_space(folder, sum(job.bytes for job in left if not (folder / job.key).is_dir()))
    arguments = {job.key: (job.read, job.arguments, meant) for job in left}
    run = run or (lambda function, todo, _: _run(function, todo, workers))
    for number, outcome in made(stage, arguments, folder, run):
        if isinstance(outcome, Exception):
            raise _explained(outcome, left[number])
        yield todo[number], staged(outcome)


def _run(
    function: Callable[..., None], arguments: Sequence[tuple[Any, ...]], workers: int
) -> Iterator[tuple[int, Exception | None]]:
    """(number of the job, None or its error) as jobs finish."""
    if workers == 1 or len(arguments) <= 1:
        with files_closed():
            for number, job in enumerate(arguments):
                function(*job)
                yield number, None
        return
    from wav.sim.workers import map_in_processes

    yield from map_in_processes(function, arguments, workers)


def _explained(error: Exception, job: Job) -> Exception:
    """An error of a reading process as the library's own."""
    if isinstance(error, SimulationError):
        return DataError(
            f"{job.label}: the process reading it died ({error}); repair or remove the file, or give the machine more "
            "memory, and run again: finished parts are kept"
        )
    text = str(error)
    return StorageError(text.removeprefix("StorageError: ")) if text.startswith("StorageError: ") else error
