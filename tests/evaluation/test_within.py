"""Success within a time: where the time comes from, and what an evaluation makes of it."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean, median
from types import SimpleNamespace
from typing import Any

import pytest

from tests.evaluation.fakes import FakePolicy, FakePool, settings
from wav.config import EvalLiberoSettings
from wav.evaluation.evaluate import evaluate
from wav.evaluation.intervals import paired_difference
from wav.evaluation.records import read_record, step_limits
from wav.evaluation.tables import metrics_table

TASKS = ("lift_red_cube", "lift_green_cube")


def store(*episodes: tuple[str, str, int, bool]) -> Any:
    """Demonstrations (task, style, frames, success)."""
    names = ("task", "style", "length", "success")
    return SimpleNamespace(episodes=[SimpleNamespace(**dict(zip(names, each, strict=True))) for each in episodes])


def test_the_limit_is_the_direct_experts_mean_time() -> None:
    """Frames are one more than steps; other styles and failures do not count."""
    data = store(
        ("lift_red_cube", "direct", 31, True),
        ("lift_red_cube", "direct", 42, True),
        ("lift_red_cube", "slow", 90, True),
        ("lift_red_cube", "direct", 120, False),
        ("lift_green_cube", "direct", 41, True),
    )
    assert step_limits(data, EvalLiberoSettings(), TASKS) == {"lift_red_cube": 54, "lift_green_cube": 60}
    assert step_limits(data, EvalLiberoSettings(within=2), TASKS[1:]) == {"lift_green_cube": 80}


def test_no_limit_without_known_styles_unless_it_is_given() -> None:
    unknown = store(*((task, "", 40, True) for task in TASKS))
    half = store(("lift_red_cube", "direct", 31, True), ("lift_green_cube", "slow", 90, True))
    for data in (None, unknown, half):
        assert step_limits(data, EvalLiberoSettings(), TASKS) == {}
        assert step_limits(data, EvalLiberoSettings(within_steps=50), TASKS) == dict.fromkeys(TASKS, 50)
    assert step_limits(half, EvalLiberoSettings(within=0), TASKS[:1]) == {}


def test_metrics_hold_success_within_the_limit_and_steps(tmp_path: Path) -> None:
    """Both against the records, and the paired difference of the two."""
    limits = dict(zip(TASKS, (12, 8), strict=True))
    metrics = evaluate(settings(), FakePolicy(), tmp_path, pool=FakePool(3), checkpoint="w", limits=limits)
    outcomes: dict[str, list[bool]] = {}
    for variant in ("planned", "unplanned"):
        records = [read_record(path) for path in sorted((tmp_path / "episodes" / variant).glob("*.json"))]
        steps = [record.steps for record in records if record.success]
        assert metrics[variant]["mean_steps_to_success"] == pytest.approx(fmean(steps))
        assert metrics[variant]["median_steps_to_success"] == median(steps)
        outcomes[variant] = [record.success and record.steps <= limits[record.task] for record in records]
        assert metrics[variant]["within"]["success_rate"] == pytest.approx(fmean(outcomes[variant]))
    assert metrics["within"] == limits
    assert outcomes["planned"] != outcomes["unplanned"]
    found = metrics["paired_within"]["planned-unplanned"]
    assert found == paired_difference(outcomes["planned"], outcomes["unplanned"]).as_dict()
    table = metrics_table(metrics)
    assert "| **all, within 8 to 12 steps** |" in table
    assert f"| within 8 to 12 steps, planned \N{MINUS SIGN} unplanned | {100 * found['difference']:+.0f} [" in table
    assert "within" not in evaluate(settings(), FakePolicy(), tmp_path, pool=FakePool(3), checkpoint="w")
