"""The planning study on fakes, its tables, those of docs/planning-study.md, and the paper's statements in numbers."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.studies import cells, feasibility, planning, show
from tests.evaluation.fakes import FakePolicy, FakePool, settings
from wav.config import CouplingSettings, PlannerSettings, Runtime, Settings, load_settings
from wav.evaluation.report import build_report
from wav.io.files import write_json
from wav.planning import VARIANTS

PROJECT = Path(__file__).resolve().parents[1]
RESULTS = PROJECT / "benchmarks" / "results"
PAGE, STUDY = ((PROJECT / "docs" / name).read_text() for name in ("planning.md", "planning-study.md"))
TASKS = ("lift_red_cube", "lift_green_cube")


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> planning.Study:
    """Two tasks, three initial states, a policy that walks faster when it plans; nothing is ranked."""
    policy: Any = FakePolicy()
    policy.model, policy.coupling = SimpleNamespace(device=torch.device("cpu")), CouplingSettings()
    infos = [SimpleNamespace(task=task, style="direct", success=True, length=17) for task in TASKS]
    store: Any = SimpleNamespace(episodes=infos)
    found = settings()
    source = planning.Source(tmp_path, found, policy, "weights", store)
    seen = FakePool(1)
    seen.submit_reset(0, TASKS[0], 0)
    ((_, reply),) = seen.wait()
    monkeypatch.setattr(planning.Study, "histories", lambda self, *count: [[reply.observation]])
    monkeypatch.setattr(planning.Source, "minutes", lambda _: 3.0)
    use = {"action": {"video": 0.3, "value": 0.2, "action": 0.5}}
    monkeypatch.setattr(planning.Study, "look", lambda *_: {"use": use})
    changes = {"episodes_per_task": 3, "variants": VARIANTS, "swapped_episodes": 0, "videos": 0}
    protocol = found.eval_libero.model_copy(update=changes)
    return planning.Study(source, tmp_path / "reports" / "study", protocol, states=0, runtime=Runtime())


def test_a_study_of_two_cells_is_run_once_and_shown(study: planning.Study) -> None:
    base, other = cells.build_cells(study.source.settings, ["act_on"])[::2]
    assert (base.name, other.name) == ("base=base", "act_on=winner")
    pool = FakePool(3)
    first = study.run(base, base, pool)
    assert len(pool.resets) == 18  # three variants of six episodes
    assert set(first["within"]) == {"1.0", "1.25", "1.5", "2.0"}
    assert first["steps"] == dict.fromkeys(TASKS, 24)
    assert first["base"]["limit"]["difference"] == 0
    for name in VARIANTS:
        soon = [first["within"][factor][name]["success_rate"] for factor in sorted(first["within"])]
        assert soon == sorted(soon)
        assert first["variants"][name]["seconds_a_call"] > 0
        assert first["variants"][name]["peak_memory_gib"] > 0
    assert study.finished(base) == first
    pool = FakePool(3)
    second = study.run(other, base, pool)
    assert len(pool.resets) == 12, "acting unplanned is the same in every cell"
    same = study.run(cells.build_cells(study.source.settings, ["act_on"])[1], base, pool)
    assert len(pool.resets) == 12, "a cell that is the base once more is not run"
    assert (same["axis"], same["value"]) == ("act_on", "sample")
    assert {**same, "axis": "base", "value": "base"} == first
    study.states = 1
    assert study.finished(base) is None, "another setting of the study makes the cell anew"
    shown = {"suite": "tabletop", "cells": [first, second, same]}
    table = show.table(shown, ["base", "act_on"])
    assert len([line for line in table.splitlines() if line.startswith("| ")]) == 5
    assert "30 + 20" in table
    assert show.plot(shown, "act_on").startswith(b"\x89PNG")
    page = f"before\n<!-- study: act_on -->\n{show.UNMEASURED}\n<!-- end -->\nafter\n"
    filled = show.fill(page, shown)
    assert "act_on winner" in filled
    assert show.fill(filled, {}) == page
    write_json(study.out / "truth.json", [])
    show.write_summary(study.out, {"suite": "tabletop"}, [base.name, other.name])
    report = build_report(study.source.folder, study.source.settings).read_text()
    assert "<h2>The planning study</h2>" in report
    assert "<td>act_on winner</td>" in report
    assert report.count("data:image/png") == 2, "a plot of each axis"


def test_a_training_beside_begins_from_a_copy_of_the_workspace(
    study: planning.Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its data, its earlier models and its dvc.lock, so that DVC runs the changed stage alone."""
    own = study.source.folder
    for name in ("data/episodes", "models/value", "reports/stages", "reports/eval"):
        (own / name).mkdir(parents=True)
    (own / "dvc.lock").write_text("schema: '2.0'\n")
    commands: list[Any] = []
    monkeypatch.setattr(planning, "PROJECT", tmp_path / "project")
    monkeypatch.setattr(
        planning.subprocess, "run", lambda command, **where: commands.append((command[1:], where["cwd"]))
    )
    monkeypatch.setattr(planning.Source, "open", lambda folder, device: (folder, device))
    cell = next(cell for cell in cells.build_cells(study.source.settings, ["steps"]) if cell.steps)
    folder, _ = study.source_of(cell)
    assert commands == [(["-m", "dvc", "repro", "train_joint"], folder)]
    there = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    assert {"data/episodes", "models/value", "reports/stages", "dvc.lock"} < there
    assert "reports/eval" not in there
    assert load_settings(folder / "params.yaml").train_joint.steps == cell.steps


def test_every_cell_is_a_setting_that_planning_takes() -> None:
    whole = Settings().train_joint.steps
    base = PlannerSettings(iterations=2, video_samples=6, value_samples=2, video_elites=3, value_elites=8)
    for coupling in (CouplingSettings(), CouplingSettings(mode="both", video_schedule=(1.0, 0.5))):
        found = cells.build_cells(Settings(planner=base, coupling=coupling), cells.AXES)
        assert len({cell.name for cell in found}) == len(found)
        assert {cell.axis for cell in found} == set(cells.AXES)
        assert {cell.mode for cell in found} == set(cells.MODES)
        assert [cell.execute_steps for cell in found if cell.axis == "execute_steps"] == [1, 2, 3, 5, 8]
        assert [cell.steps for cell in found if cell.axis == "steps"] == [whole // 4, whole // 2, 0]
        for cell in found:
            CouplingSettings(mode=cell.mode, video_schedule=cell.schedule)  # refuses what training did not show
            assert cell.planner.video_elites <= cell.planner.video_samples
        one_shot = next(cell for cell in found if cell.name == "budget=1x12")
        assert one_shot.planner.iterations * one_shot.planner.video_samples == 12


def test_the_page_quotes_the_run_that_trained_as_published() -> None:
    found = json.loads((RESULTS / "tabletop-published-form.json").read_text())
    assert "coupling" not in found["parameters"]
    rates = [round(100 * found["evaluation"][name]["success_rate"]) for name in VARIANTS]
    assert rates == [98, 98, 96]
    assert found["evaluation"]["paired"]["planned-unplanned"]["wins"] == 0


def test_tables_of_the_page_are_those_of_the_committed_study() -> None:
    path = RESULTS / "planning-study.json"
    assert "<!-- study: coupling -->" in STUDY
    assert show.fill(STUDY, json.loads(path.read_text()) if path.exists() else {}) == STUDY


def test_feasible_mass_vanishes_and_iterations_find_what_one_shot_does_not() -> None:
    """Recomputed: what docs/planning-study.md quotes of Lemma 4.1 and Cor. 4.3."""
    recorded = json.loads((RESULTS / "feasibility.json").read_text())
    uniform = feasibility.corridor(None)
    assert uniform == pytest.approx(recorded["corridor"]["mass"]["uniform actions"])
    assert uniform == sorted(uniform, reverse=True)
    one, several = (feasibility.search(16, k, m)["found"] for k, m in ((1, 128), (4, 32)))
    assert one == pytest.approx(recorded["search"]["1x128"]["16"]["found"], abs=0.02)
    assert several == pytest.approx(recorded["search"]["4x32"]["16"]["found"], abs=0.02)
    assert several > one + 0.5
    for name, found in recorded["search"].items():
        rates = [f"{100 * found[str(h)]['found']:.0f}%" for h in feasibility.HORIZONS]
        assert f"| {name} | {' | '.join(rates)} |" in STUDY


def test_the_published_score_prefers_slow_futures() -> None:
    """The committed measurement of docs/planning.md: the return ranks real futures rightly, the ratio does not."""
    found = json.loads((RESULTS / "speed.json").read_text())
    assert found["direct_ahead"]["slow"] == {"mean": 1.0, "lower_bound": 1.0, "ensemble": 1.0, "snr": 0.0}
    for style, means in found["means"].items():
        assert f"| {style} | {means['mean']:.2f} | {means['snr']:.1f} | {means['lower_bound']:.2f} |" in PAGE


@pytest.mark.parametrize("name", sorted(path.stem for path in (PROJECT / "benchmarks").glob("*.py")))
def test_benchmarks_import(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(PROJECT / "benchmarks"), *sys.path])
    runpy.run_path(str(PROJECT / "benchmarks" / f"{name}.py"), run_name="imported")
