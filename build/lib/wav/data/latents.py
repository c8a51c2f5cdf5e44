"""The latent store: every frame, every window's future clip and every instruction, encoded once.

Training reads only this and the small arrays of the episode store; codec and T5 are never loaded there
(:mod:`wav.data.encode` makes the store, and opens what made it). Rows follow the episode store's concatenated frame
order. Layout of the folder::

    manifest.json    format version; digests of episodes, codec and text encoder; frame grid; size and SHA-256 per file
    shard-00000/image.npy  (N, V, C, h, w) float32: each frame as a single image (memory); shards as in the episodes
    shard-00000/clip.npy   (N, V, C, Ff, h, w) float32: frames t + stride * (1 .. future_frames), the last repeated
    text.npy         (n, L, Ct) float32, text_mask.npy (n, L) bool; one row per instruction, "" among them
    codec/, text_encoder/
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from wav.data.store import shard_folder
from wav.errors import DataError
from wav.io.arrays import ShardedArray, open_array
from wav.io.files import check_files, manifest_digest, manifest_files, read_manifest
from wav.io.readers import understood
from wav.io.storage.streaming import reader

if TYPE_CHECKING:
    from wav.codec import Codec
    from wav.config import DataSettings
    from wav.data.store import EpisodeStore
    from wav.text import TextEncoder

FORMAT, VERSION = "wav-latents", 2
REMEDY = "encode the episodes again with `dvc repro encode`"


@dataclass(frozen=True)
class FrameGrid:
    """Which frames a window's future clip holds."""

    stride: int
    future_frames: int

    def rows(self, start: int, stop: int, length: int) -> NDArray[np.int64]:
        """(stop - start, future_frames) frame indices of the windows at start..stop-1 of an episode of ``length``."""
        steps = np.arange(start, stop)[:, None] + self.stride * np.arange(1, self.future_frames + 1)
        return np.asarray(np.minimum(steps, length - 1))


def latents_of(file: Callable[[str], Path], rows: Sequence[int], kind: str, row: Sequence[int]) -> ShardedArray:
    """The latents of all shards; ``kind`` is "image" or "clip", ``file`` gives the local path of a store's file."""
    shape = tuple(int(size) for size in row)
    return ShardedArray(rows, lambda shard: file(f"{shard_folder(shard)}/{kind}.npy"), shape, np.float32, remedy=REMEDY)


class LatentStore:
    """Read access to ``data/latents``; open it with :meth:`open`."""

    def __init__(self, path: Path, manifest: Mapping[str, Any]) -> None:
        self.path, self._manifest = path, manifest
        self.instructions = tuple(str(text) for text in manifest["instructions"])
        self.views = tuple(str(view) for view in manifest["views"])
        self.episodes_digest, self.codec_digest = str(manifest["episodes"]), str(manifest["codec"])
        self.text_digest, self.text_tokens = str(manifest["text"]), int(manifest["text_tokens"])
        self.grid = FrameGrid(int(manifest["stride"]), int(manifest["future_frames"]))
        self.psnr: dict[str, dict[str, float]] = manifest["psnr"]
        texts = (len(self.instructions), self.text_tokens)
        rows = [int(shard["rows"]) for shard in manifest["shards"]]
        file = reader(path, manifest_files(manifest))
        #: (N, V, C, h, w) every frame as an image, and (N, V, C, Ff, h, w) the future clip of the window at every frame
        self.image, self.clip = (latents_of(file, rows, kind, manifest[kind]) for kind in ("image", "clip"))
        #: (n, L, Ct) embeddings of the instructions, and (n, L) which tokens are real
        self.text = open_array(path / "text.npy", (*texts, None), np.float32, remedy=REMEDY)
        self.text_mask = open_array(path / "text_mask.npy", texts, np.bool_, remedy=REMEDY)
        self.digest = manifest_digest(manifest)

    @classmethod
    def open(
        cls,
        path: str | Path,
        episodes: EpisodeStore | None = None,
        data: DataSettings | None = None,
        codec: Codec | None = None,
        text_encoder: TextEncoder | None = None,
    ) -> LatentStore:
        """Open a store and check that it was made from what the caller holds (whatever is given).

        Raises:
            DataError: something is missing, truncated, of another version, or made from other episodes, another codec,
                another text encoder or another frame grid; names which.
        """
        path = Path(path)
        with understood(path, REMEDY):
            store = cls(path, read_manifest(path, FORMAT, VERSION, remedy=REMEDY))
        pairs = [
            ("episodes", store.episodes_digest, episodes.digest if episodes else None),
            ("codec", store.codec_digest, codec.digest if codec else None),
            ("text encoder", store.text_digest, text_encoder.digest if text_encoder else None),
        ]
        if data is not None:
            pairs += [
                ("data.frame_stride", str(store.grid.stride), str(data.frame_stride)),
                ("data.future_frames", str(store.grid.future_frames), str(data.future_frames)),
                ("data.text_tokens", str(store.text_tokens), str(data.text_tokens)),
                ("data.views", ",".join(store.views), ",".join(data.views)),
            ]
        for name, mine, theirs in pairs:
            if theirs is not None and mine != theirs:
                raise DataError(f"{path}: made with {name} {mine[:12]}, not {theirs[:12]}; {REMEDY}")
        return store

    @property
    def empty_text(self) -> int:
        """Row of ``text`` that holds the empty instruction (caption dropout)."""
        return self.row("")

    def row(self, instruction: str) -> int:
        """Row of ``text`` that holds ``instruction``; DataError where it was not encoded."""
        if instruction not in self.instructions:
            raise DataError(f"{self.path}: instruction {instruction!r} was not encoded; {REMEDY}")
        return self.instructions.index(instruction)

    def verify(self) -> None:
        """Compare every file's content with the manifest's SHA-256; DataError names the first that differs."""
        remedy = f"remove {self.path}, then {REMEDY}"  # DVC takes the folder for unchanged
        check_files(manifest_files(self._manifest), self.path, remedy=remedy, digests=True)
