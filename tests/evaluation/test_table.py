"""LIBERO's table: arithmetic and print without a simulator, what is refused, and a real run with the assets."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from tests.helpers.libero import KIT, needs_assets
from tests.helpers.stage_folders import DATA, PLANNER, SETTINGS, make_stages
from wav import cli
from wav.data.conventions import Conventions
from wav.data.store import EpisodeStore
from wav.evaluation.extras.published import AVERAGE, OTHERS, PAPER, PUBLISHED, SUITES
from wav.evaluation.extras.table import as_json, make_table, markdown
from wav.evaluation.intervals import independent_difference, wilson
from wav.evaluation.verdict import report_path
from wav.io.files import write_json
from wav.policy.export import export_policy, policy_from_stages
from wav.sim.libero import assets as libero_assets
from wav.sim.registry import select_tasks

pytestmark = pytest.mark.simulator

HEADING = {
    "export": "export",
    "name": "wav-test",
    "checkpoint": "c" * 64,
    "trained_on": {"suite": "libero_10", "tasks": []},
    "planner": {"iterations": 3, "video_samples": 30, "value_samples": 5},
    "protocol": {"tasks": (), "episodes_per_task": 50, "execute_steps": 8, "seed": 7},
}
LONGER = {"libero_10": 480}


def metrics(planned: dict[str, int], unplanned: dict[str, int], episodes: int = 500) -> dict:
    """Suites' metrics.json with that many successes."""

    def rate(solved: int) -> dict:
        return wilson(solved, episodes).as_dict()

    paired = {"planned-unplanned": {"difference": 0.026, "low": 0.004, "high": 0.048}}
    return {
        s: {"planned": rate(planned[s]), "unplanned": rate(unplanned[s]), "paired": paired, "versions": {"torch": "2"}}
        for s in planned
    }


def paper(index: int) -> dict[str, int]:
    return {suite: round(PAPER[index].percent[suite] * 5) for suite in SUITES}


def test_published_averages_are_those_of_their_suites():
    for entry in PUBLISHED:
        if set(entry.percent) > {AVERAGE}:
            mean = sum(entry.percent[suite] for suite in SUITES) / len(SUITES)
            assert abs(mean - entry.percent[AVERAGE]) < 0.0801, entry.name
    assert (PAPER[0].percent[AVERAGE], PAPER[1].percent[AVERAGE]) == (98.1, 96.4)
    assert {entry.date for entry in OTHERS} == {"2026-01", "2026-06"}
    assert OTHERS[2].rate("libero_10") is None


@pytest.mark.parametrize(
    ("ours", "theirs", "larger"),
    [
        ((1962, 2000), (1972, 2000), False),
        ((472, 500), (459, 500), False),
        ((1962, 2000), (1928, 2000), True),
        ((20, 20), (1962, 2000), False),
        ((0, 20), (1962, 2000), True),
    ],
)
def test_differences_are_held_against_both_intervals(ours, theirs, larger):
    low, high = independent_difference(wilson(*ours), wilson(*theirs))
    assert low < ours[0] / ours[1] - theirs[0] / theirs[1] < high
    assert (not low <= 0 <= high) == larger
    other = independent_difference(wilson(*theirs), wilson(*ours))
    assert other == pytest.approx((-high, -low))


def test_newcombes_own_example():
    """Newcombe (1998), Table II, (a): 56/70 against 48/80, method 10: 0.0524 to 0.3339."""
    assert independent_difference(wilson(56, 70), wilson(48, 80)) == pytest.approx((0.0524, 0.3339), abs=5e-5)


def test_a_policy_as_good_as_the_paper_differs_from_nothing_but_the_best():
    table = make_table(metrics(paper(0), paper(1)), HEADING)
    assert [row.name for row in table.rows] == ["this policy, planned", "this policy, unplanned"]
    assert table.rows[0].rates[AVERAGE].episodes == 2000
    assert table.rows[0].rates[AVERAGE].success_rate == 1963 / 2000
    larger = {(c.published, c.column) for c in table.comparisons if c.larger}
    assert {name for name, _ in larger} == {"LingBot-VA", "Cosmos Policy", "dVLA-RL, no world model"}
    assert ("dVLA-RL, no world model", AVERAGE) in larger
    assert {c.variant for c in table.comparisons if c.published == PAPER[1].name} == {"unplanned"}
    text = markdown(table)
    assert "8 actions per policy call, planner K = 3, M = 30, N = 5, seed 7; success in %, 95% Wilson" in text
    assert "| **this policy, planned** | 99.6 [98.6, 99.9] | 100.0 [99.2, 100.0] |" in text
    assert "| 94.4 [92.0, 96.1] | 98.2 [97.5, 98.7] |" in text
    assert "| WAV, paper (2026-04) | 99.6 | 100.0 | 98.6 | 94.4 | 98.1 |" in text
    assert "| WAV, paper, without planning (2026-04) | 99.0 | 99.6 | 95.0 | 91.8 | 96.4 |" in text
    assert "| LaWAM (2026-06) |  |  |  |  | 98.6 |" in text
    assert "99.2*" in text
    assert "libero_goal: planned - unplanned on the same episodes +2.6 points [+0.4, +4.8]." in text
    assert "†" not in text
    assert json.loads(json.dumps(as_json(table)))["rows"][0]["libero_10"]["success_rate"] == 0.944


def test_a_weak_policy_is_marked_and_some_suites_have_no_average():
    """A random policy on one suite: everything published about that suite is marked, nothing else is."""
    table = make_table(metrics({"libero_object": 0}, {"libero_object": 0}, episodes=20), HEADING)
    assert {c.column for c in table.comparisons} == {"libero_object"}
    assert all(c.larger for c in table.comparisons)
    text = markdown(table)
    assert "| **this policy, planned** |  | 0.0 [0.0, 16.1] |  |  |  |" in text
    assert "| WAV, paper (2026-04) | 99.6 | 100.0* | 98.6 | 94.4 | 98.1 |" in text


def test_both_budgets_have_rows_and_marks_of_their_own():
    found = metrics(paper(0), paper(0))
    for suite, one in metrics({**paper(1), **LONGER}, paper(1)).items():
        found[suite]["reference"] = {name: one[name] for name in ("planned", "unplanned")}
    table = make_table(found, HEADING)
    assert [row.name for row in table.rows][2:] == [
        "this policy, planned, 1000 steps",
        "this policy, unplanned, 1000 steps",
    ]
    text = markdown(table)
    assert "98.6†" in text  # libero_goal: the paper's 98.6 against 95.0 in 1000 steps
    assert "`†` the same against the rows with 1000 steps" in text


def test_a_policy_that_cannot_plan_is_compared_unplanned():
    found = metrics(paper(1), paper(1))
    for one in found.values():
        del one["planned"]
        one["not_applicable"] = {"planned": "not applicable, the model has no value expert"}
    table = make_table(found, HEADING)
    assert {c.variant for c in table.comparisons} == {"unplanned"}
    assert "libero_10: planned: not applicable, the model has no value expert." in markdown(table)


def test_a_trial_on_some_tasks_compares_nothing():
    heading = {**HEADING, "protocol": {**HEADING["protocol"], "tasks": ("one_task",)}}
    table = make_table(metrics(paper(0), paper(1)), heading, complete=False)
    assert not table.comparisons
    text = markdown(table)
    assert "one_task, 50 initial states each" in text
    assert "Nothing is compared: the published figures are over all tasks of a suite." in text
    assert "*" not in text.replace("**", "")


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("table")
    made = make_stages(folder)
    return folder, policy_from_stages(made.joint, made.latents, DATA, PLANNER, batch_size=2, device="cpu")


@pytest.fixture(autouse=True)
def _assets(monkeypatch, tmp_path):
    monkeypatch.setenv("WAV_LIBERO_ASSETS", str(KIT))
    monkeypatch.setenv("WAV_LOCAL_DIR", str(tmp_path / "local"))
    libero_assets.find_assets.cache_clear()
    yield
    libero_assets.find_assets.cache_clear()


def export_for(stages, suite: str, conventions: Conventions | None = None) -> Path:
    """The untrained policy as if it had been trained on ``suite``."""
    folder, (policy, checkpoint) = stages
    settings = SETTINGS.model_copy(update={"data": DATA.model_copy(update={"suites": (suite,), "text_tokens": 32})})
    policy.conventions = conventions or dataclasses.replace(Conventions.for_simulator(DATA), suite=suite, simulator={})
    return export_policy(policy, checkpoint, folder / suite, settings=settings, metrics=None)


def refused(capsys, *arguments) -> str:
    assert cli.main(["libero-table", *map(str, arguments)]) == 1
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert not captured.out or captured.out.startswith("libero_")
    return captured.err


def test_what_cannot_be_evaluated_is_one_sentence(stages, tmp_path, capsys, monkeypatch):
    out = ("--out", tmp_path / "out")
    assert "none: no such folder" in refused(capsys, tmp_path / "none", *out)
    tabletop = export_for(stages, "tabletop")
    assert "trained on 'tabletop', whose scenes and conventions are not LIBERO's" in refused(capsys, tabletop, *out)
    libero = export_for(stages, "libero_10")
    assert "not in the table; its suites are libero_spatial" in refused(capsys, libero, "--suite", "libero_90", *out)
    with monkeypatch.context() as patch:
        patch.setitem(libero_assets.REQUIRED, "hf-libero-elsewhere", "1")
        assert "hf-libero-elsewhere is not installed; install it with `make libero`" in refused(capsys, libero, *out)
    monkeypatch.setenv("WAV_LIBERO_ASSETS", str(tmp_path))
    libero_assets.find_assets.cache_clear()
    error = refused(capsys, libero, *out)
    assert "hf-libero is not installed" in error or "WAV_LIBERO_ASSETS" in error
    assert not (tmp_path / "out").exists()


@needs_assets
def test_the_table_of_a_random_policy(stages, tmp_path, capsys, monkeypatch):
    """One task and one initial state of a suite that is not the policy's own; the second run repeats nothing."""
    task = "pick_up_the_milk_and_place_it_in_the_basket"
    monkeypatch.setattr(
        "wav.evaluation.protocol.select_tasks",
        lambda suite, names: tuple(dataclasses.replace(spec, max_steps=6) for spec in select_tasks(suite, names)),
    )
    data = DATA.model_copy(update={"suites": ("libero_10",)})
    upside_down = dataclasses.replace(Conventions.for_simulator(data), image_rotation="none")
    chosen = ["--suite", "libero_object", "--task", task, "--episodes", "1", "--variant", "unplanned"]
    options = [*chosen, "--batch-size", "2", "--workers", "1", "--out", tmp_path / "out"]
    error = refused(capsys, export_for(stages, "libero_10", upside_down), *options)
    assert "image_rotation: 'none' against '180'" in error
    export = export_for(stages, "libero_10", Conventions.for_simulator(data))
    command = ["libero-table", str(export), *map(str, options)]
    assert cli.main(command) == 0
    out = capsys.readouterr().out
    assert "1/1 episodes" in out
    assert "trained on libero_10" in out
    assert "| **this policy, unplanned** |  | 0.0 [0.0, 79.3] |  |  |  |" in out
    found = json.loads((tmp_path / "out" / "table.json").read_text())
    assert found["rows"][0]["libero_object"]["episodes"] == 1
    assert (found["comparisons"], found["protocol"]["execute_steps"]) == ([], 6)
    assert (tmp_path / "out" / "table.md").read_text() in out
    record = tmp_path / "out" / "libero_object" / "episodes" / "unplanned" / f"{task}-000.json"
    assert json.loads(record.read_text())["execute_steps"] == 6  # the chunk's length
    began = record.stat().st_mtime_ns
    assert cli.main(command) == 0
    assert record.stat().st_mtime_ns == began
    assert cli.main(["eval", "--replay", str(record), "--export", str(export)]) == 0
    assert "the same" in capsys.readouterr().out


def test_demonstrations_that_failed_their_replay_are_refused(stages, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("wav.evaluation.extras.table.simulator_versions", lambda suite: {})
    store = EpisodeStore.open(stages[0] / "episodes")
    verdict = {"passed": False, "digest": store.digest, "success_share": 0.5, "episodes": 20}
    write_json(report_path(store.path), verdict)
    export = export_for(stages, "libero_goal")
    options = ("--demonstrations", store.path, "--out", tmp_path / "out")
    assert "only 50% of its replayed demonstrations succeed" in refused(capsys, export, *options)
    assert not (tmp_path / "out").exists()
