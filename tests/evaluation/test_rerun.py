"""A recorded episode run again in the real simulator with an untrained policy; records that must be refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.stage_folders import DATA, PLANNER, SETTINGS, make_stages
from wav import cli
from wav.evaluation.evaluate import evaluate
from wav.evaluation.extras.rerun import Rerun
from wav.evaluation.protocol import EpisodeSpec
from wav.evaluation.records import read_record, write_record
from wav.evaluation.rollout import Rollout
from wav.policy.export import export_policy, policy_from_stages
from wav.policy.policy import Policy
from wav.sim.registry import select_tasks
from wav.sim.workers import SimPool

pytestmark = pytest.mark.simulator

EPISODES = {"episodes_per_task": 1, "variants": ("planned",), "batch_size": 3, "swapped_episodes": 0, "videos": 0}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> tuple[Path, Path]:
    """Evaluation folder and export of one untrained policy; two tasks, 12 steps each."""
    folder = tmp_path_factory.mktemp("rerun")
    stages = make_stages(folder)
    policy, checkpoint = policy_from_stages(stages.joint, stages.latents, DATA, PLANNER, batch_size=3, device="cpu")
    export_policy(policy, checkpoint, folder / "export", settings=SETTINGS, metrics=None)
    settings = SETTINGS.model_copy(update={"eval_libero": SETTINGS.eval_libero.model_copy(update=EPISODES)})

    def short(suite, names):
        return tuple(dataclasses.replace(spec, max_steps=12) for spec in select_tasks(suite, names))

    with pytest.MonkeyPatch.context() as patch, SimPool("tabletop", DATA, workers=2, slots=3) as pool:
        patch.setattr("wav.evaluation.protocol.select_tasks", short)
        evaluate(settings, policy, folder / "eval", pool=pool, checkpoint=checkpoint.digest)
    return folder / "eval" / "episodes" / "planned", folder / "export"


def run(capsys, episode: Path, export: Path) -> tuple[int, list[str], str]:
    status = cli.main(["eval", "--replay", str(episode), "--export", str(export)])
    captured = capsys.readouterr()
    return status, captured.out.splitlines(), captured.err


def changed(episode: Path, folder: Path, **values) -> Path:
    """A copy of the record with other values."""
    path = folder / episode.name
    write_record(path, dataclasses.replace(read_record(episode), **values))
    return path


def test_an_episode_comes_out_the_same_alone_as_among_others(recorded, capsys):
    """The second task's episode shared its batch with the first's; alone it repeats every bit."""
    episodes, export = recorded
    status, lines, error = run(capsys, episodes / "lift_green_cube-000.json", export)
    assert (status, error) == (0, "")
    record = read_record(episodes / "lift_green_cube-000.json")
    assert (record.batch, record.execute_steps, len(record.call_digests)) == ([3, 1], 4, 3)
    assert lines[0] == "tabletop: planned: lift_green_cube, initial state 0, seed 7"
    assert lines[1].removeprefix("recorded: ") == lines[2].removeprefix("now: ")
    assert f"after {record.steps} steps, {record.policy_calls} policy calls" in lines[1]
    assert lines[3:] == ["the same"]


def test_a_difference_is_named_with_its_first_policy_call(recorded):
    """Without the simulator: the second call's actions were others, and with them all that follows."""
    was = read_record(recorded[0] / "lift_red_cube-000.json")
    spec = EpisodeSpec("tabletop", was.task, 0, "planned", was.task, was.instruction, 12, 7, 0)
    again = Rollout(spec, 0, success=not was.success, steps=12, calls=3, values=list(was.values))
    again.executed = [np.full((4, 7), n, np.float32) for n in range(3)]
    record = dataclasses.replace(
        was, steps=12, policy_calls=3, call_digests=[again.call_digests[0], "0" * 16, "1" * 16]
    )
    found = Rerun(record, again, ("torch was 1.0, is 2.0",))
    assert not found.same
    assert found.first_call == 1
    *_, note, last = found.lines
    assert note == "note: torch was 1.0, is 2.0"
    assert last.startswith(f"NOT the same: success {was.success} recorded, {not was.success} now; actions ")
    assert last.endswith("; first at policy call 1 (step 4)")
    again.values[0] += 1e-6
    assert found.first_call == 0
    record = dataclasses.replace(record, call_digests=again.call_digests[:2], values=again.values)
    assert Rerun(record, again, ()).first_call == 2


def test_the_recorded_planner_decides_not_the_exports(recorded, tmp_path, capsys):
    """A record under other planner settings is replayed with those: other actions, and the reader is told why."""
    episodes, export = recorded
    was = read_record(episodes / "lift_red_cube-000.json")
    values = {"planner": {**was.planner, "iterations": 0}, "code": "f" * 64, "versions": {**was.versions, "torch": "1"}}
    status, lines, _ = run(capsys, changed(episodes / "lift_red_cube-000.json", tmp_path, **values), export)
    assert status == 1
    assert any(line.startswith("note: torch was 1, is ") for line in lines)
    assert any(line.startswith("note: the code that decides a result was ffffffffffff, is ") for line in lines)
    assert "note: planner settings as recorded, which differ from the export's: iterations 0 against 1" in lines
    assert lines[-1].endswith("first at policy call 0 (step 0)")


def test_a_compiled_episode_is_asked_of_compiled_code(recorded, tmp_path, capsys, monkeypatch):
    episodes, export = recorded
    was = read_record(episodes / "lift_red_cube-000.json")
    load, asked = Policy.load, []
    monkeypatch.setattr(Policy, "load", lambda *a, compile, **k: asked.append(compile) or load(*a, **k))
    run(capsys, episodes / "lift_red_cube-000.json", export)
    values = {"versions": {**was.versions, "kernels": was.versions["kernels"] + ", compiled"}}
    _, lines, _ = run(capsys, changed(episodes / "lift_red_cube-000.json", tmp_path, **values), export)
    assert asked == [False, True]
    assert any(line.startswith("note: kernels was ") and ", compiled, is " in line for line in lines)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"checkpoint": "0" * 64}, ("recorded with checkpoint 000000000000", "--export")),
        ({"statistics": "0" * 64}, ("statistics digest", "000000000000")),
        ({"conventions": {"gripper": "0 open, 1 close"}}, ("record's", "gripper: ")),
        ({"planner": {"iterations": -1}}, ("not an episode that can be run", "iterations")),
        ({"batch": [3, 3]}, ("not an episode that can be run", "batch [3, 3]")),
        ({"variant": "lucky"}, ("not an episode that can be run", "'lucky'")),
    ],
)
def test_another_checkpoint_or_convention_is_refused(recorded, tmp_path, capsys, values, words):
    episodes, export = recorded
    was = read_record(episodes / "lift_red_cube-000.json")
    if "conventions" in values:
        values = {"conventions": {**was.conventions, **values["conventions"]}}
    status, lines, error = run(capsys, changed(episodes / "lift_red_cube-000.json", tmp_path, **values), export)
    assert (status, lines) == (1, [])
    assert error.count("\n") == 1
    assert all(word in error for word in words), error


def test_records_of_older_versions_are_named(recorded, tmp_path, capsys):
    episodes, export = recorded
    raw = json.loads((episodes / "lift_red_cube-000.json").read_text())
    del raw["planner"]
    (tmp_path / "old.json").write_text(json.dumps(raw))
    status, _, error = run(capsys, tmp_path / "old.json", export)
    assert status == 1
    assert "field 'planner' is missing" in error
    assert run(capsys, tmp_path / "none.json", export)[0] == 1
