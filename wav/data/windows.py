"""Training windows: one sample per (episode e, step t), gathered from memory-mapped latents, actions and values.

Every step t in [0, T - 1] of every episode is a window. It holds m memory frames (the current one and m - 1 earlier
ones drawn from the last ``memory_horizon`` steps), the future clip, and A actions, states and values from t on. Past
the episode's end frames, states and values repeat and the robot holds still (spec section 7, item 14).

A batch is a pure function of (seed, step): :class:`BatchSampler` gives rank r its share of the global batch of a step
and of the draws that choose its memories, so that the number of ranks changes nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from wav.data.conventions import ABSOLUTE_ACTIONS, DELTA_ACTIONS
from wav.data.store import EpisodeStore
from wav.errors import ConfigError, DataError
from wav.io.arrays import ShardedArray
from wav.seeding import numpy_generator

if TYPE_CHECKING:
    from wav.config import DataSettings
    from wav.data.latents import LatentStore
    from wav.data.reward_store import RewardStore

Split = Literal["train", "validation"]
#: Windows of which an epoch's order is a list in memory (half a gigabyte for the two that are kept).
PERMUTED = 2**25


@dataclass(frozen=True)
class WindowBatch:
    """B windows as float32 tensors (``text_mask`` bool, ``episode`` and ``step`` int64)."""

    memory: torch.Tensor
    """(B, V, C, Fm, h, w), the current frame last."""
    future: torch.Tensor
    """(B, V, C, Ff, h, w)."""
    text: torch.Tensor
    """(B, L, Ct)."""
    text_mask: torch.Tensor
    """(B, L)."""
    state: torch.Tensor
    """(B, S), the current one, normalised."""
    actions: torch.Tensor
    """(B, A, 7 + S): normalised label actions | normalised states."""
    values: torch.Tensor | None
    """(B, A, Cv), normalised: weighted reward terms | return; None without rewards."""
    episode: torch.Tensor
    """(B,) index into the episode store."""
    step: torch.Tensor
    """(B,) environment step of the current frame."""

    def __len__(self) -> int:
        return len(self.step)

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> WindowBatch:
        """The batch with ``change`` applied to every tensor."""
        return replace(self, **{name: change(value) for name, value in vars(self).items() if value is not None})

    def to(self, device: torch.device | str) -> WindowBatch:
        """The batch on another device."""
        return self._map(lambda value: value.to(device))

    def rows(self, start: int, stop: int) -> WindowBatch:
        """Rows [start, stop) as views: a micro batch."""
        return self._map(lambda value: value[start:stop])


def scattered(places: NDArray[np.int64], n: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """Images (B,) of ``places`` (B,) under a random permutation of range(n) that is never written down.

    A Feistel network of six rounds permutes the numbers of as many bits as n - 1 has, rounded up to an even count; one
    that falls outside is sent on until it falls inside (cycle walking), less than four times on average.
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = generator.integers(0, 2**64, 12, np.uint64)
    result = places.astype(np.uint64)
    outside = np.ones(len(places), bool)
    while outside.any():
        left, right = result[outside] >> half, result[outside] & mask
        for add, multiply in keys.reshape(6, 2):
            mixed = (right + add) * (multiply | np.uint64(1))  # modulo 2^64
            left, right = right, left ^ ((mixed ^ (mixed >> np.uint64(29))) >> np.uint64(32) & mask)
        result[outside] = left << half | right
        outside = result >= n
    return result.astype(np.int64)


class BatchSampler:
    """Endless shuffled epochs; the state is one integer, the global step.

    ``batch_size`` is that of all ranks together; their number must divide it.
    """

    def __init__(self, n: int, batch_size: int, seed: int, rank: int = 0, ranks: int = 1) -> None:
        if n < 1:
            raise DataError("windows: 0 in this split; ingest more episodes or lower validation_share")
        if batch_size < 1 or batch_size % ranks:
            raise ConfigError(
                f"batch_size = {batch_size}: must be a positive multiple of the {ranks} ranks; change either"
            )
        self.n, self.batch_size, self.seed = n, batch_size, seed
        share = batch_size // ranks
        self._share = slice(rank * share, (rank + 1) * share)
        self._epochs: dict[int, NDArray[np.int64]] = {}

    def _shuffled(self, epoch: int, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """The windows at these places of an epoch's order."""
        if self.n > PERMUTED:
            return scattered(places, self.n, numpy_generator(self.seed, "epoch", epoch))
        if epoch not in self._epochs:
            self._epochs = {old: order for old, order in self._epochs.items() if old == epoch - 1}
            self._epochs[epoch] = numpy_generator(self.seed, "epoch", epoch).permutation(self.n)
        return self._epochs[epoch][places]

    def indices(self, step: int) -> NDArray[np.int64]:
        """(batch_size / ranks,) window indices of this rank at a global step."""
        epochs, places = np.divmod(np.arange(self.batch_size)[self._share] + step * self.batch_size, self.n)
        result = np.empty(len(places), np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            result[here] = self._shuffled(int(epoch), places[here])
        return result

    def draws(self, step: int, count: int) -> NDArray[np.float64]:
        """(batch_size / ranks, count) uniform draws in [0, 1) of this rank at a global step."""
        return numpy_generator(self.seed, "memory", step).random((self.batch_size, count))[self._share]


def sample_memory(step: NDArray[np.int64], horizon: int, draws: NDArray[np.float64]) -> NDArray[np.int64]:
    """Steps (n, k) of earlier frames for windows at steps (n,): k distinct ones of the last ``horizon``, sorted.

    Where fewer than k steps went before they are drawn with replacement; at step 0 frame 0 repeats. Uniform over
    subsets; ``draws`` (n, k) in [0, 1) are all the randomness there is.
    """
    count = draws.shape[1]
    population = np.minimum(step, horizon)
    picks = np.empty((len(step), 0), np.int64)
    for j in range(count):
        # the r-th step not picked yet: move r past every earlier pick, smallest first
        pick = (draws[:, j] * np.maximum(population - j, 1)).astype(np.int64)
        for earlier in picks.T:
            pick += pick >= earlier
        picks = np.sort(np.concatenate([picks, pick[:, None]], axis=1), axis=1)
    repeated = np.sort((draws * np.maximum(population, 1)[:, None]).astype(np.int64), axis=1)
    picks = np.where((population >= count)[:, None], picks, repeated)
    return (step - population)[:, None] + picks


def split_episodes(store: EpisodeStore, split: Split, validation_share: float) -> NDArray[np.int64]:
    """Episode indices (sorted) of a split.

    The held-out ``round(share * E)`` episodes (at least one for a share above 0) are shared out evenly over the tasks
    and depend on the episodes' ids alone, never on a seed: all training stages hold out the same ones.

    Raises:
        ConfigError: the share is not in [0, 1). DataError: no episode would be left to train on.
    """
    if not 0.0 <= validation_share < 1.0:
        raise ConfigError(f"validation_share = {validation_share}: must lie in [0, 1)")
    held = max(1, round(validation_share * len(store))) if validation_share else 0
    if held >= len(store):
        raise DataError(
            f"{store.path}: {len(store)} episode(s) cannot be split with validation_share = {validation_share}; "
            "ingest more episodes or set validation_share to 0"
        )
    names = store.episodes.column("episode_id").tolist()
    digests = np.frombuffer(b"".join(hashlib.sha256(name).digest() for name in names), "S32")
    drawn = np.argsort(digests, kind="stable")
    task = store.episodes.column("task")[drawn]
    by_task = np.argsort(task, kind="stable")
    ends = np.cumsum(np.bincount(task))
    place = np.empty(len(store), np.int64)  # of an episode among those of its task
    place[by_task] = np.arange(len(store)) - np.repeat(ends - np.bincount(task), np.bincount(task))
    order = drawn[np.argsort(place, kind="stable")]
    return np.sort(order[:held] if split == "validation" else order[held:])


class WindowDataset:
    """All windows of one split.

    Latents and rewards were made from ``episodes``, which they check when they are opened with it; ``rewards`` is None
    where a stage needs none.

    Raises:
        DataError: too few episodes to split.
    """

    def __init__(
        self,
        episodes: EpisodeStore,
        latents: LatentStore,
        rewards: RewardStore | None,
        data: DataSettings,
        split: Split = "train",
        validation_share: float = 0.05,
    ) -> None:
        self.data, self.split = data, split
        self.statistics = episodes.statistics.merged(*([rewards.statistics] if rewards is not None else []))
        self._image, self._clip = latents.image, latents.clip
        self._text, self._text_mask = np.asarray(latents.text), np.asarray(latents.text_mask)
        self._empty = latents.empty_text
        rows = {instruction: row for row, instruction in enumerate(latents.instructions)}
        texts = np.array([rows[text] for text in episodes.episodes.texts["instruction"]], np.int64)
        self._text_row = texts[episodes.episodes.column("instruction")]
        self._start, self._length = episodes.offsets[:-1], np.diff(episodes.offsets)
        self._episodes, self._values = episodes, None if rewards is None else rewards.values
        if (kind := episodes.conventions.action) not in (DELTA_ACTIONS, ABSOLUTE_ACTIONS):
            raise DataError(
                f"{episodes.path}: conventions.action = {kind!r}: unknown; "
                f"expected {DELTA_ACTIONS} or {ABSOLUTE_ACTIONS}"
            )
        self._chosen = split_episodes(episodes, split, validation_share)
        self._ends = np.cumsum(self._length[self._chosen])

    def _hold(self, episode: NDArray[np.int64]) -> NDArray[np.float32]:
        """(B, A) what continues episodes (B,) past their end, normalised: no motion for deltas, the gripper held."""
        hold = self._episodes.rows("labels", self._start[episode] + self._length[episode] - 1)
        if self._episodes.conventions.action == DELTA_ACTIONS:
            hold[:, :-1] = 0.0
        return self.statistics.normalize_actions(hold)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def places(self, indices: NDArray[np.integer]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(B,) episodes and (B,) steps of the windows at ``indices``."""
        which = np.searchsorted(self._ends, indices, side="right")
        episode = self._chosen[which]
        return episode, np.asarray(indices - (self._ends[which] - self._length[episode]))

    @property
    def shards(self) -> NDArray[np.int64]:
        """(S,) windows of every shard of the store."""
        shard = self._episodes.episodes.column("shard")[self._chosen]
        return np.bincount(shard, self._length[self._chosen], len(self._episodes.shard_rows)).astype(np.int64)

    def expect(self, indices: NDArray[np.integer]) -> None:
        """Have the shards of windows that will be asked for opened, and brought here where they are elsewhere."""
        shards = np.unique(self._episodes.episodes.column("shard")[self.places(indices)[0]])
        arrays = [a for a in (self._image, self._clip, self._values) if isinstance(a, ShardedArray)]
        for shard in shards.tolist():
            for array in (*arrays, *self._episodes.trained):
                array.shard(shard)

    @property
    def empty_text(self) -> torch.Tensor:
        """(L, Ct) embedding of the empty instruction, for caption dropout."""
        return torch.from_numpy(np.array(self._text[self._empty], dtype=np.float32))

    @property
    def empty_text_mask(self) -> torch.Tensor:
        """(L,) bool mask of the empty instruction."""
        return torch.from_numpy(np.array(self._text_mask[self._empty], dtype=bool))

    def at(self, sampler: BatchSampler, step: int) -> WindowBatch:
        """This rank's batch of a global training step."""
        return self.batch(sampler.indices(step), sampler.draws(step, self.data.memory_frames - 1))

    def batch(self, indices: NDArray[np.integer], draws: np.random.Generator | NDArray[np.float64]) -> WindowBatch:
        """Gather the windows at ``indices`` (B,).

        Args:
            indices: into this split's windows.
            draws: generator, or uniform draws (B, memory_frames - 1) in [0, 1), that choose the earlier frames.
        """
        earlier = self.data.memory_frames - 1
        if isinstance(draws, np.random.Generator):
            draws = draws.random((len(indices), earlier))
        episode, step = self.places(indices)
        start, length = self._start[episode], self._length[episode]
        memory = np.concatenate([sample_memory(step, self.data.memory_horizon, draws), step[:, None]], axis=1)
        memory += start[:, None]
        ahead = step[:, None] + np.arange(self.data.action_chunk)
        rows = start[:, None] + np.minimum(ahead, length[:, None] - 1)
        past = ahead >= length[:, None]
        states = self.statistics.normalize_state(self._at("state", rows))
        labels = self.statistics.normalize_actions(self._at("labels", rows))
        actions = np.where(past[..., None], self._hold(episode)[:, None], labels)
        values = None
        if self._values is not None:
            values = torch.from_numpy(self.statistics.normalize_values(self._values[rows]))
        text_row = self._text_row[episode]
        frames = torch.from_numpy(self._image[memory])  # (B, Fm, V, C, h, w)
        return WindowBatch(
            memory=frames.permute(0, 2, 3, 1, 4, 5).contiguous(),
            future=torch.from_numpy(self._clip[start + step]),
            text=torch.from_numpy(self._text[text_row]),
            text_mask=torch.from_numpy(self._text_mask[text_row]),
            state=torch.from_numpy(states[:, 0].copy()),
            actions=torch.from_numpy(np.concatenate([actions, states], axis=-1)),
            values=values,
            episode=torch.from_numpy(episode),
            step=torch.from_numpy(step),
        )

    def _at(self, field: Literal["state", "labels"], rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Rows (B, A, D) of the episode store at rows (B, A)."""
        found = self._episodes.rows(field, rows.reshape(-1))
        return found.reshape(*rows.shape, found.shape[-1])
