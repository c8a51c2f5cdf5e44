"""What is wrong with a file that its library cannot read, told by what lies there and not by the library's guess."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py

from wav.errors import DataError

#: first bytes of what a version control system leaves in a large file's place -> how to fetch the file itself
POINTERS = {
    b"version https://git-lfs": "a Git LFS pointer; run `git lfs pull` in its folder",
    b"/annex/objects/": "a git-annex pointer; run `git annex get` in its folder",
}


def unreadable(path: Path, kind: str, error: Exception) -> DataError:
    """A DataError that names the file, what it is and the remedy.

    ``kind`` is what it should be, such as ``parquet file``; ``error`` what its library said.
    """
    said = " ".join(str(error).split())
    try:
        with path.open("rb") as file:
            head = file.read(64)
            size = file.seek(0, 2)
            file.seek(max(0, size - 4))
            tail = file.read(4)
    except FileNotFoundError:
        return DataError(f"{path}: missing; download the dataset again")
    except OSError as denied:
        return DataError(f"{path}: cannot be read ({denied.strerror or denied}); correct its permissions or its disk")
    pointer = next((remedy for begin, remedy in POINTERS.items() if head.startswith(begin)), "")
    if pointer:
        return DataError(f"{path}: is no {kind} but {pointer}")
    if "unable to lock file" in said:
        return DataError(
            f"{path}: is open for writing in another program; wait until that has closed it, or, on a disk without "
            "locks, set HDF5_USE_FILE_LOCKING=FALSE"
        )
    if head.startswith(b"PAR1") and tail != b"PAR1":
        return DataError(
            f"{path}: has no end: its recording was not finished (LeRobot: dataset.finalize()) or its download broke "
            "off, and nothing in it can be read; record or download it again"
        )
    return DataError(f"{path}: truncated or damaged {kind} ({said if size else 'it is empty'}); download it again")


@contextmanager
def opened_hdf5(path: Path) -> Iterator[Any]:
    """An HDF5 file, open for reading; DataError names it where the library cannot read what is looked for."""
    try:
        with h5py.File(path, "r") as file:
            yield file
    except (OSError, RuntimeError, KeyError) as error:
        raise unreadable(path, "HDF5 file", error) from None
