"""Oracle: how well the action is decoded given the true future and values, given imagined ones, given none.

The error is the distance from the demonstration's own chunk. What the truth saves against pure noise is what the action
expert can read of a future at all; what imagination loses against the truth is what better imagining could still win.
Where demonstrations differ in style, no imagined future can know which one this was.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from wav.data.windows import WindowDataset
from wav.evaluation.held_out import held_out_share
from wav.evaluation.instruments.given import decode_given
from wav.evaluation.pictures import evenly
from wav.planning.planner import Planner
from wav.planning.types import PUBLISHED, RowKey, SeededNoise
from wav.seeding import numpy_generator

if TYPE_CHECKING:
    from wav.data.latents import LatentStore
    from wav.data.reward_store import RewardStore
    from wav.data.store import EpisodeStore
    from wav.data.windows import WindowBatch
    from wav.policy.policy import Policy

WINDOWS = 64


def held_out_windows(
    store: EpisodeStore,
    latents: LatentStore,
    rewards: RewardStore | None,
    policy: Policy,
    count: int = WINDOWS,
) -> WindowBatch:
    """Windows spread over held-out demonstrations, one of each task."""
    windows = WindowDataset(store, latents, rewards, policy.data, "validation", held_out_share(store))
    chosen = np.array(evenly(len(windows), count), dtype=np.int64)
    return windows.batch(chosen, numpy_generator(0, "oracle"))


def oracle(policy: Policy, batch: WindowBatch, seed: int = 0) -> dict[str, float]:
    """Root mean square errors of normalised actions against the demonstrations', by what they were decoded on.

    The policy acts unplanned.

    Returns:
        ``truth``: on the true future and values; ``future``, ``values``: on that alone, the other imagined;
        ``imagined``: as the policy acts; ``none``: on pure noise.
    """
    model, width = policy.model, policy.data.action_dim
    history = torch.nn.functional.pad(batch.state, (width, 0))[:, None]
    true = batch.actions[..., :width].to(model.device)
    future, values = batch.future.to(model.device), None if batch.values is None else batch.values.to(model.device)
    given = {"truth": (future, values), "future": (future, None), "values": (None, values), "imagined": (None, None)}
    if values is None:
        del given["values"]
    blind = Planner(model, policy.planner, policy.returns, PUBLISHED)
    noise = SeededNoise([RowKey(seed, f"oracle/{i}", 0) for i in range(len(batch))], model.device)
    with torch.inference_mode():
        context = model.begin(batch.memory, batch.text, batch.text_mask, history)
        actions = {name: decode_given(policy, context, noise, *each) for name, each in given.items()}
        actions["none"] = blind.plan(context, noise, variant="unplanned").actions[..., :width]
    return {name: round(float((found - true).square().mean().sqrt()), 4) for name, found in actions.items()}
