"""NumPy files that are written row by row, and opened as memory maps with a check of shape and type."""

from __future__ import annotations

from collections.abc import Sequence
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
        """Add rows (n, ...)."""
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
    """Memory-map a ``.npy`` file read-only; ``None`` in ``shape`` accepts any size.

    Raises:
        DataError: not a ``.npy`` file, or of another shape or dtype; the message ends in ``remedy``.
    """
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
