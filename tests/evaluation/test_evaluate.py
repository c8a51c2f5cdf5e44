"""Evaluation end to end on fakes: files, metrics, resume, start checks."""

import dataclasses
import json

import av
import numpy as np
import pytest

from tests.evaluation.fakes import DATA, FakePolicy, FakePool, settings
from wav.data.conventions import Conventions
from wav.errors import ConfigError, DataError, SimulationError
from wav.evaluation.evaluate import check_start, evaluate
from wav.evaluation.intervals import wilson
from wav.evaluation.protocol import build_episodes, versions
from wav.evaluation.records import read_record
from wav.evaluation.tables import metrics_table
from wav.planning.types import Levels
from wav.sim.registry import select_tasks, task_specs


def run(out, pool=None, checkpoint="weights", **changes):
    pool = pool or FakePool(3)
    heard = []
    metrics = evaluate(settings(**changes), FakePolicy(), out, pool=pool, checkpoint=checkpoint, progress=heard.append)
    return metrics, pool, heard


def test_files_and_metrics(tmp_path):
    metrics, _, heard = run(tmp_path)
    assert metrics == json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["suite"] == "tabletop"
    for variant in ("planned", "unplanned", "temperature"):
        rate = metrics[variant]
        records = [read_record(p) for p in sorted((tmp_path / "episodes" / variant).glob("*.json"))]
        assert len(records) == rate["episodes"] == 6
        solved = sum(r.success for r in records)
        expected = wilson(solved, 6)
        assert (rate["success_rate"], rate["wilson_low"]) == (solved / 6, expected.wilson_low)
        assert set(rate["tasks"]) == {"lift_red_cube", "lift_green_cube"}
        assert sum(t["episodes"] * t["success_rate"] for t in rate["tasks"].values()) == pytest.approx(solved)
    probe = metrics["swapped"]["planned"]
    assert probe["instructed"] + probe["original"] + probe["neither"] == probe["episodes"] == 4
    assert set(metrics["paired"]) == {"planned-unplanned", "planned-temperature", "temperature-unplanned"}
    assert [p.done for p in heard] == list(range(1, 27))
    assert heard[-1].eta_seconds == 0
    assert heard[-1].successes == sum(
        round(metrics[c]["success_rate"] * metrics[c]["episodes"]) for c in ("planned", "unplanned", "temperature")
    )
    assert "26/26" in heard[-1].message
    assert "tabletop" in metrics_table(metrics)
    assert not list(tmp_path.rglob("*.tmp*"))


def test_record_says_how_it_came_about(tmp_path):
    run(tmp_path)
    record = read_record(tmp_path / "episodes" / "planned" / "lift_green_cube-002.json")
    assert record.versions.keys() >= {"torch", "mujoco", "robosuite", "wav"}
    assert (record.checkpoint, record.statistics, record.render) == ("weights", "statistics", DATA.render)
    assert record.conventions["gripper"] == "-1 open, +1 close"
    assert record.instruction == "lift the green cube"
    assert len(record.values) == record.policy_calls == len(record.plan["sigma_video"]) == len(record.call_digests)
    assert (record.execute_steps, record.batch) == (4, [3, 2])
    assert record.planner == settings().planner.model_dump(mode="json")


def test_compiled_code_makes_other_episodes(tmp_path):
    """It rounds otherwise: the record says so, and the uncompiled policy runs them again."""
    policy = FakePolicy()
    policy.compiled = True
    evaluate(settings(), policy, tmp_path, pool=FakePool(3), checkpoint="weights")
    record = read_record(tmp_path / "episodes" / "planned" / "lift_green_cube-002.json")
    assert record.versions["kernels"] == versions()["kernels"] + ", compiled"
    again = evaluate(settings(), FakePolicy(), tmp_path, pool=FakePool(3), checkpoint="weights")
    assert again["timing"]["episodes_resumed"] == 0


def test_pictures_can_be_opened(tmp_path):
    run(tmp_path)
    videos = sorted((tmp_path / "videos").glob("*.mp4"))
    assert [v.name for v in videos] == [
        f"tabletop-{c}-lift_red_cube-000.mp4" for c in ("planned", "temperature", "unplanned")
    ]
    record = read_record(tmp_path / "episodes" / "planned" / "lift_red_cube-000.json")
    with av.open(str(videos[0])) as container:
        frames = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
    assert len(frames) == record.steps + 1
    assert frames[0].shape == (192, 384, 3)
    assert frames[-1].mean() > frames[0].mean() + 20  # the cube rises: the fake's pictures brighten
    assert len(list((tmp_path / "strips").glob("*.png"))) == 3
    assert list((tmp_path / "predictions").glob("tabletop-planned-lift_red_cube-000-step*.png"))


def test_resume_runs_only_what_is_missing_and_comes_out_the_same(tmp_path):
    metrics, _, _ = run(tmp_path / "whole")
    dying = FakePool(3, order=5, crashes={("lift_green_cube", 1): 6})
    with pytest.raises(SimulationError):
        run(tmp_path / "part", dying)
    done = len(list((tmp_path / "part" / "episodes").rglob("*.json")))
    assert 0 < done < 26
    assert not (tmp_path / "part" / "metrics.json").exists()
    again, pool, heard = run(tmp_path / "part")
    assert len(pool.resets) == len(heard) == 26 - done
    assert again["timing"]["episodes_resumed"] == done
    same = [key for key in metrics if key != "timing"]
    assert {key: again[key] for key in same} == {key: metrics[key] for key in same}
    assert run(tmp_path / "part")[1].resets == []


def test_only_a_changed_key_repeats_episodes(tmp_path):
    run(tmp_path)
    assert run(tmp_path, videos=0, episodes_per_task=2)[1].resets == []
    assert not (tmp_path / "episodes" / "planned" / "lift_red_cube-002.json").exists()
    assert not list((tmp_path / "videos").glob("*"))
    assert len(run(tmp_path, videos=0, episodes_per_task=3)[1].resets) == 6
    assert len(run(tmp_path, videos=0, checkpoint="other")[1].resets) == 26
    assert len(run(tmp_path, videos=0, seed=8)[1].resets) == 26


def test_other_noise_levels_repeat_episodes(tmp_path, monkeypatch):
    """The schedule of planning is no part of the weights, so their digest alone would keep stale records."""
    run(tmp_path)
    made = FakePolicy.__init__

    def other(self, conventions=None):
        made(self, conventions)
        self.levels = Levels((1.0, 0.5))

    monkeypatch.setattr(FakePolicy, "__init__", other)
    assert len(run(tmp_path)[1].resets) == 26


def test_changed_code_repeats_episodes(tmp_path, monkeypatch):
    run(tmp_path, videos=0)
    monkeypatch.setattr("wav.evaluation.protocol.code_digest", lambda: "edited")
    assert len(run(tmp_path, videos=0)[1].resets) == 26


def test_code_digest_covers_what_decides_a_result():
    from wav.evaluation import protocol
    from wav.source_code import module_digests

    found = set(module_digests(protocol._ENTRIES))
    rooms = ("wav/sim/tabletop/env.py", "wav/sim/libero/env.py", "wav/sim/rendering.py", "wav/planning/planner.py")
    others = ("wav/policy/policy.py", "wav/model/transformer.py", "wav/codec/pca.py", "wav/seeding.py")
    assert {*rooms, *others, "wav/evaluation/rollout.py", "wav/data/state.py"} <= found
    shown = (
        "wav/evaluation/report",
        "wav/evaluation/records",
        "wav/evaluation/tables",
        "wav/training",
        "wav/promotion",
    )
    assert not [path for path in found if path.startswith(shown)]
    assert len(protocol.code_digest()) == 64


def test_a_damaged_record_is_named(tmp_path):
    run(tmp_path)
    path = tmp_path / "episodes" / "planned" / "lift_red_cube-001.json"
    path.write_text(path.read_text()[:50])
    with pytest.raises(DataError, match=r"lift_red_cube-001\.json: not valid JSON .*remove the file"):
        run(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("render", "full"),
        ("image_rotation", "none"),
        ("gripper", "0 open, 1 close"),
        ("state_layout", "joint angles"),
        ("control_hz", 10),
        ("image_height", 128),
        ("simulator", {"mujoco": "3.0.0", "robosuite": "1.4.0"}),
    ],
)
def test_start_refuses_other_conventions(tmp_path, field, value):
    trained = dataclasses.replace(Conventions.for_simulator(DATA), **{field: value})
    pool = FakePool(1)
    with pytest.raises(ConfigError, match=rf"{field}: .*against"):
        evaluate(settings(), FakePolicy(trained), tmp_path, pool=pool, checkpoint="weights")
    assert pool.resets == []
    assert not list(tmp_path.iterdir())


def test_start_refuses_other_data():
    store = dataclasses.replace(Conventions.for_simulator(DATA), image_rotation="none")
    with pytest.raises(ConfigError, match=r"episode store.*image_rotation"):
        check_start(FakePolicy(), DATA, store)


def test_episodes_are_disjoint_from_demonstrations_and_unknown_tasks_are_refused():
    episodes = build_episodes(DATA, settings(episodes_per_task=50, first_state=950).eval_libero)
    assert {e.init_index for e in episodes if e.variant == "planned"} == set(range(950, 1000))
    assert max(e.init_index for e in episodes) < settings().ingest.first_index
    with pytest.raises(ConfigError, match="lift_red_cube"):
        build_episodes(DATA.model_copy(update={"tasks": ("lift_read_cube",)}), settings().eval_libero)


def test_the_references_budget_is_a_column_of_its_own(tmp_path):
    """One run under the longer limit gives both: the protocol's column comes out as under the protocol's budget."""
    short = settings(execute_steps=1, swapped_episodes=1)
    tasks = {name: dataclasses.replace(spec, max_steps=14) for name, spec in task_specs("tabletop").items()}
    longer = build_episodes(DATA, short.eval_libero.model_copy(update={"budget": "reference"}))
    assert {(e.max_steps, e.protocol_steps) for e in longer if not e.swapped} == {
        (1000, s.max_steps) for s in select_tasks("tabletop", DATA.tasks)
    }
    assert all(e.protocol_steps == 0 and e.max_steps < 1000 for e in longer if e.swapped)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("wav.evaluation.protocol.select_tasks", lambda suite, names: [tasks[name] for name in names])
        protocol, _, _ = run(tmp_path / "protocol", execute_steps=1, swapped_episodes=1)
        reference, _, heard = run(tmp_path / "reference", execute_steps=1, swapped_episodes=1, budget="reference")
    late = 0
    for variant in ("planned", "unplanned", "temperature"):
        assert reference[variant] == protocol[variant]
        column = reference["reference"][variant]
        assert column["episodes"] == 6
        late += round(6 * (column["success_rate"] - reference[variant]["success_rate"]))
        for path in (tmp_path / "reference" / "episodes" / variant).glob("*.json"):
            record = read_record(path)
            assert (record.max_steps, record.protocol_steps) == (1000, 14)
            assert record.solved == (record.success and record.steps <= 14)
    assert late > 0
    assert reference["paired"] == protocol["paired"]
    assert reference["swapped"] == protocol["swapped"]
    assert "reference" not in protocol
    assert heard[-1].successes == sum(
        round(protocol[c]["success_rate"] * 6) for c in ("planned", "unplanned", "temperature")
    )
    head = metrics_table(reference).splitlines()[0]
    assert head.count("protocol's limit") == head.count("reference's 1000 steps") == 3
    assert "limit" not in metrics_table(protocol)


def test_prediction_rows_are_aligned():
    from wav.evaluation.pictures import prediction_grid, strip

    real = np.arange(2 * 3, dtype=np.uint8).reshape(2, 3, 1, 1, 1) * np.ones((1, 1, 4, 4, 3), np.uint8)
    picture = prediction_grid(real, real + 100)
    assert picture[0, 0, 0] == 0
    assert picture[6, 6, 0] == 101
    assert picture[18, 12, 0] == 105
    assert strip(list(real[0]), 2)[0, 6, 0] == 2
