"""Plots: real PNGs, equal for equal input, and the correlations they print."""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest

from wav import plots
from wav.errors import DataError
from wav.io.files import write_bytes
from wav.rewards.terms import RewardTerms


def size(png: bytes) -> tuple[int, int]:
    image = plt.imread(io.BytesIO(png))
    assert image.std() > 0.01  # not an empty canvas
    return image.shape[:2]


def test_every_plot_is_a_png(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (20, 16, 24, 3), np.uint8)
    terms = RewardTerms(("near", "fast"), rng.random((9, 2), np.float32), np.array([0.5, -0.5], np.float32))
    size(plots.curves({"loss": [3, 2, np.nan, 1]}, [0, 10, 20, 30], "loss"))
    size(plots.reward_terms(terms, "episode 0"))
    size(plots.returns_over_time([np.arange(5), np.zeros(3)], "returns"))
    size(plots.reconstruction(images, images, "same"))
    strip = plots.image_strip([images[:3], images[3:6]], ["a", "b", "c"], "strip", ["agentview", "wrist"])
    wide = plots.image_strip([images[:9], images[3:6]])
    assert size(wide)[1] > size(strip)[1]
    path = tmp_path / "new" / "strip.png"
    write_bytes(path, strip)
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


def test_curves_are_read_as_dvclive_writes_them(tmp_path):
    path = tmp_path / "loss.tsv"
    path.write_text("timestamp\tstep\tloss\n1\t0\t2.0\n2\t20\t1.5\n")
    assert plots.read_curve(path) == ([0, 20], [2.0, 1.5])
    path.write_text("step\tloss\n0\tmuch\n")
    with pytest.raises(DataError, match=r"loss\.tsv: not a curve"):
        plots.read_curve(path)
