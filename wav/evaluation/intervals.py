"""Intervals for success rates and for differences between variants run on the same episodes.

Success rates carry Wilson's score interval; a difference of two variants carries a paired bootstrap interval and
McNemar's exact p-value, because both variants saw the same initial states and the same noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from statistics import NormalDist

import numpy as np

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


def wilson(successes: int, episodes: int, confidence: float = 0.95) -> Rate:
    """Wilson's score interval (Wilson 1927).

    Raises:
        ValueError: ``successes`` outside ``0..episodes`` or ``confidence`` outside (0, 1).
    """
    if not 0 <= successes <= episodes:
        raise ValueError(f"successes = {successes}: must lie in 0..{episodes}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence = {confidence}: must lie in (0, 1)")
    if episodes == 0:
        return Rate(0.0, 0, 0.0, 1.0)
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    rate, n = successes / episodes, episodes
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return Rate(rate, n, low, high)


def independent_difference(first: Rate, second: Rate) -> tuple[float, float]:
    """Interval of ``first - second`` for rates of different episodes, from both Wilson intervals (Newcombe 1998)."""
    a, b = first.success_rate, second.success_rate
    low = math.hypot(a - first.wilson_low, second.wilson_high - b)
    high = math.hypot(first.wilson_high - a, b - second.wilson_low)
    return a - b - low, a - b + high


def mcnemar(wins: int, losses: int) -> float:
    """Two-sided exact p-value of McNemar's test: a fair coin over the ``wins + losses`` discordant pairs."""
    n = wins + losses
    if n == 0:
        return 1.0
    tail = sum(math.comb(n, k) for k in range(min(wins, losses) + 1))
    return min(1.0, float(Fraction(2 * tail, 2**n)))


def paired_difference(
    first: Sequence[bool], second: Sequence[bool], *, confidence: float = 0.95, resamples: int = 4000, seed: int = 0
) -> Difference:
    """Difference of success rates of two variants over the same episodes, in the same order.

    The interval is the percentile bootstrap over episodes (pairs stay together).

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
    draws = numpy_generator(seed, "evaluation.bootstrap").multinomial(n, shares, size=resamples)
    differences = (draws[:, 0] - draws[:, 2]) / n
    low, high = np.quantile(differences, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Difference((wins - losses) / n, float(low), float(high), wins, losses, n, mcnemar(wins, losses))
