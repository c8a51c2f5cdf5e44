"""Plots: real PNGs, equal for equal input, and the correlations they print."""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest

from wav import plots
from wav.errors import DataError
from wav.rewards.terms import RewardTerms


def size(png: bytes) -> tuple[int, int]:
    image = plt.imread(io.BytesIO(png))
    assert image.std() > 0.01  # not an empty canvas
    return image.shape[:2]


def test_every_plot_is_a_png(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (20, 16, 24, 3), np.uint8)
    terms = RewardTerms(("near", "fast"), rng.random((9, 2), np.float32), np.array([0.5, -0.5], np.float32))
    size(plots.curves({"loss": [3, 2, np.nan, 1]}, [0, 10, 20, 30], "loss", log=True))
    size(plots.reward_terms(terms, "episode 0"))
    size(plots.returns_over_time([np.arange(5), np.zeros(3)], "returns"))
    size(plots.reconstruction(images, images, "same"))
    strip = plots.image_strip([images[:3], images[3:6]], ["a", "b", "c"], "strip", ["agentview", "wrist"])
    wide = plots.image_strip([images[:9], images[3:6]])
    assert size(wide)[1] > size(strip)[1]
    path = plots.write_png(tmp_path / "new" / "strip.png", strip)
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert strip == plots.image_strip([images[:3], images[3:6]], ["a", "b", "c"], "strip", ["agentview", "wrist"])


def test_spearman() -> None:
    assert plots.spearman([1, 2, 5, 9]) == pytest.approx(1)
    assert plots.spearman([3, 2, 1]) == pytest.approx(-1)
    assert np.isnan(plots.spearman([1, 1, 1]))


def test_nothing_to_draw_is_an_error() -> None:
    for draw in (lambda: plots.curves({}), lambda: plots.image_strip([]), lambda: plots.returns_over_time([])):
        with pytest.raises(DataError, match="at least one"):
            draw()
