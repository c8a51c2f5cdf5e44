"""The reward store ``data/rewards``: labelled values of every step, made by :mod:`wav.rewards`.

Training and evaluation read it without the reward's formula; how many channels there are and what they are called, the
store itself says. Layout of the folder::

    manifest.json     format version; digest of the episodes, names and weights of the terms; size and SHA-256 per file
    values.npy        (N, K + 1) float32: weighted terms and, last, the return; rows in the episode store's frame order
    statistics.json   normalisation statistics of the values
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from wav.data.statistics import Statistics
from wav.errors import DataError
from wav.io.arrays import open_array
from wav.io.files import check_files, manifest_digest, manifest_files, read_manifest
from wav.io.readers import understood

if TYPE_CHECKING:
    from wav.data.store import EpisodeStore

FORMAT, VERSION = "wav-rewards", 1
REMEDY = "label the episodes again with `dvc repro label_rewards`"


class RewardStore:
    """Read access to ``data/rewards``; open it with :meth:`open`."""

    def __init__(self, path: Path, manifest: Mapping[str, Any]) -> None:
        self.path, self._manifest = path, manifest
        self.names = tuple(str(name) for name in manifest["names"])
        self.weights = np.array(manifest["weights"], np.float32)
        self.offsets = np.array(manifest["offsets"], np.int64)
        self.episodes_digest = str(manifest["episodes"])
        frames = int(manifest["frames"])
        #: (N, K + 1) weighted terms and, last, the return; rows in the episode store's concatenated frame order
        self.values = open_array(path / "values.npy", (frames, len(self.names) + 1), np.float32, remedy=REMEDY)
        self.statistics = Statistics.load(path / "statistics.json", REMEDY)
        self.digest = manifest_digest(manifest)

    @classmethod
    def open(cls, path: str | Path, episodes: EpisodeStore | None = None) -> RewardStore:
        """Open a store; with ``episodes``, check that it was made from them.

        Raises:
            DataError: something is missing, truncated, of another version, or made from other episodes.
        """
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
        rows: NDArray[np.float32] = self.values[self.offsets[index] : self.offsets[index + 1]]
        return rows

    def verify(self) -> None:
        """Compare every file's content with the manifest's SHA-256; DataError names the first that differs."""
        remedy = f"remove {self.path}, then {REMEDY}"  # DVC takes the folder for unchanged
        check_files(manifest_files(self._manifest), self.path, remedy=remedy, digests=True)
