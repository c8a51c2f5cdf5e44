"""A store made of an episode store, shard by shard: each shard is made once, here or elsewhere (:mod:`wav.shards`).

A shard's key stands for what its result depends on: the shard of episodes, settings, code, versions of libraries, so
that no store mixes what two versions made. What the store that is to be replaced holds under the same key is taken
over by linking its files, so that episodes that were appended are the only ones that cost anything.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from wav.data.store import EpisodeStore, shard_folder
from wav.errors import DataError
from wav.io.files import FileRecord, canonical_digest, check_files, link, manifest_files, read_manifest
from wav.io.readers import understood
from wav.shards import Mapper, made, staging_folder
from wav.source_code import library_versions, module_digests

_log = logging.getLogger(__name__)
#: (rows done, rows in total)
Progress = Callable[[int, int], None]


@lru_cache(maxsize=1)
def opened(path: str, digest: str) -> EpisodeStore:
    """The store at ``path``; DataError where another than the one of this digest lies there."""
    store = EpisodeStore.open(path)
    if store.digest != digest:
        raise DataError(
            f"{path}: digest {store.digest[:12]} where {digest[:12]} is meant; let all workers see one store"
        )
    return store


@dataclass
class _Tally:
    """Rows done, told whenever they grow."""

    total: int
    progress: Progress | None
    whole: int = 0
    part: int = 0
    _told: int = field(default=-1)

    def add(self, rows: int, whole: bool = False) -> None:
        """Count rows of a shard in work, or a whole shard's."""
        self.whole, self.part = (self.whole + rows, 0) if whole else (self.whole, self.part + rows)
        done = self.whole + self.part
        if self.progress and done > self._told:
            self.progress(done, self.total)
            self._told = done


def _in_turn(tally: _Tally) -> Mapper:
    """Runs jobs one after the other in this process; each tells the tally about its rows."""

    def run(function: Callable[..., Any], jobs: Sequence[tuple[Any, ...]], _: int) -> Iterator[tuple[int, Any]]:
        for index, job in enumerate(jobs):
            yield index, function(*job, progress=tally.add)

    return run


@dataclass(frozen=True)
class Shards:
    """The shards of a new store: keys and rows for its manifest, and the digests that are known already."""

    keys: tuple[str, ...]
    rows: tuple[int, ...]
    digests: Mapping[str, str]

    @property
    def content(self) -> list[dict[str, Any]]:
        """What the manifest says about them."""
        return [{"key": key, "rows": rows} for key, rows in zip(self.keys, self.rows, strict=True)]


def fill(
    folder: Path,
    function: Callable[..., None],
    episodes: EpisodeStore,
    arguments: tuple[Any, ...],
    *,
    identity: Sequence[Any],
    out: Path,
    version: tuple[str, int],
    run: Mapper | None = None,
    progress: Progress | None = None,
) -> Shards:
    """Put every shard's files into ``folder``, a link to what is there already or newly made.

    Args:
        folder: of the new store.
        function: ``function(path, digest, which, *arguments, folder[, progress])`` leaves what it makes of the episodes
            ``which`` of the store at ``path`` (:func:`opened`) in ``folder``, and may tell ``progress`` its rows.
        episodes: the store.
        arguments: of the function.
        identity: plain data that stands for them in a shard's key.
        out: folder that the new store will replace.
        version: format and version of both.
        run: runs the function elsewhere.
        progress: called as rows get done.
    """
    entries = (function.__module__,)
    what = [module_digests(entries), library_versions(entries), *identity]
    keys = tuple(canonical_digest([digest, *what]) for digest in episodes.shard_digests())
    rows = tuple(episodes.shard_rows.tolist())
    there = _former(out, *version, set(keys))
    tally = _Tally(episodes.frames, progress)
    for key, count in zip(keys, rows, strict=True):
        if key in there:
            tally.add(count, whole=True)
    path, staging = str(episodes.path.absolute()), staging_folder(out)
    jobs = {key: i for i, key in enumerate(keys) if key not in there}
    wanted = list(jobs)
    calls = {key: (path, episodes.digest, episodes.shard(i), *arguments) for key, i in jobs.items()}
    try:
        for number, outcome in made(function, calls, staging, run or _in_turn(tally)):
            if isinstance(outcome, Exception):
                raise outcome
            key = wanted[number]
            there[key] = {file.name: (file, "") for file in outcome.iterdir()}
            tally.add(rows[jobs[key]], whole=True)
    except BaseException:
        with contextlib.suppress(OSError):
            staging.rmdir()  # where no shard was finished
        raise
    digests: dict[str, str] = {}
    for index, key in enumerate(keys):
        for name, (source, digest) in there[key].items():
            target = f"{shard_folder(index)}/{name}"
            link(source, folder / target)
            digests |= {target: digest} if digest else {}
    return Shards(keys, rows, digests)


def _former(out: Path, name: str, version: int, wanted: set[str]) -> dict[str, dict[str, tuple[Path, str]]]:
    """Files and digests of the wanted shards in ``out``, by key; one that is damaged counts as missing."""
    try:
        manifest = read_manifest(out, name, version, remedy="")
        with understood(out, ""):
            keys = [shard["key"] for shard in manifest["shards"]]
            records = manifest_files(manifest)
    except DataError:
        return {}
    files: dict[str, list[FileRecord]] = {}
    for record in records:
        files.setdefault(record.path.rpartition("/")[0], []).append(record)
    found: dict[str, dict[str, tuple[Path, str]]] = {}
    for index, key in enumerate(keys):
        own = files.get(shard_folder(index), [])
        if key not in wanted or not own or not all((out / record.path).is_file() for record in own):
            continue
        try:
            check_files(own, out, remedy="it is made again", digests=True)
        except DataError as error:
            _log.warning(str(error))
            continue
        found[key] = {Path(record.path).name: (out / record.path, record.sha256) for record in own}
    if found:
        _log.info("%s: %d of %d shards are taken over", out, len(found), len(wanted))
    return found


def done(out: Path) -> None:
    """Remove the staged shards once the store is complete."""
    shutil.rmtree(staging_folder(out), ignore_errors=True)
