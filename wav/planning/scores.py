"""Scores of predicted returns, by the name that ``planner.score`` gives. To add one, write a function and decorate it.

A score takes returns along time, (B, M, N, A) in reward units: A steps of each of N value samples of M candidates of B
observations. It gives (B, M, N), higher is better.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the parameter file's check reads the names without torch
    from torch import Tensor

    from wav.config import PlannerSettings

    Score = Callable[[Tensor, PlannerSettings], Tensor]

SCORES: dict[str, Score] = {}


def score(function: Score) -> Score:
    """Register ``function`` under its name."""
    SCORES[function.__name__] = function
    return function


def phi(scores: Tensor, settings: PlannerSettings) -> Tensor:
    """Scores (B, M) of candidates by those (B, M, N) of their values: the best (the paper's), or the mean."""
    return scores.amax(2) if settings.phi == "max" else scores.mean(2)


@score
def snr(returns: Tensor, settings: PlannerSettings) -> Tensor:
    """Signal-to-noise ratio along time, mean / (std + epsilon) (section 4.3).

    It is not shift invariant: among returns below zero a larger deviation scores better. Hence returns in reward units.
    """
    return returns.mean(-1) / (returns.std(-1, correction=0) + settings.epsilon)


@score
def lower_bound(returns: Tensor, settings: PlannerSettings) -> Tensor:
    """Mean along time of returns (..., A) less ``score_penalty`` deviations; shifting them all changes no ranking."""
    return returns.mean(-1) - settings.score_penalty * returns.std(-1, correction=0)


@score
def mean(returns: Tensor, settings: PlannerSettings) -> Tensor:
    """Mean along time of returns (..., A): ranks a fast future above a slow one, as the ratio ``snr`` does not."""
    return returns.mean(-1)


@score
def ensemble(returns: Tensor, settings: PlannerSettings) -> Tensor:
    """Mean along time of returns (B, M, N, A) less ``score_penalty`` deviations over a candidate's N value samples."""
    value = returns.mean(-1)
    return value - settings.score_penalty * value.std(-1, correction=0, keepdim=True)
