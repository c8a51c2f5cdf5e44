"""The episode store: few large memory-mapped shards, written atomically.

Layout of the folder::

    manifest.json            format version, conventions, texts of the table, size and SHA-256 of every file
    episodes.npy             the table of the episodes (:mod:`wav.data.table`)
    statistics.json          normalisation statistics of label actions and states
    quarantine.json          rejected episodes, each with its reason
    source.json              datasets only: what was read, detected, declared and changed
    shard-00000/images.<view>.npy (N, H, W, 3) uint8, state.npy, actions.npy[, expert_actions.npy][, joints.npy]

A shard holds whole episodes that have the same fields. The concatenated frame order (shard by shard, episode by
episode) is the row order of ``data/rewards`` and ``data/latents``, whose shards are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import DTypeLike, NDArray

from wav.data.conventions import Conventions
from wav.data.episode import Episode
from wav.data.statistics import Statistics
from wav.data.table import FILE, EpisodeInfo, EpisodeTable
from wav.io.arrays import ShardedArray
from wav.io.files import (
    MANIFEST,
    canonical_digest,
    check_files,
    manifest_digest,
    manifest_files,
    read_json,
    read_manifest,
)
from wav.io.readers import understood
from wav.io.storage.streaming import reader

__all__ = ["EpisodeInfo", "EpisodeStore", "Rejection"]
FORMAT, VERSION = "wav-episodes", 2
REMEDY = "make the episodes again with `dvc repro ingest`"
#: fields of an episode that stand in the episode table as they are
CARRIED = ("episode_id", "task", "instruction", "success", "init_index", "seed", "source", "style")
Field = Literal["state", "actions", "labels"]


@dataclass(frozen=True)
class Rejection:
    """One rejected episode."""

    episode: str
    task: str
    reason: str


def shard_folder(index: int) -> str:
    """Name of a shard's folder, in every store."""
    return f"shard-{index:05d}"


def field(table: EpisodeTable, name: str, file: Callable[[str], Path], row: tuple[int | None, ...]) -> ShardedArray:
    """One field of all shards; "labels" are the actions to learn: ``expert_actions`` where a shard has them.

    Args:
        table: of the store.
        name: of the field.
        file: local path of a file of the store.
        row: shape of one row; None where any size will do.
    """
    dtype: DTypeLike = np.uint8 if name.startswith("images.") else np.float32

    def path(shard: int) -> Path:
        stem = name
        if name == "labels":
            stem = "expert_actions" if table.column("has_expert")[table.firsts[shard]] else "actions"
        return file(f"{shard_folder(shard)}/{stem}.npy")

    return ShardedArray(np.diff(table.offsets[table.firsts]), path, row, dtype, remedy=REMEDY)


class EpisodeStore:
    """Read access to a store; open it with :meth:`open`. ``store[i]`` is an :class:`Episode` of zero-copy views."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.conventions = Conventions.from_json(manifest["conventions"], str(path / MANIFEST))
        self.digest, self._files = manifest_digest(manifest), manifest_files(manifest)
        check_files([record for record in self._files if record.path == FILE], path, remedy=REMEDY, digests=True)
        self.episodes = EpisodeTable.read(path / FILE, manifest["texts"])
        #: (E + 1,) first row of every episode in the concatenated frame order, and the total at the end
        self.offsets, self.frames = self.episodes.offsets, int(self.episodes.offsets[-1])
        self.statistics = Statistics.load(path / "statistics.json", REMEDY)
        self.rejected = tuple(Rejection(**row) for row in read_json(path / "quarantine.json", REMEDY))
        image = (self.conventions.image_height, self.conventions.image_width, 3)
        shapes: dict[str, tuple[int | None, ...]] = {f"images.{view}": image for view in self.conventions.views}
        shapes |= dict.fromkeys(("state", "actions", "labels", "expert_actions", "joints"), (None,))
        file = reader(path, self._files)
        self._fields = {name: field(self.episodes, name, file, row) for name, row in shapes.items()}

    @classmethod
    def open(cls, path: str | Path) -> EpisodeStore:
        """Open a store; DataError names what is missing, truncated or of another version, and the remedy."""
        path = Path(path)
        with understood(path, REMEDY):
            return cls(path, read_manifest(path, FORMAT, VERSION, remedy=REMEDY))

    def __len__(self) -> int:
        return len(self.episodes)

    def __getitem__(self, index: int) -> Episode:
        info = self.episodes[index]
        rows = slice(info.offset, info.offset + info.length)
        return Episode(
            **{name: getattr(info, name) for name in CARRIED},
            images={view: self._fields[f"images.{view}"][rows] for view in self.conventions.views},
            state=self._fields["state"][rows],
            joints=self._fields["joints"][rows] if info.has_joints else None,
            actions=self._fields["actions"][rows],
            expert_actions=self._fields["expert_actions"][rows] if info.has_expert else None,
        )

    @property
    def instructions(self) -> tuple[str, ...]:
        """Distinct instructions, sorted."""
        return tuple(sorted(self.episodes.texts["instruction"]))

    @property
    def shard_rows(self) -> NDArray[np.int64]:
        """(S,) rows of every shard."""
        return np.asarray(np.diff(self.offsets[self.episodes.firsts]))

    def shard(self, index: int) -> range:
        """The episodes of one shard."""
        return range(*self.episodes.firsts[index : index + 2].tolist())

    @cached_property
    def shard_files(self) -> list[dict[str, str]]:
        """SHA-256 by name of every shard's files."""
        files: dict[str, dict[str, str]] = {}
        for record in self._files:
            folder, _, name = record.path.rpartition("/")
            files.setdefault(folder, {})[name] = record.sha256
        return [files[shard_folder(index)] for index in range(len(self.shard_rows))]

    def shard_digests(self) -> list[str]:
        """What each shard holds, whatever its number and the other shards: its files and its episodes' lengths."""
        lengths = np.split(self.episodes.column("length"), self.episodes.firsts[1:-1])
        return [canonical_digest([self.shard_files[i], own.tolist()]) for i, own in enumerate(lengths)]

    def images(self, view: str, rows: NDArray[np.integer]) -> NDArray[np.uint8]:
        """Frames (n, H, W, 3) of one view at rows (n,) of the concatenated order."""
        return self._fields[f"images.{view}"][rows]

    def rows(self, field: Field, rows: NDArray[np.integer]) -> NDArray[np.float32]:
        """Rows (n, D) of a field at rows (n,) of the concatenated order; "labels" are the actions to learn."""
        return self._fields[field][rows]

    @property
    def trained(self) -> tuple[ShardedArray, ...]:
        """The fields that training reads."""
        return self._fields["state"], self._fields["labels"]

    def concatenated(self, field: Field) -> NDArray[np.float32]:
        """Rows (frames, D) of a field over the whole store; "labels" are the actions to learn."""
        return self._fields[field][:]

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
