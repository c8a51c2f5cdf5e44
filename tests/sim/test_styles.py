"""Styles of scripted demonstrations: the task is solved in each, and each looks as its name says."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from tests.helpers.libero import KIT, needs_assets
from wav.config import DataSettings, load_settings
from wav.sim.demonstrations import begin, run_expert
from wav.sim.registry import make_env
from wav.sim.styles import SLOW, STYLES, draw_style


@pytest.fixture(scope="module")
def demonstrations() -> dict[str, np.ndarray]:
    """Clean labels (T, 7) of one initial state in every style, without execution noise."""
    env = make_env("tabletop", load_settings("params.yaml").data)
    env.observe = lambda: True  # type: ignore[method-assign]  # pictures are not looked at here
    labels = {}
    for style in STYLES:
        kept: list[np.ndarray] = []

        def keep(observation, executed, label, kept=kept):
            kept.append(label)

        solved, _ = run_expert(env, "tabletop", "lift_red_cube", 1007, style=style, on_step=keep)
        assert solved, style
        labels[style] = np.stack(kept)
    env.close()
    return labels


def test_the_slow_style_moves_slowly_and_takes_longer(demonstrations):
    slow, direct = demonstrations["slow"], demonstrations["direct"]
    assert np.abs(slow[:, :6]).max() <= SLOW + 1e-6 < np.abs(direct[:, :6]).max()
    assert len(slow) > 1.5 * len(direct)


def test_the_hesitant_style_stops_on_its_way(demonstrations):
    def pauses(labels: np.ndarray) -> int:
        return int((np.abs(labels[:-1, :6]).max(1) == 0).sum())

    assert pauses(demonstrations["direct"]) == 0
    assert pauses(demonstrations["hesitant"]) >= 3


def test_a_detour_goes_another_way_first(demonstrations):
    assert not np.array_equal(demonstrations["detour"][:4], demonstrations["direct"][:4])
    assert len(demonstrations["detour"]) > len(demonstrations["direct"])


def test_a_fumbled_grasp_closes_twice(demonstrations):
    def closings(labels: np.ndarray) -> int:
        return int(((labels[1:, 6] > 0) & (labels[:-1, 6] < 0)).sum())

    assert closings(demonstrations["direct"]) == 1
    assert closings(demonstrations["fumble"]) == 2


def test_a_recovery_begins_at_a_missed_grasp_and_shows_the_way_out_alone(demonstrations):
    labels = demonstrations["recover"][:, 6]
    assert (labels[:4] < 0).all(), "the hand opens first; how it came to miss is not recorded"
    assert int(((labels[1:] > 0) & (labels[:-1] < 0)).sum()) == 1


def test_before_a_recovery_the_hand_has_closed_on_something_and_nothing_is_lifted():
    env = make_env("tabletop", load_settings("params.yaml").data)
    openings = []
    for index in range(1010, 1016):
        _, seen = begin(env, "tabletop", "lift_red_cube", index, 0.5, np.random.default_rng(index), "recover")
        openings.append(float(seen.state[-2] - seen.state[-1]))
        assert not any(env.successes().values())
    env.close()
    assert np.mean(openings) < 0.065, "metres between the fingers, which stand 0.08 apart when open"


def test_shares_decide_the_styles_and_equal_names_draw_equal_styles():
    shares = {"direct": 2.0, "slow": 1.0}
    drawn = Counter(draw_style(shares, 0, "task", index) for index in range(600))
    assert set(drawn) == {"direct", "slow"}
    assert 350 < drawn["direct"] < 450
    assert draw_style(shares, 0, "task", 5) == draw_style(dict(reversed(shares.items())), 0, "task", 5)


@needs_assets
@pytest.mark.long
@pytest.mark.parametrize("style", STYLES)
def test_libero_is_solved_in_every_style(style, monkeypatch, tmp_path):
    monkeypatch.setenv("WAV_LIBERO_ASSETS", str(KIT))
    monkeypatch.setenv("WAV_LOCAL_DIR", str(tmp_path))
    env = make_env("libero_object", DataSettings(suite="libero_object", tasks=(), image_height=64, image_width=64))
    solved, steps = run_expert(env, "libero_object", next(iter(env.tasks)), 1001, style=style)
    env.close()
    assert solved
    assert (steps > 150) == (style == "slow")
