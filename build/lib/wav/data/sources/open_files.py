"""Files that many episodes come from stay open from one episode to the next.

Opening a video or a parquet file reads its index, which grows with the file: once an episode, a dataset of one file
would cost the square of its episodes. So each process keeps the files it read last, a few of each kind. Readers have a
position, so only one thread of a process reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

LIMIT = 8
"""Open files of a kind: more than a dataset has cameras; each costs a few megabytes."""

File = TypeVar("File")
_CACHES: list[Any] = []


def stays_open(open_file: Callable[[Path], File]) -> Callable[[Path], File]:
    """``open_file`` with a memory of the files opened last; one that has changed on the disk is opened anew."""

    @lru_cache(maxsize=LIMIT)
    def opened(path: Path, *identity: int) -> File:
        return open_file(path)

    def find(path: Path) -> File:
        status = path.stat()
        return opened(path, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)

    _CACHES.append(opened)
    return find


def close_files() -> None:
    """Forget all open files, which closes them; after an error a reader's position is unknown."""
    for cache in _CACHES:
        cache.cache_clear()


@contextmanager
def files_closed() -> Iterator[None]:
    """Close what this process keeps open when the block ends."""
    try:
        yield
    finally:
        close_files()
