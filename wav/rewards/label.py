"""Labelling an episode store: the terms of Table 2 and the return over the planning window.

Rewards are labels: they are computed once per episode store, never while training::

    label_store(EpisodeStore.open("data/episodes"), settings.label_rewards, settings.data.action_chunk, "data/rewards")
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from wav.data.episode_shards import Progress, done, fill, opened
from wav.data.reward_store import FORMAT, VERSION, RewardStore, values_of
from wav.data.statistics import Statistics, compute_statistics
from wav.data.store import EpisodeStore
from wav.errors import DataError
from wav.io.files import atomic_folder, write_manifest
from wav.rewards.terms import RewardTerms, episode_rewards
from wav.shards import Mapper

if TYPE_CHECKING:
    from wav.config import LabelRewardsSettings


def returns(reward: NDArray[np.floating], gamma: float, horizon: int | None) -> NDArray[np.float32]:
    """Return v_t = sum_{i < horizon} gamma^i r_{t+i}, (T,) for rewards r_t (T,) and the discount gamma.

    After the final frame the last reward is held (the goal is absorbing). ``horizon`` None sums to the episode's end
    instead, without holding; such returns FALL toward success, because rewards are positive.
    DataError for a horizon below one.

    >>> returns(np.array([0.0, 1.0, 1.0]), gamma=0.5, horizon=2).tolist()
    [0.5, 1.5, 1.5]
    """
    r = np.asarray(reward, np.float64)
    if horizon is None:
        result, tail = np.empty(len(r)), 0.0
        for t in range(len(r) - 1, -1, -1):
            result[t] = tail = r[t] + gamma * tail
        return result.astype(np.float32)
    if horizon < 1:
        raise DataError(
            f"label_rewards.horizon = {horizon}: a return sums at least one step; use 0 for the action chunk"
        )
    held = np.concatenate([r, np.full(horizon - 1, r[-1])])
    windows = np.lib.stride_tricks.sliding_window_view(held, horizon)
    return np.asarray(windows @ gamma ** np.arange(horizon), dtype=np.float32)


def value_channels(terms: RewardTerms, settings: LabelRewardsSettings, action_chunk: int) -> NDArray[np.float32]:
    """Training targets of the value expert, (T, K + 1): the weighted terms, then the return."""
    horizon = None if settings.to_end else settings.horizon or action_chunk
    value = returns(terms.reward, settings.gamma, horizon)
    return np.concatenate([terms.weighted, value[:, None]], axis=1)


def label_shard(
    path: str,
    digest: str,
    which: range,
    settings: LabelRewardsSettings,
    action_chunk: int,
    folder: str,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Leave the values of the episodes ``which`` of the store at ``path`` in ``folder``."""
    episodes, values = opened(path, digest), []
    for index in which:
        terms = episode_rewards(episodes[index], settings, episodes.conventions.views)
        values.append(value_channels(terms, settings, action_chunk))
        if progress:
            progress(len(values[-1]))
    with atomic_folder(folder) as new:
        np.save(new / "values.npy", np.concatenate(values))


def label_store(
    episodes: EpisodeStore,
    settings: LabelRewardsSettings,
    action_chunk: int,
    out: str | Path,
    progress: Progress | None = None,
    run: Mapper | None = None,
) -> RewardStore:
    """Label every episode and write the reward store ``out`` atomically; shards that are there stay as they are.

    A return sums ``action_chunk`` steps where ``settings.horizon`` is 0; ``run`` labels shards elsewhere
    (:mod:`wav.cluster`); ``progress`` is told (steps done, steps in total).

    Raises:
        DataError: an episode without the views or sizes the reward needs, or a value that is not finite.
        StorageError: the disk is full.
    """
    out = Path(out)
    terms = episode_rewards(episodes[0], settings, episodes.conventions.views)
    plain = settings.model_dump(mode="json")
    with atomic_folder(out) as folder:
        shards = fill(
            folder,
            label_shard,
            episodes,
            (settings, action_chunk),
            identity=(plain, action_chunk),
            out=out,
            version=(FORMAT, VERSION),
            run=run,
            progress=progress,
        )
        np.save(folder / "offsets.npy", episodes.offsets)
        values = values_of(folder.joinpath, shards.rows, len(terms.names) + 1)
        Statistics({"value": compute_statistics(values, "zscore_symlog", "value statistics")}).save(
            folder / "statistics.json"
        )
        content = {
            "episodes": episodes.digest,
            "shards": shards.content,
            "names": list(terms.names),
            "weights": [float(weight) for weight in terms.weights],
            "action_chunk": action_chunk,
            "settings": plain,
        }
        write_manifest(folder, FORMAT, VERSION, content, shards.digests)
    done(out)
    return RewardStore.open(out, episodes)
