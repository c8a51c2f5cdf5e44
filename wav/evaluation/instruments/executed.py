"""What chunks really return: executed in a simulator, rewarded by Table 2; in simulator processes, without torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from wav.data.episode import Episode
from wav.rewards.terms import episode_rewards
from wav.sim.futures import Branch, Segment, executed, of_all

if TYPE_CHECKING:
    from wav.config import DataSettings, LabelRewardsSettings


def executed_returns(
    suite: str, data: DataSettings, branch: Branch, chunks: NDArray[np.float32], settings: LabelRewardsSettings
) -> NDArray[np.float64]:
    """Realised returns (M,) of chunks (M, A, 7), each executed from the branch's state."""
    pairs = zip(executed(suite, data, branch, chunks), chunks, strict=True)
    return np.array([realised_return(branch, segment, chunk, settings, data.views) for segment, chunk in pairs])


def all_returns(
    data: DataSettings,
    settings: LabelRewardsSettings,
    workers: int,
    chunks: Sequence[tuple[Branch, NDArray[np.float32]]],
) -> list[NDArray[np.float64]]:
    """:func:`executed_returns` for each of ``chunks``, in their order, in ``workers`` processes.

    Raises:
        SimulationError: a simulator kept dying.
    """
    return of_all(executed_returns, [(data.suite, data, *chunk, settings) for chunk in chunks], workers)


def realised_return(
    branch: Branch, segment: Segment, actions: NDArray[np.float32], settings: LabelRewardsSettings, views: Sequence[str]
) -> float:
    """Return v_t of Table 2 that a chunk really reached, with the expert's final frame as the reference.

    ``segment`` is what was seen, A + 1 observations, while ``actions`` (A, 7) were executed. The sum runs over
    ``label_rewards.horizon`` like a label's; what of it is beyond the chunk, the robot rests where the chunk ended.
    """
    seen = [*segment.seen, branch.final]
    joints = [observation.joints for observation in seen if observation.joints is not None]
    episode = Episode(
        episode_id=f"{branch.task}/{branch.index}/{branch.step}",
        task=branch.task,
        instruction=branch.seen[-1].instruction,
        images={view: np.stack([observation.images[view] for observation in seen]) for view in views},
        state=np.stack([observation.state for observation in seen]),
        joints=np.stack(joints) if len(joints) == len(seen) else None,
        actions=np.concatenate([actions, actions[-1:], actions[-1:]]),
        expert_actions=None,
        success=segment.solved,
        init_index=branch.index,
        seed=0,
        source="executed candidate",
    )
    terms, length = episode_rewards(episode, settings, tuple(views)), len(actions)
    horizon, rest = settings.horizon or length, np.maximum(terms.weighted[length], 0).sum()  # costs are of motion
    reward = np.concatenate([terms.reward[:length], np.full(max(0, horizon - length), rest)])
    return float((reward[:horizon] * settings.gamma ** np.arange(horizon)).sum())
