"""Rows of a LeRobot dataset's parquet files, one episode at a time, each file's index read once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from wav.data.sources.lerobot_entries import Entry
from wav.data.sources.lerobot_meta import damage_named
from wav.data.sources.open_files import stays_open
from wav.errors import DataError

_EPISODE = "episode_index"
_INDICES = (_EPISODE, "frame_index")
#: column -> (test of its type, what it should hold)
_SCALARS: Mapping[str, tuple[Callable[[pa.DataType], bool], str]] = {
    _EPISODE: (pa.types.is_integer, "integers"),
    "frame_index": (pa.types.is_integer, "integers"),
    "task_index": (pa.types.is_integer, "integers"),
    "timestamp": (pa.types.is_floating, "seconds as floating-point numbers"),
}


class RowFile:
    """An open parquet file of episodes."""

    def __init__(self, path: Path) -> None:
        self._file = pq.ParquetFile(path)
        schema = self._file.schema_arrow
        self.types = dict(zip(schema.names, schema.types, strict=True))
        self._spans: list[tuple[int, int] | None] | None = None

    def read(self, columns: list[str], episode: int) -> pa.Table:
        """The rows of one episode, in the file's order; only the row groups that may hold some are read."""
        table = self._file.read_row_groups(self._groups(episode), [*columns, _EPISODE], use_threads=False)
        return table.filter(pc.equal(table[_EPISODE], episode)).select(columns)

    def _groups(self, episode: int) -> list[int]:
        """Row groups whose statistics do not exclude an episode."""
        if self._spans is None:
            self._spans = list(self._read_spans())
        return [i for i, span in enumerate(self._spans) if span is None or span[0] <= episode <= span[1]]

    def _read_spans(self) -> Iterator[tuple[int, int] | None]:
        """(first, last) episode of every row group; None where the file does not tell."""
        metadata = self._file.metadata
        column = next(i for i in range(metadata.num_columns) if metadata.schema.column(i).path == _EPISODE)
        for group in range(metadata.num_row_groups):
            statistics = metadata.row_group(group).column(column).statistics
            yield (statistics.min, statistics.max) if statistics is not None and statistics.has_min_max else None


open_rows = stays_open(RowFile)


def episode_rows(entry: Entry, columns: list[str]) -> pa.Table:
    """Columns, and ``frame_index``, of one episode, by frame.

    Raises:
        DataError: the file is missing or damaged, or a column is missing or of another type.
    """
    with damage_named(entry.data):
        file = open_rows(entry.data)
        lacking = [name for name in (*columns, *_INDICES) if name not in file.types]
        if lacking:
            raise DataError(f"{entry.data}: column {lacking[0]!r} is missing; download the dataset again")
        for name in {*columns, *_INDICES} & set(_SCALARS):
            kind, (fits, wanted_kind) = file.types[name], _SCALARS[name]
            if not fits(kind):
                raise DataError(f"{entry.data}: column {name!r} has type {kind}; record {wanted_kind}")
        table = file.read(list(dict.fromkeys([*columns, "frame_index"])), entry.index)
    return table.sort_by("frame_index")
