"""Intervals for success rates and for differences between variants run on the same episodes.

Success rates carry Wilson's score interval; a difference of two variants carries a paired bootstrap interval and
McNemar's exact p-value, because both variants saw the same initial states and the same noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from scipy.stats import binomtest

from wav.seeding import numpy_generator


@dataclass(frozen=True)
class Rate:
    """A success rate with Wilson's interval; all in [0, 1], NaN-free (0 of 0 is 0 in [0, 1])."""

    success_rate: float
    episodes: int
    wilson_low: float
    wilson_high: float

    def as_dict(self) -> dict[str, float | int]:
        """Plain data for metrics.json."""
        return asdict(self)


@dataclass(frozen=True)
class Difference:
    """``first - second`` over paired episodes: mean difference, its interval, discordant pairs, McNemar's p."""

    difference: float
    low: float
    high: float
    wins: int
    losses: int
    episodes: int
    mcnemar_p: float

    def as_dict(self) -> dict[str, float | int]:
        """Plain data for metrics.json."""
        return asdict(self)


def wilson(successes: int, episodes: int) -> Rate:
    """Wilson's 95% score interval (Wilson 1927); ValueError for ``successes`` outside ``0..episodes``.

    >>> rate = wilson(84, 100)
    >>> f"{rate.success_rate:.0%} [{rate.wilson_low:.0%}, {rate.wilson_high:.0%}]"
    '84% [76%, 90%]'
    """
    if not 0 <= successes <= episodes:
        raise ValueError(f"successes = {successes}: must lie in 0..{episodes}")
    if episodes == 0:
        return Rate(0.0, 0, 0.0, 1.0)
    interval = binomtest(successes, episodes).proportion_ci(method="wilson")
    return Rate(successes / episodes, episodes, float(interval.low), float(interval.high))


def independent_difference(first: Rate, second: Rate) -> tuple[float, float]:
    """Interval of ``first - second`` for rates of different episodes, from both Wilson intervals (Newcombe 1998)."""
    a, b = first.success_rate, second.success_rate
    low = math.hypot(a - first.wilson_low, second.wilson_high - b)
    high = math.hypot(first.wilson_high - a, b - second.wilson_low)
    return a - b - low, a - b + high


def mcnemar(wins: int, losses: int) -> float:
    """Two-sided exact p-value of McNemar's test: a fair coin over the ``wins + losses`` discordant pairs."""
    return float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def paired_difference(first: Sequence[bool], second: Sequence[bool]) -> Difference:
    """Difference of success rates of two variants over the same episodes, in the same order.

    The interval is the 95% percentile bootstrap over episodes (pairs stay together, 4000 resamples, always the same).

    Raises:
        ValueError: the two sequences differ in length.
    """
    if len(first) != len(second):
        raise ValueError(f"paired variants have {len(first)} and {len(second)} episodes: they must be the same ones")
    a, b = np.asarray(first, dtype=np.int64), np.asarray(second, dtype=np.int64)
    wins, losses, n = int(((a == 1) & (b == 0)).sum()), int(((a == 0) & (b == 1)).sum()), len(a)
    if n == 0:
        return Difference(0.0, -1.0, 1.0, 0, 0, 0, 1.0)
    # Resampling pairs only changes how often each of the outcomes win / tie / loss is drawn.
    shares = np.array([wins, n - wins - losses, losses]) / n
    draws = numpy_generator(0, "evaluation.bootstrap").multinomial(n, shares, size=4000)
    low, high = np.quantile((draws[:, 0] - draws[:, 2]) / n, [0.025, 0.975])
    return Difference((wins - losses) / n, float(low), float(high), wins, losses, n, mcnemar(wins, losses))
