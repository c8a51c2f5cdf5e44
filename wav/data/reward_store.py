"""The reward store ``data/rewards``: labelled values of every step, made by :mod:`wav.rewards`.

Training and evaluation read it without the reward's formula; how many channels there are and what they are called, the
store itself says. Layout of the folder::

    manifest.json     format version; digest of the episodes, names and weights of the terms; size and SHA-256 per file
    offsets.npy       (E + 1,) int64: first row of every episode, and the number of rows
    statistics.json   normalisation statistics of the values
    shard-00000/values.npy  (N, K + 1) float32: weighted terms and, last, the return; shards and rows as in the episodes
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from wav.data.statistics import Statistics
from wav.data.store import shard_folder
from wav.errors import DataError
from wav.io.arrays import ShardedArray, open_array
from wav.io.files import check_files, manifest_digest, manifest_files, read_manifest
from wav.io.readers import understood
from wav.io.storage.streaming import reader

if TYPE_CHECKING:
    from wav.data.store import EpisodeStore

FORMAT, VERSION = "wav-rewards", 2
REMEDY = "label the episodes again with `dvc repro label_rewards`"


def values_of(file: Callable[[str], Path], rows: Sequence[int], channels: int) -> ShardedArray:
    """The values (N, channels) of all shards; ``file`` gives the local path of a file of the store."""
    return ShardedArray(
        rows, lambda shard: file(f"{shard_folder(shard)}/values.npy"), (channels,), np.float32, remedy=REMEDY
    )


class RewardStore:
    """Read access to ``data/rewards``; open it with :meth:`open`."""

    def __init__(self, path: Path, manifest: Mapping[str, Any]) -> None:
        self.path, self._manifest = path, manifest
        self.names = tuple(str(name) for name in manifest["names"])
        self.weights = np.array(manifest["weights"], np.float32)
        self.offsets = open_array(path / "offsets.npy", (None,), np.int64, remedy=REMEDY)
        self.episodes_digest = str(manifest["episodes"])
        file = reader(path, manifest_files(manifest))
        #: (N, K + 1) weighted terms and, last, the return; rows in the episode store's concatenated frame order
        self.values = values_of(file, [int(s["rows"]) for s in manifest["shards"]], len(self.names) + 1)
        self.statistics = Statistics.load(path / "statistics.json", REMEDY)
        self.digest = manifest_digest(manifest)

    @classmethod
    def open(cls, path: str | Path, episodes: EpisodeStore | None = None) -> RewardStore:
        """Open a store; DataError where it is not whole, or was not made from ``episodes``."""
        path = Path(path)
        with understood(path, REMEDY):
            store = cls(path, read_manifest(path, FORMAT, VERSION, remedy=REMEDY))
        if episodes is not None and store.episodes_digest != episodes.digest:
            raise DataError(
                f"{path}: made from episodes {store.episodes_digest[:12]}, {episodes.path} holds "
                f"{episodes.digest[:12]}; {REMEDY}"
            )
        return store

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def episode(self, index: int) -> NDArray[np.float32]:
        """Values (T, K + 1) of one episode."""
        return self.values[int(self.offsets[index]) : int(self.offsets[index + 1])]

    def verify(self) -> None:
        """Compare every file's content with the manifest's SHA-256; DataError names the first that differs."""
        remedy = f"remove {self.path}, then {REMEDY}"  # DVC takes the folder for unchanged
        check_files(manifest_files(self._manifest), self.path, remedy=remedy, digests=True)
