"""Writing an episode store: shard by shard, visible under its final name only when it is whole."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from numpy.typing import NDArray

from wav.data.conventions import Conventions
from wav.data.episode import Episode
from wav.data.statistics import Statistics, compute_statistics
from wav.data.store import CARRIED, FORMAT, VERSION, EpisodeStore, Rejection, field, shard_folder
from wav.data.table import EpisodeInfo, TableWriter
from wav.errors import DataError
from wav.io.arrays import ArrayWriter
from wav.io.files import atomic_folder, link, write_json, write_manifest
from wav.shards import SHARD_BYTES


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
        shard_bytes: a new shard begins once the current one holds this many bytes of pixels.
    """

    def __init__(self, path: str | Path, conventions: Conventions, shard_bytes: int = SHARD_BYTES) -> None:
        self.path, self.conventions, self.shard_bytes = Path(path), conventions, shard_bytes
        self._stack = ExitStack()
        self._table = TableWriter()
        self._rejected: list[Rejection] = []
        self._sizes: tuple[int, int] | None = None
        self._digests: dict[str, str] = {}
        self._writers: dict[str, ArrayWriter] = {}
        self._layout: dict[str, tuple[int, ...]] = {}
        self._shard, self._bytes, self.frames = -1, 0, 0

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
                self._close()

    @property
    def count(self) -> int:
        """Episodes written so far."""
        return len(self._table)

    @property
    def tasks(self) -> set[str]:
        """Tasks of the episodes written so far."""
        return set(self._table.texts["task"])

    def add(self, episode: Episode) -> None:
        """Append one episode; DataError where it is malformed, repeats an id or does not fit the conventions."""
        episode.validate()
        self._check_fit(episode)
        arrays = _fields(episode)
        layout = {name: rows.shape[1:] for name, rows in arrays.items()}
        if layout != self._layout or self._bytes >= self.shard_bytes:
            self._close()
            self._shard, self._bytes, self._layout = self._shard + 1, 0, layout
            folder = self._folder / shard_folder(self._shard)
            self._writers = {n: ArrayWriter(folder / f"{n}.npy", layout[n], rows.dtype) for n, rows in arrays.items()}
        for name, rows in arrays.items():
            self._writers[name].append(rows)
        self._table.add(
            EpisodeInfo(
                **{name: getattr(episode, name) for name in CARRIED},
                shard=self._shard,
                length=episode.length,
                has_joints=episode.joints is not None,
                has_expert=episode.expert_actions is not None,
            )
        )
        self.frames += episode.length
        self._bytes += sum(frames.nbytes for frames in episode.images.values())

    def quarantine(self, episode_id: str, task: str, reason: str) -> None:
        """Record an episode that was not written, and why."""
        self._rejected.append(Rejection(episode_id, task, reason))

    def describe(self, source: Mapping[str, Any]) -> None:
        """Keep what is known about the source as ``source.json``."""
        write_json(self._folder / "source.json", dict(source))

    def adopt(self, store: EpisodeStore, shards: range | None = None) -> range:
        """Append another store's shards, all or some, by linking their files; no pixel is copied on the same disk.

        So a store grows without being written again: adopt what lies at ``path``, then add the new episodes. Returns
        the numbers that the shards have here.

        Raises:
            DataError: its conventions or dimensions differ, or it repeats an id.
        """
        differing = self.conventions.difference(store.conventions)
        if differing:
            raise DataError(f"{store.path}: its conventions differ ({'; '.join(differing)}); ingest it again")
        taken = range(len(store.shard_rows)) if shards is None else shards
        infos = [info for index in taken for info in store.episodes[store.shard(index).start : store.shard(index).stop]]
        for index in taken:
            self._check_fit(store[store.shard(index).start])
        twice = next((info.episode_id for info in infos if info.episode_id.encode() in self._table.ids), None)
        if twice is not None:
            raise DataError(f"episode {twice}: is in the store already; give every episode its own id")
        self._close()
        base, self._writers, self._layout = self._shard + 1 - taken.start, {}, {}
        for index in taken:
            for name, digest in store.shard_files[index].items():
                target = f"{shard_folder(base + index)}/{name}"
                link(store.path / shard_folder(index) / name, self._folder / target)
                self._digests[target] = digest
        for info in infos:
            self._table.add(info._replace(shard=base + info.shard))
            self.frames += info.length
        self._shard = base + taken.stop - 1
        return range(base + taken.start, base + taken.stop)

    def _check_fit(self, episode: Episode) -> None:
        """Compare an episode with the conventions and the episodes before it."""
        where, want = f"episode {episode.episode_id}", self.conventions
        if episode.episode_id.encode() in self._table.ids:
            raise DataError(f"{where}: is in the store already; give every episode its own id")
        if episode.views != want.views:
            raise DataError(f"{where}: views {episode.views} where data.views is {want.views}; record the same cameras")
        for view, frames in episode.images.items():
            if frames.shape[1:3] != (want.image_height, want.image_width):
                raise DataError(
                    f"{where}: images[{view!r}] are {frames.shape[1]}x{frames.shape[2]} where data.image_height x "
                    f"data.image_width is {want.image_height}x{want.image_width}; resize them at the source"
                )
        sizes = (episode.state.shape[1], episode.actions.shape[1])
        self._sizes = self._sizes or sizes
        for name, mine, known in zip(("state", "actions"), sizes, self._sizes, strict=True):
            if mine != known:
                raise DataError(
                    f"{where}: {name} has {mine} dimensions where earlier episodes have {known}; "
                    "put robots of different kinds into different stores"
                )

    def _close(self) -> None:
        """Complete the files of the shard in work."""
        for writer in self._writers.values():
            writer.close()

    def _finish(self) -> None:
        """Write statistics, quarantine report and manifest."""
        self._close()
        if not len(self._table):
            reason = (
                f" (first of {len(self._rejected)} rejections: {self._rejected[0].reason})" if self._rejected else ""
            )
            raise DataError(f"{self.path}: no episode was accepted{reason}; check the source")
        table = self._table.write(self._folder)
        rows = {name: field(table, name, self._folder.joinpath, (None,)) for name in ("labels", "state")}
        statistics = Statistics(
            {
                "action": compute_statistics(rows["labels"], "quantile", "action statistics"),
                "state": compute_statistics(rows["state"], "quantile", "state statistics"),
            }
        )
        statistics.save(self._folder / "statistics.json")
        write_json(self._folder / "quarantine.json", [asdict(rejection) for rejection in self._rejected])
        content = {"conventions": self.conventions.to_json(), "texts": self._table.texts}
        write_manifest(self._folder, FORMAT, VERSION, content, self._digests)
