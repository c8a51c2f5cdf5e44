"""What the noises decide and whether scores rank futures as reality does: instruments beside success rates.

Success alone cannot tell a planner that chooses from one that merely lowers the temperature. Both instruments are part
of every evaluation's metrics.json.

*Use* (:func:`noise_use`): how much of the decoded action's and of the predicted return's variance each noise explains
when it alone is drawn again. A planner that searches over a noise which explains nothing cannot choose anything.

*Ranking* (:func:`ranking`): from states along the scripted expert's episodes, every candidate's actions are executed
for real, and the return of Table 2 that they reach is compared with the score that the planner gave. The same
executions tell whether searching harder pays: the chosen candidate's gain over the mean one, against M and N.

Shapes as in :mod:`wav.planning.types`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr

from wav.data.episode import Episode
from wav.evaluation.held_out import held_out_episodes, observed
from wav.evaluation.pictures import evenly
from wav.planning.planner import Planner
from wav.planning.types import Gaussian, RowKey, SeededNoise
from wav.rewards.terms import episode_rewards

if TYPE_CHECKING:
    from torch import Tensor

    from wav.config import LabelRewardsSettings
    from wav.data.store import EpisodeStore
    from wav.policy.policy import Policy
    from wav.sim.env import Observation
    from wav.sim.futures import Branch, Segment

#: What a plan draws once for the noises that are acted on.
NOISES = {"video": "act.video", "value": "act.value", "action": "act.action"}
STATES, DRAWS = 16, 6
#: Searches (M, N) whose choice is compared with the mean candidate, where so many were drawn.
SEARCHES = ((2, 1), (4, 1), (8, 1), (8, 2), (8, 4), (16, 4), (32, 4))


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

    Args:
        policy: the policy; it acts unplanned.
        histories: per state, the observations that the policy has seen at its calls, now last.
        draws: of each noise.
        seed: of the draws.

    Returns:
        ``action``, and ``return`` (the predicted one's mean along the chunk; only with a value expert): noise ->
        variance over its draws, averaged over states, as a share of the variance when all three are drawn. Few draws
        may take a share above 1, and what noises do together is in none of them.
    """
    planner = Planner(policy.model, policy.planner, policy.returns, policy.levels)
    keys = tuple(RowKey(seed, f"use/{index}", 0) for index in range(len(histories)))
    valued = policy.model.shapes.value is not None

    def variances(context: object, purposes: frozenset[str]) -> tuple[float, ...]:
        found: list[list[Tensor]] = [[], []]
        for draw in range(draws):
            noise = VaryOnly(keys, purposes, draw, policy.model.device)
            plan = planner.plan(context, noise, variant="unplanned", with_value=valued)
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
    """What a policy that is called every few steps has seen, at states spread over held-out demonstrations.

    Args:
        store: the demonstrations; those that any validation share above 0 holds out are looked at.
        views: cameras of the policy.
        every: steps between two calls.
        states: wanted at most.
    """
    histories = []
    for index in held_out_episodes(store):
        episode = store[index]
        seen = [observed(episode, step, views) for step in range(0, episode.length, every)]
        histories += [seen[: call + 1] for call in range(len(seen))]
    return [histories[i] for i in evenly(len(histories), states)]


def realised_return(
    branch: Branch, segment: Segment, actions: NDArray[np.float32], settings: LabelRewardsSettings, views: Sequence[str]
) -> float:
    """Return v_t of Table 2 that a chunk really reached, with the expert's final frame as the reference.

    Args:
        branch: where it began.
        segment: what was seen, A + 1 observations.
        actions: (A, 7) as executed.
        settings: section ``label_rewards``; the sum runs over the chunk.
        views: cameras of the reward.
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
    reward = episode_rewards(episode, settings, tuple(views)).reward[: len(actions)]
    return float((reward * settings.gamma ** np.arange(len(actions))).sum())


def candidates(
    policy: Policy, branch: Branch, count: int, seed: int = 0
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Actions (M, A, 7) of candidates drawn from N(0, I), each on its best value sample, and their scores (M, N)."""
    settings = policy.planner.model_copy(update={"iterations": 1, "video_samples": count, "video_elites": 1})
    planner = Planner(policy.model, settings, policy.returns, policy.levels)
    noise = SeededNoise([RowKey(seed, f"ranking/{branch.task}/{branch.index}/{branch.step}", 0)], policy.model.device)
    shapes = policy.model.shapes
    with torch.inference_mode():
        context = policy.context([branch.seen])
        draws = noise("act.video", shapes.video), noise("act.value", shapes.value or ())
        (search,) = planner.search(context, noise, *(Gaussian.standard(z) for z in draws))
        best = search.scores.argmax(2)
        z_action, actions = noise("act.action", shapes.action), []
        for m in range(count):
            z_value = search.z_value[:, m, int(best[0, m])]
            actions.append(planner.decode(context, search.z_video[:, m], z_value, z_action)[0])
    tokens = torch.cat(actions).float().cpu().numpy()
    return policy.actions(tokens), search.scores[0].double().cpu().numpy()


Execute = Callable[[Sequence[tuple["Branch", NDArray[np.float32]]]], Sequence[Sequence["Segment"]]]


def ranking(
    policy: Policy, branches: Sequence[Branch], execute: Execute, settings: LabelRewardsSettings, count: int = 8
) -> dict[str, Any]:
    """Whether the planner's scores rank candidates as reality does.

    Args:
        policy: with a value expert.
        branches: states to plan from.
        execute: runs chunks (M, A, 7) from their branches in simulators (:func:`wav.sim.futures.execute`).
        settings: section ``label_rewards``.
        count: M of the search, all of whose candidates are executed.

    Returns:
        ``spearman``: rank correlation within a state between score and realised return, averaged over states;
        ``deviation``: standard deviation of the realised returns within a state; ``regret``: best realised return less
        the chosen candidate's; ``beats_median``: how often the chosen one is above its state's median; ``searches``:
        per M and N, the chosen one's realised return less the mean one's (``gain``) and how often that is negative
        (``false_choices``), by the first M candidates and N value samples of the same draw.
    """
    plans = [candidates(policy, branch, count) for branch in branches]
    outcomes = execute([(branch, actions) for branch, (actions, _) in zip(branches, plans, strict=True)])
    realised = np.array(
        [
            [
                realised_return(branch, segment, chunk, settings, policy.data.views)
                for segment, chunk in zip(segments, actions, strict=True)
            ]
            for branch, segments, (actions, _) in zip(branches, outcomes, plans, strict=True)
        ]
    )  # (states, M)
    scores = np.stack([found for _, found in plans])  # (states, M, N)
    chosen = _chosen(realised, scores)
    found = [spearmanr(one, two).statistic for one, two in zip(scores.max(2), realised, strict=True)]
    searches = []
    for M, N in SEARCHES:
        if scores.shape[1] >= M and scores.shape[2] >= N:
            gain = _chosen(realised, scores[:, :M, :N]) - realised[:, :M].mean(1)
            searches.append({"M": M, "N": N, "gain": float(gain.mean()), "false_choices": float((gain < 0).mean())})
    return {
        "states": len(branches),
        "candidates": count,
        "spearman": float(np.nan_to_num(found).mean()),
        "deviation": float(realised.std(1).mean()),
        "regret": float((realised.max(1) - chosen).mean()),
        "beats_median": float((chosen > np.median(realised, 1)).mean()),
        "searches": searches,
    }


def _chosen(realised: NDArray[np.float64], scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Realised return (states,) of the candidate with the best score, of scores (states, m, n)."""
    return np.take_along_axis(realised, scores.max(2).argmax(1)[:, None], 1)[:, 0]
