"""A stage's work in shards: each leaves one folder, whole or not at all, which says that it is done.

A shard's key stands for everything that its result depends on, so that a run that was killed goes on with what is
there, and one of other settings does not. In which process a shard runs a mapper decides: on the workers of a cluster
(:mod:`wav.cluster`), or one after the other::

    for path in in_order(made(label_shard, jobs, staging_folder(out), cluster.mapper()), len(jobs)):
        ...
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from wav.errors import ServiceError, SimulationError

#: (function, jobs, processes) -> (index of the job, its result or exception) in any order
Mapper = Callable[[Callable[..., Any], Sequence[tuple[Any, ...]], int], Iterable[tuple[int, Any]]]
Result = TypeVar("Result")

#: Pixels of one shard: small enough for progress and many processes, large enough for few shards.
SHARD_BYTES = 128 * 2**20
_log = logging.getLogger(__name__)


def grouped(sizes: Sequence[int], limit: int = SHARD_BYTES) -> Iterator[range]:
    """Consecutive indices whose sizes add up to at most ``limit`` (a larger one stays alone)."""
    start = total = 0
    for index, size in enumerate(sizes):
        if index > start and total + size > limit:
            yield range(start, index)
            start, total = index, 0
        total += size
    if start < len(sizes):
        yield range(start, len(sizes))


def staging_folder(out: str | Path) -> Path:
    """Where the shards of a stage that makes ``out`` are kept until it is complete: beside it, on the same disk."""
    out = Path(out).absolute()
    return out.with_name(f".{out.name}.staging")


def in_order(results: Iterable[tuple[int, Result]], count: int) -> Iterator[tuple[int, Result]]:
    """Yield (job index, result) in job order; SimulationError where results end before all ``count`` jobs have one."""
    waiting: dict[int, Result] = {}
    following = 0
    for index, result in results:
        waiting[index] = result
        while following in waiting:
            yield following, waiting.pop(following)
            following += 1
    if following != count:
        raise SimulationError(f"jobs: {count - following} of {count} never came back; run again")


def made(
    function: Callable[..., None], jobs: Mapping[str, tuple[Any, ...]], staging: Path, run: Mapper, prune: bool = True
) -> Iterator[tuple[int, Path | Exception]]:
    """Make the shards that are not there yet.

    Args:
        function: ``function(*job, folder)`` makes the folder with :func:`wav.io.files.atomic_folder`.
        jobs: arguments by key; the key names the shard's folder.
        staging: see :func:`staging_folder`; whoever calls removes it once the stage is complete.
        run: runs the function over jobs.
        prune: remove what no job here can use: other settings, leftovers of killed processes.

    Yields:
        (index of the job, its folder or the exception it ended with): those that were there, then as they finish.

    Raises:
        ServiceError: a shard is done and its folder is not here.
    """
    staging.mkdir(parents=True, exist_ok=True)
    for path in staging.iterdir() if prune else ():
        if path.name not in jobs:
            shutil.rmtree(path, ignore_errors=True)
    paths = [staging / key for key in jobs]
    there = [index for index, path in enumerate(paths) if path.is_dir()]
    todo = sorted(set(range(len(paths))).difference(there))
    if there:
        _log.info("%s: %d of %d shards are there already", staging, len(there), len(paths))
    for index in there:
        yield index, paths[index]
    arguments = list(jobs.values())
    for number, outcome in run(function, [(*arguments[i], str(paths[i])) for i in todo], 0):
        path = paths[todo[number]]
        if not isinstance(outcome, Exception) and not path.is_dir():
            raise ServiceError(f"{path}: was made elsewhere and is not here; let all workers share this folder's disk")
        yield todo[number], outcome if isinstance(outcome, Exception) else path
