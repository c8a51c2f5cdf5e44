"""The plain schedule, the yardstick of speed, against the reference's recorded runs: a wrong one would show."""

from __future__ import annotations

import pytest

from tests.golden import test_plan
from tests.golden.conftest import Golden
from wav.inference.plain import PlainPlannerModel
from wav.model import WAVTransformer


@pytest.mark.parametrize("name", test_plan.RUNS)
def test_recorded_run_on_the_plain_schedule(name: str, golden: Golden, transformer: WAVTransformer) -> None:
    run = test_plan.Run(golden, transformer, name, PlainPlannerModel)
    test_plan.test_recorded_run(run)
