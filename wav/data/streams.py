"""Shuffling for stores that no machine holds as a whole: each rank reads shards of its own.

The shards are dealt out to a fixed number of streams. A batch takes equally many windows from each stream, and a rank
has the rows of its streams alone, so that it reads their shards and no others. A stream goes through its shards in a
new random order every epoch, a few at a time, whose windows are mixed. What a batch holds depends on (seed, step) and
on the number of streams, never on the number of ranks.
"""

from __future__ import annotations

from collections import deque

import numpy as np
from numpy.typing import NDArray

from wav.data.windows import BatchSampler
from wav.errors import ConfigError
from wav.seeding import numpy_generator

#: Shards whose windows are mixed with each other.
MIXED = 8
#: A stream's windows from a place on: epoch, place in the epoch of the first, windows in their order.
_Mixed = tuple[int, int, NDArray[np.int64]]


class StreamSampler(BatchSampler):
    """Endless epochs of every stream; the state is one integer, the global step.

    Args:
        shards: (S,) windows of every shard; those of a split follow each other shard by shard.
        batch_size: global batch, over all ranks.
        seed: of dealing, shuffling and memory draws.
        rank: this one of ``ranks`` processes.
        ranks: all of them.
        streams: number of streams, a multiple of ``ranks`` that divides ``batch_size``; ConfigError where it is not.
    """

    def __init__(
        self, shards: NDArray[np.int64], batch_size: int, seed: int, rank: int = 0, ranks: int = 1, streams: int = 1
    ) -> None:
        super().__init__(int(shards.sum()), batch_size, seed, rank, ranks)
        filled = int((shards > 0).sum())
        if streams % ranks or batch_size % streams or filled < streams:
            raise ConfigError(
                f"streams = {streams}: must be a multiple of the {ranks} ranks, divide the batch of {batch_size} and "
                f"be at most the {filled} shards with windows; change it, or set it to 0"
            )
        self._counts, self._firsts = shards, np.cumsum(shards) - shards
        self._each = batch_size // streams
        self._mine = range(rank * streams // ranks, (rank + 1) * streams // ranks)
        self._shards = self._dealt(streams)
        self._recent: dict[int, deque[_Mixed]] = {stream: deque(maxlen=2) for stream in self._mine}

    def _dealt(self, streams: int) -> list[NDArray[np.int64]]:
        """The shards of every stream: at random, the largest first, each to the stream that has the fewest windows."""
        drawn = numpy_generator(self.seed, "streams").permutation(np.flatnonzero(self._counts))
        windows, dealt = [0] * streams, [[] for _ in range(streams)]  # type: tuple[list[int], list[list[int]]]
        for shard in drawn[np.argsort(-self._counts[drawn], kind="stable")].tolist():
            stream = windows.index(min(windows))
            windows[stream] += int(self._counts[shard])
            dealt[stream].append(shard)
        return [np.array(own, np.int64) for own in dealt]

    def indices(self, step: int) -> NDArray[np.int64]:
        """(batch_size / ranks,) window indices of this rank at a global step."""
        parts = []
        for stream in self._mine:
            windows = int(self._counts[self._shards[stream]].sum())
            place, left = step * self._each, self._each
            while left:
                epoch, within = divmod(place, windows)
                start, order = self._mixed(stream, epoch, within)
                parts.append(order[within - start : within - start + left])
                place, left = place + len(parts[-1]), left - len(parts[-1])
        return np.concatenate(parts)

    def _mixed(self, stream: int, epoch: int, place: int) -> tuple[int, NDArray[np.int64]]:
        """The mixed windows among which a place of a stream's epoch lies, and the place of the first of them."""
        recent = self._recent[stream]
        for known, start, order in recent:
            if known == epoch and start <= place < start + len(order):
                return start, order
        shards = numpy_generator(self.seed, "stream", stream, epoch).permutation(self._shards[stream])
        ends = np.cumsum(self._counts[shards])
        first = int(np.searchsorted(ends, place, side="right")) // MIXED * MIXED
        chosen, start = shards[first : first + MIXED], int(ends[first - 1]) if first else 0
        windows = np.concatenate([self._firsts[s] + np.arange(self._counts[s]) for s in chosen])
        order = numpy_generator(self.seed, "mixed", stream, epoch, first).permutation(windows)
        recent.append((epoch, start, order))
        return start, order
