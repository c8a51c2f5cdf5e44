"""The baseline schedule, the yardstick of speed, against the reference's recorded runs: a wrong one would show."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.golden import test_plan
from tests.golden.conftest import Golden
from wav.model import WAVTransformer

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from baseline.planner import BaselinePlannerModel


@pytest.mark.parametrize("name", test_plan.RUNS)
def test_recorded_run_on_the_baseline_schedule(name: str, golden: Golden, transformer: WAVTransformer) -> None:
    test_plan.check(test_plan.Run(golden, transformer, name, BaselinePlannerModel))
