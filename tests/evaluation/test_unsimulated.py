"""A suite without a simulator: the stage says so in its metrics, its table and the report, and nothing is invented."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from flows import eval_libero
from tests.evaluation.fakes import DATA, settings
from wav.errors import ConfigError
from wav.evaluation.report import build_report
from wav.evaluation.tables import metrics_table
from wav.sim.registry import SUITES, has_simulator


def test_only_unknown_robots_have_no_simulator():
    assert all(has_simulator(suite) for suite in SUITES)
    assert not has_simulator("piper")
    with pytest.raises(ConfigError, match=r"'libero_objct': unknown suite; did you mean 'libero_object'"):
        has_simulator("libero_objct")


def test_nothing_runs_and_the_results_say_so(tmp_path):
    out = tmp_path / "reports" / "eval"
    stale = out / "episodes" / "planned" / "lift_red_cube-000.json"
    stale.parent.mkdir(parents=True)
    stale.write_text("{}")
    robot = settings().model_copy(update={"data": DATA.model_copy(update={"suites": ("piper",)})})
    run = SimpleNamespace(settings=robot, path=lambda relative: tmp_path / relative)
    metrics = eval_libero.closed_loop(run, None, "weights", None, None)
    assert metrics == json.loads((out / "metrics.json").read_text())
    assert metrics["checkpoint"] == "weights"
    reason = "not applicable, suite 'piper' has no simulator"
    assert metrics["not_applicable"] == dict.fromkeys(("planned", "unplanned", "temperature"), reason)
    assert {path.name for path in out.iterdir()} == {"episodes", "metrics.json", "predictions", "strips", "videos"}
    assert not stale.exists()
    assert metrics_table(metrics).splitlines()[0] == f"piper: planned: {reason}."
    page = build_report(tmp_path, robot).read_text()
    assert "World-Value-Action on piper" in page
    assert "no episode was run in closed loop" in page
    assert "variant planned: not applicable, suite &#39;piper&#39; has no simulator" in page
