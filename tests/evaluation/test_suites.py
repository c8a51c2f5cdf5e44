"""One model on several suites: results of each and in all, LIBERO's table from them, and where records lie."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.retrain import record
from wav.config import DataSettings, EvalLiberoSettings
from wav.data.names import full_name, joined
from wav.evaluation import protocol
from wav.evaluation.extras.published import AVERAGE, SUITES
from wav.evaluation.extras.table import evaluated_table, markdown
from wav.evaluation.protocol import build_episodes
from wav.evaluation.records import EpisodeRecord, by_suite, record_path, summarise, write_record
from wav.evaluation.tables import metrics_table
from wav.plots import success_rates
from wav.promotion import read_outcomes
from wav.sim.env import TaskSpec

LIMITS = {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520}
ALL = joined(list(SUITES))


def finished(suite: str, task: str, index: int, variant: str, success: bool, of: str = ALL) -> EpisodeRecord:
    place = {"suite": suite, "task": task, "init_index": index, "variant": variant, "instructed": task}
    steps = {"steps": 40, "max_steps": LIMITS[suite], "protocol_steps": LIMITS[suite]}
    return record(**place, **steps, success=success, checkpoint="c", conventions={"suite": of})


@pytest.fixture(scope="module")
def records() -> list[EpisodeRecord]:
    """Ten tasks of each suite, two initial states; planned solves all but the long suite's, unplanned half of all."""
    return [
        finished(
            suite, f"{suite}/task_{task}", index, variant, suite != "libero_10" if variant == "planned" else index > 0
        )
        for variant in ("planned", "unplanned")
        for index in range(2)
        for suite in SUITES
        for task in range(10)
    ]


def test_results_are_of_each_suite_and_of_all(records: list[EpisodeRecord]) -> None:
    metrics = summarise(records, {})
    assert (metrics["suite"], metrics["planned"]["episodes"], metrics["planned"]["success_rate"]) == (ALL, 80, 0.75)
    assert len(metrics["planned"]["tasks"]) == 40
    own = by_suite(metrics)
    assert {
        suite: (found["planned"]["success_rate"], found["planned"]["episodes"]) for suite, found in own.items()
    } == {
        **dict.fromkeys(SUITES, (1.0, 20)),
        "libero_10": (0.0, 20),
    }
    assert own["libero_10"]["paired"]["planned-unplanned"]["difference"] == -0.5
    text = metrics_table(metrics)
    assert "| **all of libero_10** | **0% of 20" in text
    assert "| **all** | **75% of 80" in text
    assert "libero 10" in success_rates(metrics, ["planned", "unplanned"])


def test_the_table_of_four_suites_comes_from_the_evaluation(records: list[EpisodeRecord]) -> None:
    table = evaluated_table(summarise(records, {}))
    assert table is not None
    assert table.rows[0].rates[AVERAGE].success_rate == 0.75
    assert table.rows[0].rates[AVERAGE].episodes == 80
    assert {c.column for c in table.comparisons if c.published == "WAV, paper"} == {*SUITES, AVERAGE}
    assert "94.4*" in markdown(table)
    some = summarise([r for r in records if not r.task.endswith("_9")], {})
    assert evaluated_table(some).comparisons == (), "published figures are over all tasks"
    assert evaluated_table({"suite": "tabletop", "planned": {"tasks": {}}}) is None


def test_one_suite_keeps_its_form(records: list[EpisodeRecord]) -> None:
    alone = [finished("libero_goal", "turn_it", 0, "planned", True, of="libero_goal")]
    metrics = summarise(alone, {})
    assert "suites" not in metrics
    assert (metrics["suite"], list(metrics["planned"]["tasks"])) == ("libero_goal", ["turn_it"])
    assert list(by_suite(metrics)) == ["libero_goal"]


def test_episodes_have_their_suites_limits_noise_and_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A task's episode has the limit, the noise and the video of its own suite, whoever is evaluated beside it."""

    def tasks(suite: str, names: tuple[str, ...]) -> tuple[TaskSpec, ...]:
        own = ["libero_goal", "libero_10"] if "+" in suite else [suite]
        found = [(full_name(s, "turn_it") if "+" in suite else "turn_it", LIMITS[s]) for s in own]
        return tuple(TaskSpec(name, "turn it", name, limit) for name, limit in found)

    monkeypatch.setattr(protocol, "select_tasks", tasks)
    settings = EvalLiberoSettings(episodes_per_task=1, variants=("planned",), swapped_episodes=0)
    goal, long = build_episodes(DataSettings(suites=("libero_goal", "libero_10"), tasks=()), settings)
    (alone,) = build_episodes(DataSettings(suites=("libero_goal",), tasks=()), settings)
    assert (goal.max_steps, long.max_steps) == (300, 520)
    assert (goal.noise_name, goal.picture) == (alone.noise_name, alone.picture)
    assert goal.picture != long.picture
    paths = [record_path(tmp_path, spec).relative_to(tmp_path / "episodes") for spec in (goal, long, alone)]
    assert [str(path) for path in paths] == [
        "planned/libero_goal/turn_it-000.json",
        "planned/libero_10/turn_it-000.json",
        "planned/turn_it-000.json",
    ]
    for spec in (goal, long):
        write_record(record_path(tmp_path, spec), finished(spec.suite, spec.task, 0, "planned", True))
    assert set(read_outcomes(tmp_path, "planned", "c")) == {"libero_goal/turn_it/000", "libero_10/turn_it/000"}
