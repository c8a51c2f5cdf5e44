"""Approximations of the planner's search, every one off by default.

What each saves, and what it changes in elites, actions and success, is measured by ``benchmarks/approximate.py`` and
stands in docs/performance.md. Fewer Euler steps for scoring (``planner.score_steps``) and ``planner.warm_start`` need
no code of their own; ``planner.reuse_reads`` is the model's business (:mod:`wav.inference.adapter`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from wav.planning.planner import Gaussian, Iteration

FIRST_LOOK = 1  #: Euler steps after which candidates are dropped

#: (features, noise (B, m, N, A, Cv), Euler steps) -> values of that shape and scores (B, m, N).
Evaluate = Callable[[Any, Tensor, int], tuple[Tensor, Tensor]]


class SelectingModel(Protocol):
    """What dropping candidates needs beyond :class:`wav.planning.planner.PlannerModel`."""

    def select(self, features: Any, index: Tensor) -> Any:
        """Features of the candidates ``index`` (B, m), in that order."""
        ...


def evaluate_survivors(
    model: SelectingModel, features: Any, noise: Tensor, survivors: int, steps: int, evaluate: Evaluate
) -> tuple[Tensor, Tensor]:
    """Values (B, M, N, A, Cv) and scores (B, M, N): a first look at all candidates, the rest of the way for the best.

    Candidates that are dropped keep the values of the first look and score minus infinity: no elite comes from them.
    """
    values, scores = evaluate(features, noise, FIRST_LOOK)
    index = scores.amax(2).sort(dim=1, descending=True, stable=True).indices[:, :survivors].sort(1).values
    rows = torch.arange(len(index), device=index.device)[:, None]
    kept = evaluate(model.select(features, index), noise[rows, index], steps)
    scores = torch.full_like(scores, -torch.inf)
    values[rows, index], scores[rows, index] = kept
    return values, scores


def settled(history: Sequence[Iteration], threshold: float) -> Tensor | None:
    """Rows (B,) whose elites' mean score rose, in some iteration, by less than ``threshold`` standard deviations.

    None where nothing can have settled yet: no threshold, or fewer than two iterations.
    """
    if not threshold or len(history) < 2:
        return None
    reached = [step.scores.flatten(1).gather(1, step.value_elites).mean(1) for step in history]
    scores = [step.scores.flatten(1) for step in history]
    spreads = [torch.stack([row[row.isfinite()].std(correction=0) for row in step]) for step in scores]
    steps = zip(reached, reached[1:], spreads[1:], strict=False)
    return torch.stack([now - before < threshold * spread for before, now, spread in steps]).any(0)


def hold(done: Tensor, old: Gaussian, new: Gaussian) -> Gaussian:
    """``old`` for rows that are ``done``, ``new`` for the others: a row's plan does not depend on its neighbours'."""
    keep = done.view(-1, *(1,) * (new.mean.ndim - 1))
    return type(new)(torch.where(keep, old.mean, new.mean), torch.where(keep, old.std, new.std))
