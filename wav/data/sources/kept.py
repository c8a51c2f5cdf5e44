"""Files that many episodes come from, kept open from one episode to the next.

Opening a video or a parquet file reads its index, which grows with the file: once an episode, a dataset of one file
would cost the square of its episodes. So each process keeps the files it read last, a few of each kind::

    with kept_files_closed():  # a process that reads and ends needs no such block
        for ...:
            with VIDEOS.using(path) as video:
                ...
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Generic, Protocol, TypeVar

LIMIT = 8
"""Open files of a kind: more than a dataset has cameras; each costs a few megabytes."""


class Closable(Protocol):
    """What can be kept."""

    def close(self) -> None:
        """Give the file back."""
        ...


File = TypeVar("File", bound=Closable)
_all: list[KeptFiles] = []  # type: ignore[type-arg]


class KeptFiles(threading.local, Generic[File]):
    """The files of one kind that this thread read last; a thread sees its own alone, as readers have a position.

    Args:
        open_file: opens a path; what it raises comes through.
        limit: how many stay open.
    """

    def __init__(self, open_file: Callable[[Path], File], limit: int = LIMIT) -> None:
        self._open, self._limit = open_file, limit
        self._files: OrderedDict[Path, tuple[tuple[int, ...], File]] = OrderedDict()

    @contextmanager
    def using(self, path: Path) -> Iterator[File]:
        """The file at ``path``, opened unless it is there and unchanged; closed after an error.

        Raises:
            FileNotFoundError: there is no such file.
        """
        status = path.stat()
        identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        kept = self._files.get(path)
        if kept is None or kept[0] != identity:
            self.drop(path)
            while len(self._files) >= self._limit:
                self.drop(next(iter(self._files)))
            kept = self._files[path] = (identity, self._open(path))
        self._files.move_to_end(path)
        try:
            yield kept[1]
        except BaseException:
            self.drop(path)
            raise

    def drop(self, path: Path) -> None:
        """Close the file at ``path``, if it is open."""
        _, file = self._files.pop(path, (None, None))
        if file is not None:
            file.close()

    def close(self) -> None:
        """Close all."""
        for path in list(self._files):
            self.drop(path)


def kept_files(open_file: Callable[[Path], File]) -> KeptFiles[File]:
    """A kind of file that :func:`kept_files_closed` closes too."""
    _all.append(KeptFiles(open_file))
    return _all[-1]


@contextmanager
def kept_files_closed() -> Iterator[None]:
    """Close what this thread keeps open when the block ends."""
    try:
        yield
    finally:
        for kind in _all:
            kind.close()
