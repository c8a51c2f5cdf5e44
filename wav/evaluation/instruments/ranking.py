"""Ranking: do scores rank candidates as executing them does, and does searching harder pay.

From states along the scripted expert's episodes every candidate's actions are executed for real, and the return of
Table 2 that they reach is compared with the score that the planner gave. A candidate is a video and *one* of its value
samples, what line 11 of Algorithm 1 chooses among, so that what is executed is what was scored; how the score of the
video, phi over N samples, ranks the same executions stands beside. Shapes as in :mod:`wav.planning.types`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr

from wav.planning.scores import phi
from wav.planning.types import Gaussian, RowKey, SeededNoise

if TYPE_CHECKING:
    from torch import Tensor

    from wav.policy.policy import Policy
    from wav.sim.futures import Branch

#: Numbers of candidates of a search whose choice is compared with the mean candidate, where so many were drawn.
SEARCHES = (2, 4, 8, 16, 32)

Execute = Callable[[Sequence[tuple["Branch", NDArray[np.float32]]]], Sequence[NDArray[np.float64]]]


@dataclass(frozen=True)
class Candidates:
    """Candidates of one state, drawn from N(0, I)."""

    actions: NDArray[np.float32]  #: (M, A, 7) in the environment's units, each decoded on its first value sample.
    values: Tensor  #: (1, M, N, A, Cv) normalised.


def candidates(policy: Policy, branch: Branch, count: int, seed: int = 0) -> Candidates:
    """Candidates of a branch; none depends on how many there are."""
    settings = policy.planner.model_copy(update={"iterations": 1, "video_samples": count, "video_elites": 1})
    planner = policy.make_planner(settings)
    noise = SeededNoise([RowKey(seed, f"ranking/{branch.task}/{branch.index}/{branch.step}", 0)], policy.model.device)
    shapes, tokens = policy.model.shapes, []
    with torch.inference_mode():
        draws = noise("act.video", shapes.video), noise("act.value", shapes.value or ())
        (search,) = planner.search(policy.context([branch.seen]), noise, *(Gaussian.standard(z) for z in draws))
        z_value = search.z_value[0, :, 0]
        z_action = noise("act.action", shapes.action)
        for rows in torch.arange(count).split(policy.batch_size):
            context = policy.context([branch.seen] * len(rows))
            z = search.z_video[0, rows], z_value[rows], z_action.repeat(len(rows), 1, 1)
            tokens.append(planner.decode(context, *z)[0])
    return Candidates(policy.actions(torch.cat(tokens).float().cpu().numpy()), search.values)


def scores(policy: Policy, found: Sequence[Candidates], samples: int) -> NDArray[np.float64]:
    """Scores (states, M) of candidates, judged on their first ``samples`` values."""
    planner = policy.make_planner()
    each = [phi(planner.scores(one.values[:, :, :samples]), policy.planner)[0] for one in found]
    return torch.stack(each).double().cpu().numpy()


def ranking(policy: Policy, branches: Sequence[Branch], execute: Execute, count: int) -> dict[str, Any]:
    """Whether the planner's scores rank ``count`` candidates of each branch as executing them does.

    ``execute`` gives the realised returns (M,) of chunks (M, A, 7) from their branches
    (:func:`wav.evaluation.instruments.executed.all_returns`). The policy has a value expert.

    Returns:
        ``spearman``: rank correlation within a state between a candidate's score and its realised return, averaged over
        states, and ``by_video``, the same for the score of its video; ``deviation``: standard deviation of the realised
        returns within a state; ``regret``: best realised return less the chosen candidate's; ``beats_median``: how
        often the chosen one is above its state's median; ``searches``: see :func:`searches`.
    """
    found = [candidates(policy, branch, count) for branch in branches]
    realised = np.stack(execute([(branch, each.actions) for branch, each in zip(branches, found, strict=True)]))
    judged = {samples: scores(policy, found, samples) for samples in (1, policy.planner.value_samples)}
    chosen = _chosen(realised, judged[1])
    return {
        "states": len(branches),
        "candidates": count,
        "spearman": _correlation(judged[1], realised),
        "by_video": _correlation(judged[policy.planner.value_samples], realised),
        "deviation": float(realised.std(1).mean()),
        "regret": float((realised.max(1) - chosen).mean()),
        "beats_median": float((chosen > np.median(realised, 1)).mean()),
        "searches": [row for N, points in judged.items() for row in searches(realised, points, N)],
    }


def _correlation(judged: NDArray[np.float64], realised: NDArray[np.float64]) -> float:
    """Spearman's rank correlation within a state, averaged over states; 0 where all are alike."""
    each = [spearmanr(one, two).statistic for one, two in zip(judged, realised, strict=True)]
    return float(np.nan_to_num(each).mean())


def searches(realised: NDArray[np.float64], judged: NDArray[np.float64], N: int) -> Iterator[dict[str, float]]:
    """Whether searching harder pays, or finds what the score is wrong about.

    ``realised`` are the returns (states, M) of all candidates, ``judged`` their scores: of the value sample that they
    are executed on (``N`` = 1), or of their video by ``N`` samples.

    Yields:
        per number M of candidates: ``gain``, the chosen one's realised return less the mean candidate's, in mean, and
        ``false_choices``, how often that is negative. Every group of M candidates of a state is a search.
    """
    for M in SEARCHES:
        groups = realised.shape[1] // M
        if groups:
            returns, points = (each[:, : groups * M].reshape(-1, M) for each in (realised, judged))
            gain = _chosen(returns, points) - returns.mean(1)
            yield {"M": M, "N": N, "gain": float(gain.mean()), "false_choices": float((gain < 0).mean())}


def _chosen(realised: NDArray[np.float64], judged: NDArray[np.float64]) -> NDArray[np.float64]:
    """Realised return (states,) of the candidate with the best score."""
    return np.take_along_axis(realised, judged.argmax(1)[:, None], 1)[:, 0]
