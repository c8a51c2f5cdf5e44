"""Intervals against values computed elsewhere."""

import math
from statistics import NormalDist

import numpy as np
import pytest

from wav.evaluation.intervals import mcnemar, paired_difference, wilson


@pytest.mark.parametrize(
    ("successes", "episodes", "low", "high"),
    [  # R: prop.test(x, n, correct = FALSE)$conf.int
        (40, 50, 0.6696, 0.8876),
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (1, 2, 0.0945, 0.9055),
    ],
)
def test_wilson_known_values(successes, episodes, low, high):
    rate = wilson(successes, episodes)
    assert rate.success_rate == successes / episodes
    assert rate.wilson_low == pytest.approx(low, abs=2e-4)
    assert rate.wilson_high == pytest.approx(high, abs=2e-4)


def test_wilson_and_mcnemar_equal_their_formulas():
    z = NormalDist().inv_cdf(0.975)
    for n in (1, 7, 50, 2000):
        for k in {0, 1, n // 3, n}:
            rate, centre = wilson(k, n), (k / n + z * z / (2 * n)) / (1 + z * z / n)
            half = z / (1 + z * z / n) * math.sqrt(k / n * (1 - k / n) / n + z * z / (4 * n * n))
            assert (rate.wilson_low, rate.wilson_high) == pytest.approx((centre - half, centre + half), abs=1e-12)
    for wins, losses in ((0, 3), (4, 4), (11, 3), (30, 12)):
        tail = sum(math.comb(wins + losses, k) for k in range(min(wins, losses) + 1))
        assert mcnemar(wins, losses) == pytest.approx(min(1.0, 2 * tail / 2 ** (wins + losses)), abs=1e-12)


def test_wilson_of_nothing_says_nothing():
    assert (wilson(0, 0).wilson_low, wilson(0, 0).wilson_high) == (0.0, 1.0)
    with pytest.raises(ValueError, match=r"0\.\.3"):
        wilson(4, 3)


def test_mcnemar_exact():
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(5, 0) == pytest.approx(2 / 32)
    assert mcnemar(9, 1) == mcnemar(1, 9) == pytest.approx(2 * 11 / 1024)


def test_paired_difference_uses_the_pairs():
    rng = np.random.default_rng(0)
    base = rng.random(200) < 0.5
    better = base.copy()
    better[np.flatnonzero(~base)[:20]] = True
    paired = paired_difference(better, base)
    assert paired.difference == pytest.approx(0.1)
    assert (paired.wins, paired.losses) == (20, 0)
    assert paired.low > 0  # an unpaired interval of two rates near 0.5 with n = 200 is about +-0.1
    assert paired.high < 0.15
    assert paired_difference(better, base) == paired
    shuffled = paired_difference(better, rng.permutation(base))
    assert shuffled.high - shuffled.low > paired.high - paired.low
    assert paired_difference(base, base).mcnemar_p == 1.0
    with pytest.raises(ValueError, match="same ones"):
        paired_difference([True], [True, False])
