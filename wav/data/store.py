"""The episode store: few large memory-mapped shards, written atomically.

Layout of the folder::

    manifest.json            format version, conventions, episode table, size and SHA-256 of every file
    statistics.json          normalisation statistics of label actions and states
    quarantine.json          rejected episodes, each with its reason
    source.json              datasets only: what was read, detected, declared and changed
    shard-00000/images.<view>.npy (N, H, W, 3) uint8, state.npy, actions.npy[, expert_actions.npy][, joints.npy]

A shard holds whole episodes that have the same fields. The concatenated frame order (shard by shard, episode by
episode) is the row order of ``data/rewards`` and ``data/latents``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_type_hints

import numpy as np
from numpy.typing import NDArray

from wav.data.conventions import Conventions
from wav.data.episode import Episode
from wav.data.statistics import Statistics
from wav.errors import shown
from wav.io.arrays import open_array
from wav.io.files import (
    MANIFEST,
    check_files,
    manifest_digest,
    manifest_files,
    read_json,
    read_manifest,
)
from wav.io.readers import understood

FORMAT, VERSION = "wav-episodes", 1
REMEDY = "make the episodes again with `dvc repro ingest`"
#: fields of an episode that stand in the episode table as they are
CARRIED = ("episode_id", "task", "instruction", "success", "init_index", "seed", "source", "style")


class EpisodeInfo(NamedTuple):
    """One row of the episode table. ``start`` is the first row in its shard, ``offset`` in the whole store.

    A tuple, because a store may hold a million of them.
    """

    episode_id: str
    task: str
    instruction: str
    shard: int
    start: int
    length: int
    success: bool
    init_index: int
    seed: int
    source: str
    has_joints: bool
    has_expert: bool
    offset: int
    style: str


@dataclass(frozen=True)
class Rejection:
    """One rejected episode."""

    episode: str
    task: str
    reason: str


_FIELDS = itemgetter(*EpisodeInfo._fields)
_TYPES = tuple(get_type_hints(EpisodeInfo).values())


def _read_table(rows: list[dict[str, Any]], frames: int) -> Iterator[EpisodeInfo]:
    """The episodes of a manifest, whose ``rows`` go; ValueError where they are not one after the other, all frames."""
    offset, shard, start = 0, -1, 0
    known: dict[str, str] = {}
    rows.reverse()
    while rows:
        row = rows.pop()
        values = _FIELDS(row)
        if len(row) != len(values) or tuple(map(type, values)) != _TYPES:
            raise ValueError(f"episodes: {shown(row)}")
        info = EpisodeInfo._make(known.setdefault(v, v) if type(v) is str else v for v in values)
        if info.start == 0:
            shard, start = shard + 1, 0
        if (info.offset, info.shard, info.start) != (offset, shard, start) or info.length < 1:
            raise ValueError(f"episodes: {shown(info.episode_id)} is not where the one before ends")
        offset, start = offset + info.length, start + info.length
        yield info
    if offset != frames:
        raise ValueError(f"frames = {frames}: the episodes have {offset}")


class EpisodeStore:
    """Read access to a store; open it with :meth:`open`. ``store[i]`` is an :class:`Episode` of zero-copy views."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.conventions = Conventions.from_json(manifest["conventions"], str(path / MANIFEST))
        self.frames, self.digest, self._files = (
            int(manifest["frames"]),
            manifest_digest(manifest),
            manifest_files(manifest),
        )
        self.episodes = tuple(_read_table(manifest["episodes"], self.frames))
        self.statistics = Statistics.load(path / "statistics.json", REMEDY)
        self.rejected = tuple(Rejection(**row) for row in read_json(path / "quarantine.json", REMEDY))
        #: (E + 1,) first row of every episode in the concatenated frame order, and the total at the end
        self.offsets = np.array([*(info.offset for info in self.episodes), self.frames], dtype=np.int64)
        #: (S + 1,) first row of every shard in the same order, and the total at the end
        self._shard_offsets = np.array(
            [*(info.offset for info in self.episodes if info.start == 0), self.frames], dtype=np.int64
        )
        starts = [info for info in self.episodes if info.start == 0]
        self._shards = [self._map_shard(index, first) for index, first in enumerate(starts)]

    @classmethod
    def open(cls, path: str | Path) -> EpisodeStore:
        """Open a store, checking format, version and the size of every file.

        Raises:
            DataError: something is missing, truncated or of another version; names the file and the remedy.
        """
        path = Path(path)
        with understood(path, REMEDY):
            return cls(path, read_manifest(path, FORMAT, VERSION, remedy=REMEDY))

    def _map_shard(self, index: int, first: EpisodeInfo) -> dict[str, NDArray[Any]]:
        """Memory-map the files of one shard, which ``first`` begins."""
        rows = int(self._shard_offsets[index + 1] - self._shard_offsets[index])
        want, folder = self.conventions, self.path / f"shard-{index:05d}"
        image = (rows, want.image_height, want.image_width, 3)
        arrays = {
            f"images.{view}": open_array(folder / f"images.{view}.npy", image, np.uint8, remedy=REMEDY)
            for view in want.views
        }
        names = ["state", "actions", *["expert_actions"] * first.has_expert, *["joints"] * first.has_joints]
        for name in names:
            arrays[name] = open_array(folder / f"{name}.npy", (rows, None), np.float32, remedy=REMEDY)
        return arrays

    def __len__(self) -> int:
        return len(self.episodes)

    def __getitem__(self, index: int) -> Episode:
        info = self.episodes[index]
        rows = {name: a[info.start : info.start + info.length] for name, a in self._shards[info.shard].items()}
        return Episode(
            **{name: getattr(info, name) for name in CARRIED},
            images={view: rows[f"images.{view}"] for view in self.conventions.views},
            state=rows["state"],
            joints=rows.get("joints"),
            actions=rows["actions"],
            expert_actions=rows.get("expert_actions"),
        )

    @property
    def instructions(self) -> tuple[str, ...]:
        """Distinct instructions, sorted."""
        return tuple(sorted({info.instruction for info in self.episodes}))

    def images(self, view: str, rows: NDArray[np.integer]) -> NDArray[np.uint8]:
        """Frames (n, H, W, 3) of one view at rows (n,) of the concatenated order."""
        return self._gather(f"images.{view}", rows)

    def rows(self, field: Literal["state", "actions", "labels"], rows: NDArray[np.integer]) -> NDArray[np.float32]:
        """Rows (n, D) of a field at rows (n,) of the concatenated order; "labels" are the actions to learn."""
        return self._gather(field, rows)

    def _gather(self, name: str, rows: NDArray[np.integer]) -> NDArray[Any]:
        rows = np.asarray(rows, dtype=np.int64)
        first = self._field(0, name)
        result = np.empty((len(rows), *first.shape[1:]), first.dtype)
        shards = np.searchsorted(self._shard_offsets, rows, side="right") - 1
        for shard in np.unique(shards):
            here = shards == shard
            result[here] = self._field(shard, name)[rows[here] - self._shard_offsets[shard]]
        return result

    def _field(self, shard: int, name: str) -> NDArray[Any]:
        """A file of one shard."""
        arrays = self._shards[shard]
        return arrays.get("expert_actions", arrays["actions"]) if name == "labels" else arrays[name]

    def concatenated(self, field: Literal["state", "actions", "labels"]) -> NDArray[np.float32]:
        """Rows (frames, D) of a field over the whole store; "labels" are the actions to learn."""
        return np.concatenate([self._field(shard, field) for shard in range(len(self._shards))])

    def file_digests(self) -> dict[str, str]:
        """SHA-256 by path of every file of the store."""
        return {record.path: record.sha256 for record in self._files}

    def verify(self, images: bool = True) -> None:
        """Compare every file's content with the manifest's SHA-256; DataError names the first that differs.

        ``images``: those too, which are nearly all of the store.
        """
        remedy = f"remove {self.path}, then {REMEDY}"  # DVC takes the folder for unchanged
        records = [record for record in self._files if images or "/images." not in record.path]
        check_files(records, self.path, remedy=remedy, digests=True)
