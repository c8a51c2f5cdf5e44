"""Writing an episode store: shard by shard, visible under its final name only when it is whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wav.data.conventions import Conventions
from wav.data.episode import Episode
from wav.data.statistics import Statistics, compute_statistics
from wav.data.store import CARRIED, FORMAT, VERSION, EpisodeInfo, EpisodeStore, Rejection
from wav.errors import DataError
from wav.io.arrays import ArrayWriter
from wav.io.files import atomic_folder, write_json, write_manifest


def _fields(episode: Episode) -> dict[str, NDArray[Any]]:
    """File stem -> rows of one episode."""
    arrays: dict[str, NDArray[Any]] = {f"images.{view}": frames for view, frames in episode.images.items()}
    arrays |= {"state": episode.state, "actions": episode.actions}
    if episode.expert_actions is not None:
        arrays["expert_actions"] = episode.expert_actions
    if episode.joints is not None:
        arrays["joints"] = episode.joints
    return arrays


class EpisodeStoreWriter:
    """Writes a store; the folder appears under its final name when the ``with`` block ends without an error.

    Args:
        path: final folder; an existing one is replaced.
        conventions: what the arrays mean; every episode must have its views and image size.
        shard_bytes: a new shard begins once the current one holds this many bytes.
    """

    def __init__(self, path: str | Path, conventions: Conventions, shard_bytes: int = 256 * 2**20) -> None:
        self.path, self.conventions, self.shard_bytes = Path(path), conventions, shard_bytes
        self._stack = ExitStack()
        self._table: list[dict[str, Any]] = []
        self._rejected: list[Rejection] = []
        self._ids: set[str] = set()
        self._labels: list[NDArray[np.float32]] = []
        self._states: list[NDArray[np.float32]] = []
        self._digests: dict[str, str] = {}
        self._writers: dict[str, ArrayWriter] = {}
        self._layout: dict[str, tuple[int, ...]] = {}
        self._shard, self._rows, self._bytes, self.frames = -1, 0, 0, 0

    def __enter__(self) -> EpisodeStoreWriter:
        self._folder = self._stack.enter_context(atomic_folder(self.path))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # whatever goes wrong while finishing must reach atomic_folder as well, which then removes everything
        with self._stack:
            try:
                if error is not None:
                    raise error
                self._finish()
            finally:
                for writer in self._writers.values():
                    writer.close()

    @property
    def count(self) -> int:
        """Episodes written so far."""
        return len(self._table)

    def add(self, episode: Episode) -> None:
        """Append one episode.

        Raises:
            DataError: it is malformed, duplicates an id, or does not fit the conventions.
            StorageError: the disk is full.
        """
        episode.validate()
        self._check_fit(episode)
        arrays = _fields(episode)
        layout = {name: rows.shape[1:] for name, rows in arrays.items()}
        if layout != self._layout or self._bytes >= self.shard_bytes:
            self._open_shard(arrays, layout)
        for name, rows in arrays.items():
            self._writers[name].append(rows)
        row = EpisodeInfo(
            **{name: getattr(episode, name) for name in CARRIED},
            shard=self._shard,
            start=self._rows,
            length=episode.length,
            has_joints=episode.joints is not None,
            has_expert=episode.expert_actions is not None,
            offset=self.frames,
        )
        self._table.append(row._asdict())
        self._ids.add(episode.episode_id)
        self._labels.append(np.array(episode.labels()))
        self._states.append(np.array(episode.state))
        self._rows += episode.length
        self.frames += episode.length
        self._bytes += sum(rows.nbytes for rows in arrays.values())

    def quarantine(self, episode_id: str, task: str, reason: str) -> None:
        """Record an episode that was not written, and why."""
        self._rejected.append(Rejection(episode_id, task, reason))

    def describe(self, source: Mapping[str, Any]) -> None:
        """Keep what is known about the source as ``source.json``."""
        write_json(self._folder / "source.json", dict(source))

    def adopt(self, store: EpisodeStore) -> None:
        """Append all episodes of another store by linking its files; no pixel is copied on the same disk.

        Raises:
            DataError: its conventions or dimensions differ, or it repeats an id.
        """
        differing = self.conventions.difference(store.conventions)
        if differing:
            raise DataError(f"{store.path}: its conventions differ ({'; '.join(differing)}); ingest it again")
        self._check_fit(store[0])
        twice = next((info.episode_id for info in store.episodes if info.episode_id in self._ids), None)
        if twice is not None:
            raise DataError(f"episode {twice}: is in the store already; give every episode its own id")
        for writer in self._writers.values():
            writer.close()
        base, self._writers, self._layout = self._shard + 1, {}, {}
        for path, digest in store.file_digests().items():
            shard, _, name = path.partition("/")
            if name:
                target = f"shard-{base + int(shard.removeprefix('shard-')):05d}/{name}"
                _link(store.path / path, self._folder / target)
                self._digests[target] = digest
        for index, info in enumerate(store.episodes):
            episode = store[index]
            self._table.append({**info._asdict(), "shard": base + info.shard, "offset": self.frames})
            self._ids.add(info.episode_id)
            self._labels.append(np.array(episode.labels()))
            self._states.append(np.array(episode.state))
            self._shard = base + info.shard
            self.frames += info.length

    def _check_fit(self, episode: Episode) -> None:
        """Compare an episode with the conventions and the episodes before it."""
        where, want = f"episode {episode.episode_id}", self.conventions
        if episode.episode_id in self._ids:
            raise DataError(f"{where}: is in the store already; give every episode its own id")
        if episode.views != want.views:
            raise DataError(f"{where}: views {episode.views} where data.views is {want.views}; record the same cameras")
        for view, frames in episode.images.items():
            if frames.shape[1:3] != (want.image_height, want.image_width):
                raise DataError(
                    f"{where}: images[{view!r}] are {frames.shape[1]}x{frames.shape[2]} where data.image_height x "
                    f"data.image_width is {want.image_height}x{want.image_width}; resize them at the source"
                )
        for name, mine, kept in (("state", episode.state, self._states), ("actions", episode.actions, self._labels)):
            if kept and mine.shape[1:] != kept[0].shape[1:]:
                raise DataError(
                    f"{where}: {name} has {mine.shape[1]} dimensions where earlier episodes have {kept[0].shape[1]}; "
                    "put robots of different kinds into different stores"
                )

    def _open_shard(self, arrays: dict[str, NDArray[Any]], layout: dict[str, tuple[int, ...]]) -> None:
        """Begin the next shard with these fields."""
        for writer in self._writers.values():
            writer.close()
        self._shard, self._rows, self._bytes, self._layout = self._shard + 1, 0, 0, layout
        folder = self._folder / f"shard-{self._shard:05d}"
        self._writers = {n: ArrayWriter(folder / f"{n}.npy", rows.shape[1:], rows.dtype) for n, rows in arrays.items()}

    def _finish(self) -> None:
        """Write statistics, quarantine report and manifest."""
        for writer in self._writers.values():
            writer.close()
        if not self._table:
            reason = (
                f" (first of {len(self._rejected)} rejections: {self._rejected[0].reason})" if self._rejected else ""
            )
            raise DataError(f"{self.path}: no episode was accepted{reason}; check the source")
        statistics = Statistics(
            {
                "action": compute_statistics(np.concatenate(self._labels), "quantile", "action statistics"),
                "state": compute_statistics(np.concatenate(self._states), "quantile", "state statistics"),
            }
        )
        statistics.save(self._folder / "statistics.json")
        write_json(self._folder / "quarantine.json", [asdict(rejection) for rejection in self._rejected])
        content = {"conventions": self.conventions.to_json(), "frames": self.frames, "episodes": self._table}
        write_manifest(self._folder, FORMAT, VERSION, content, self._digests)


def _link(source: Path, target: Path) -> None:
    """A second name for a file, or a copy where the file system has no links."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
