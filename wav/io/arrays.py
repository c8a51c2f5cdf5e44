"""NumPy files: written row by row, opened as memory maps with a check of shape and type, many of them as one array."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from wav.errors import DataError, cut


class ArrayWriter:
    """A ``.npy`` file grown row by row with plain writes (a full disk is an error, never a SIGBUS as with memmap).

    Args:
        path: file to write.
        row_shape: shape of one row; the file holds N of them.
        dtype: element type.
    """

    def __init__(self, path: str | Path, row_shape: Sequence[int], dtype: DTypeLike) -> None:
        self.path, self.row_shape, self.dtype = Path(path), tuple(int(n) for n in row_shape), np.dtype(dtype)
        self.rows = 0
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "wb")  # noqa: SIM115 - closed by close(), which callers reach through `with`
        self._write_header()

    def _write_header(self) -> None:
        """NumPy leaves room in a header for the first axis to grow, so that it can be filled in at the end."""
        fields = {"descr": self.dtype.str, "fortran_order": False, "shape": (self.rows, *self.row_shape)}
        np.lib.format.write_array_header_1_0(self._file, fields)

    def append(self, rows: NDArray[Any]) -> None:
        """Add rows (n, ...).

        Raises:
            DataError: another row shape or dtype than the file has.
        """
        if rows.shape[1:] != self.row_shape or rows.dtype != self.dtype:
            raise DataError(
                f"{self.path}: rows of {rows.dtype} {rows.shape[1:]} where the file holds {self.dtype} "
                f"{self.row_shape}; make every episode of a store alike"
            )
        self._file.write(np.ascontiguousarray(rows).data)
        self.rows += len(rows)

    def close(self) -> None:
        """Fill in the row count and close the file."""
        if not self._file.closed:
            self._file.seek(0)
            self._write_header()
            self._file.close()

    def __enter__(self) -> ArrayWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_array(path: str | Path, shape: Sequence[int | None], dtype: DTypeLike, *, remedy: str) -> NDArray[Any]:
    """Memory-map a ``.npy`` file read-only; DataError where it is of another shape (None: any size) or type."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # the header is Python text, whose parser has many ways to say no
        raise DataError(f"{path}: not a readable .npy file ({cut(error)}); {remedy}") from None
    if not isinstance(array, np.ndarray):  # a .npz
        raise DataError(f"{path}: {type(array).__name__} where one array is expected; {remedy}")
    fits = array.ndim == len(shape) and all(want in (None, have) for want, have in zip(shape, array.shape, strict=True))
    if not fits or array.dtype != np.dtype(dtype):
        raise DataError(
            f"{path}: {array.dtype} {array.shape} where {np.dtype(dtype)} {tuple(shape)} is expected; {remedy}"
        )
    return np.asarray(array)


class ShardedArray:
    """Rows (N, ...) that lie in one file for each shard; a file is memory-mapped when its rows are first asked for.

    Indexed as an array is along its first axis: by a number, a slice or whole numbers of any shape, none of them
    negative. Rows of one shard that a slice asks for are a view of the file.

    Args:
        rows: rows of every shard.
        file: path of a shard's file; DataError where it is not to be had.
        row: shape of one row; None where any size will do.
        dtype: element type.
        remedy: ends the message where a file is something else.
    """

    def __init__(
        self,
        rows: Sequence[int] | NDArray[np.integer],
        file: Callable[[int], Path],
        row: Sequence[int | None],
        dtype: DTypeLike,
        *,
        remedy: str,
    ) -> None:
        #: (S + 1,) first row of every shard, and the total at the end
        self.offsets = np.concatenate([[0], np.cumsum(rows, dtype=np.int64)])
        self.dtype, self._row, self._file, self._remedy = np.dtype(dtype), tuple(row), file, remedy
        self._open: dict[int, NDArray[Any]] = {}

    def __len__(self) -> int:
        return int(self.offsets[-1])

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, ...); a shard is opened where a size was left open."""
        row = self.shard(0).shape[1:] if None in self._row else self._row
        return (len(self), *(size for size in row if size is not None))

    def shard(self, index: int) -> NDArray[Any]:
        """Rows (n, ...) of one shard."""
        found = self._open.get(index)
        if found is None:
            shape = (int(self.offsets[index + 1] - self.offsets[index]), *self._row)
            found = self._open[index] = open_array(self._file(index), shape, self.dtype, remedy=self._remedy)
        return found

    def __getitem__(self, rows: int | slice | NDArray[np.integer]) -> NDArray[Any]:
        if isinstance(rows, slice):
            start, stop, step = rows.indices(len(self))
            if step == 1 and start < stop:
                first, last = np.searchsorted(self.offsets, (start, stop - 1), side="right") - 1
                ends = self.offsets[first : last + 2]
                parts = [
                    self.shard(int(first) + i)[max(start - ends[i], 0) : stop - ends[i]] for i in range(len(ends) - 1)
                ]
                return parts[0] if len(parts) == 1 else np.concatenate(parts)
            rows = np.arange(start, stop, step)
        flat = np.asarray(rows, np.int64).reshape(-1)
        if len(self.offsets) == 2:
            return self.shard(0)[rows]
        shards = np.searchsorted(self.offsets, flat, side="right") - 1
        found = {int(shard): self.shard(int(shard)) for shard in np.unique(shards)}
        row = next(iter(found.values())).shape[1:] if found else self.shape[1:]
        result = np.empty((len(flat), *row), self.dtype)
        for shard, part in found.items():
            here = shards == shard
            result[here] = part[flat[here] - self.offsets[shard]]
        return result.reshape(*np.shape(rows), *row)
