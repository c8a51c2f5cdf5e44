"""The table of a store's episodes, in columns: a million rows take a hundred megabytes on disk and few in memory.

``episodes.npy`` is one structured NumPy array, a row for each episode. Texts that repeat stand in the manifest once, in
the order in which they first came, and the row holds their number there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

FILE = "episodes.npy"
#: columns whose texts repeat
TEXTS = ("task", "instruction", "source", "style")
_BLOCK = 8192


class EpisodeInfo(NamedTuple):
    """One row of the episode table. ``start`` is the first row in its shard, ``offset`` in the whole store."""

    episode_id: str
    task: str
    instruction: str
    source: str
    style: str
    shard: int
    length: int
    init_index: int
    seed: int
    success: bool
    has_joints: bool
    has_expert: bool
    start: int = 0
    offset: int = 0


#: fields of :class:`EpisodeInfo` that stand in the file; the others follow from them
_STORED = EpisodeInfo._fields[:-2]


def _layout(width: int) -> np.dtype[Any]:
    """Type of a row whose longest id has ``width`` bytes."""
    numbers = dict.fromkeys((*TEXTS, "shard", "length"), "<i4") | {"init_index": "<i8", "seed": "<i8"}
    return np.dtype([(name, numbers.get(name, "?") if name != "episode_id" else f"S{width}") for name in _STORED])


class EpisodeTable(Sequence[EpisodeInfo]):
    """The episodes of a store in their order; rows are made when they are asked for.

    ``rows`` (E,) are the structured array of the file, ``texts`` the distinct texts of each column of :data:`TEXTS`.
    ValueError where this is no table, or its shards do not follow one another.
    """

    def __init__(self, rows: NDArray[Any], texts: Mapping[str, Sequence[str]]) -> None:
        if rows.ndim != 1 or not rows.dtype.names or rows.dtype != _layout(rows.dtype[0].itemsize) or not len(rows):
            raise ValueError(f"{FILE}: {rows.dtype} {rows.shape} is no table of episodes")
        self.texts = {name: tuple(texts[name]) for name in TEXTS}
        for name, known in self.texts.items():
            if rows[name].min() < 0 or rows[name].max() >= len(known) or any(type(text) is not str for text in known):
                raise ValueError(f"{name}: numbers and texts do not fit each other")
        steps = np.diff(rows["shard"], prepend=-1)
        if steps[0] != 1 or steps.min() < 0 or steps.max() > 1 or rows["length"].min() < 1:
            raise ValueError("episodes: an episode is not where the one before ends")
        self._rows = rows
        #: (S + 1,) first episode of every shard, and the number of episodes at the end
        self.firsts = np.append(np.flatnonzero(steps), len(rows))
        #: (E + 1,) first row of every episode in the concatenated frame order, and the total at the end
        self.offsets = np.concatenate([[0], np.cumsum(rows["length"], dtype=np.int64)])

    @classmethod
    def read(cls, path: Path, texts: Mapping[str, Sequence[str]]) -> EpisodeTable:
        """The table in a file that was found to be what its manifest says."""
        return cls(np.load(path, mmap_mode="r", allow_pickle=False), texts)

    def column(self, name: str) -> NDArray[Any]:
        """(E,) a column as it is stored; of a text, its number in ``texts[name]``."""
        return np.asarray(self._rows[name])

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> EpisodeInfo: ...
    @overload
    def __getitem__(self, index: slice) -> list[EpisodeInfo]: ...
    def __getitem__(self, index: int | slice) -> EpisodeInfo | list[EpisodeInfo]:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            return list(self._between(start, max(start, stop)))[::step]
        place = range(len(self))[index]
        return next(self._between(place, place + 1))

    def __iter__(self) -> Iterator[EpisodeInfo]:
        for start in range(0, len(self), _BLOCK):
            yield from self._between(start, min(start + _BLOCK, len(self)))

    def _between(self, first: int, last: int) -> Iterator[EpisodeInfo]:
        offsets = self.offsets[first:last]
        starts = offsets - self.offsets[self.firsts[self._rows["shard"][first:last]]]
        texts = [self.texts[name] for name in TEXTS]
        rows = zip(self._rows[first:last].tolist(), starts.tolist(), offsets.tolist(), strict=True)
        for (name, *values), start, offset in rows:
            named = [known[number] for known, number in zip(texts, values, strict=False)]
            yield EpisodeInfo._make([name.decode(), *named, *values[len(named) :], start, offset])


class TableWriter:
    """Collects rows, then writes the file."""

    def __init__(self) -> None:
        self.ids: set[bytes] = set()
        self._rows: list[tuple[Any, ...]] = []
        self._texts: dict[str, dict[str, int]] = {name: {} for name in TEXTS}

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, info: EpisodeInfo) -> None:
        """Append an episode; ``start`` and ``offset`` follow from those before it."""
        name = info.episode_id.encode()
        self.ids.add(name)
        numbers = [known.setdefault(getattr(info, text), len(known)) for text, known in self._texts.items()]
        self._rows.append((name, *numbers, *info[5:-2]))

    @property
    def table(self) -> EpisodeTable:
        """What was added so far; ValueError where that is nothing."""
        width = max(1, *map(len, self.ids), 1)
        return EpisodeTable(np.array(self._rows, _layout(width)), self.texts)

    @property
    def texts(self) -> dict[str, list[str]]:
        """The distinct texts, for the manifest."""
        return {name: list(known) for name, known in self._texts.items()}

    def write(self, folder: Path) -> EpisodeTable:
        """Write the file; returns what is in it."""
        table = self.table
        np.save(folder / FILE, table._rows)
        return table
