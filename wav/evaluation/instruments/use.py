"""Use: how much of the decoded action's and of the predicted return's variance each noise explains.

A planner that searches over a noise which explains nothing cannot choose anything. Shapes as in
:mod:`wav.planning.types`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from wav.data.windows import split_episodes
from wav.evaluation.held_out import held_out_share, observed
from wav.evaluation.pictures import evenly
from wav.planning.types import RowKey, SeededNoise

if TYPE_CHECKING:
    from torch import Tensor

    from wav.data.store import EpisodeStore
    from wav.policy.policy import Policy
    from wav.sim.env import Observation

#: What a plan draws once for the noises that are acted on.
NOISES = {"video": "act.video", "value": "act.value", "action": "act.action"}
STATES, DRAWS = 16, 6


@dataclass(frozen=True)
class VaryOnly:
    """Draws in which the named purposes follow ``draw`` and all others stay those of draw 0."""

    keys: tuple[RowKey, ...]
    purposes: frozenset[str]
    draw: int
    device: torch.device

    def __call__(self, purpose: str, shape: tuple[int, ...], iteration: int = 0) -> Tensor:
        """Standard normal (B, *shape)."""
        call = self.draw if purpose in self.purposes else 0
        return SeededNoise([replace(key, call=call) for key in self.keys], self.device)(purpose, shape, iteration)


def noise_use(
    policy: Policy, histories: Sequence[Sequence[Observation]], draws: int = DRAWS, seed: int = 0
) -> dict[str, dict[str, float]]:
    """Shares of variance that each noise explains when it alone is drawn again.

    The policy acts unplanned. ``histories`` are, per state, what it has seen at its calls, now last.

    Returns:
        ``action``, and ``return`` (the predicted one's mean along the chunk; only with a value expert): noise ->
        variance over its draws, averaged over states, as a share of the variance when all three are drawn. Few draws
        may take a share above 1, and what noises do together is in none of them.
    """
    planner = policy.make_planner()
    keys = tuple(RowKey(seed, f"use/{index}", 0) for index in range(len(histories)))

    def variances(context: object, purposes: frozenset[str]) -> tuple[float, ...]:
        found: list[list[Tensor]] = [[], []]
        for draw in range(draws):
            noise = VaryOnly(keys, purposes, draw, policy.model.device)
            plan = planner.plan(context, noise, variant="unplanned", with_value=policy.has_values)
            found[0].append(plan.actions[..., : policy.data.action_dim])
            if plan.values is not None:
                found[1].append(policy.returns(plan.values).mean(-1))
        return tuple(float(torch.stack(several).var(0).mean()) for several in found if several)

    with torch.inference_mode():
        context = policy.context(histories)
        whole = variances(context, frozenset(NOISES.values()))
        alone = {name: variances(context, frozenset({purpose})) for name, purpose in NOISES.items()}
    return {
        what: {name: round(part[i] / max(whole[i], 1e-12), 4) for name, part in alone.items()}
        for i, what in enumerate(("action", "return")[: len(whole)])
    }


def held_out_histories(
    store: EpisodeStore, views: tuple[str, ...], every: int, states: int = STATES
) -> list[list[Observation]]:
    """What a policy that is called at every ``every``-th step has seen, at most ``states`` times.

    The states are spread over held-out demonstrations, one of each task.
    """
    histories = []
    for index in split_episodes(store, "validation", held_out_share(store)):
        episode = store[int(index)]
        seen = [observed(episode, step, views) for step in range(0, episode.length, every)]
        histories += [seen[: call + 1] for call in range(len(seen))]
    return [histories[i] for i in evenly(len(histories), states)]
