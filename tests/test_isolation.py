"""A deployment's run never writes over DVC's outputs; the hashes it shows are DVC's own."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml
from prefect.logging import disable_run_logger

from flows import provenance
from flows.eval_run import default_checkpoint, find_checkpoint, prepare_export, wanted_changes
from flows.isolation import isolate, source_workspace
from wav import promotion
from wav.config import load_settings, parameter_text
from wav.errors import CheckpointError, ConfigError, DataError
from wav.io.files import write_json
from wav.io.storage import open_store
from wav.stages import STAGES

PROJECT = Path(__file__).resolve().parents[1]
SMOKE = PROJECT / "presets" / "smoke.yaml"


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """A workspace whose data exist, as far as links go."""
    folder = tmp_path / "workspace"
    for stage in STAGES.values():
        for path in stage.inputs:
            (folder / path).mkdir(parents=True, exist_ok=True)
            (folder / path / "content").write_text(path)
    (folder / "params.yaml").write_text(parameter_text(load_settings(SMOKE)))
    return folder


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_reads_the_workspace_and_writes_elsewhere(stage: str, workspace: Path, tmp_path: Path) -> None:
    folder = isolate(stage, workspace, tmp_path / "runs" / "1")
    for path in STAGES[stage].inputs:
        assert (folder / path).resolve() == (workspace / path).resolve()
    for path in STAGES[stage].made:
        place = folder / path
        place.parent.mkdir(parents=True, exist_ok=True)
        assert place.parent.resolve().is_relative_to(folder.resolve()), f"{path} would be written into the workspace"
        assert not place.is_symlink()
    assert load_settings(folder / "params.yaml") == load_settings(SMOKE)
    assert source_workspace(folder) == workspace
    assert isolate(stage, workspace, folder) == folder, "a run that is retried finds its folder there"


def test_changes_are_checked_and_missing_inputs_named(workspace: Path, tmp_path: Path) -> None:
    folder = isolate("train_joint", workspace, tmp_path / "a", {"train_joint": {"steps": 3}})
    assert load_settings(folder / "params.yaml").train_joint.steps == 3
    with pytest.raises(ConfigError, match=r"train_joint\.stepz"):
        isolate("train_joint", workspace, tmp_path / "b", {"train_joint": {"stepz": 3}})
    other = tmp_path / "other"
    with pytest.raises(DataError, match=r"other/.*needs it; run `dvc pull`"):
        isolate("eval_libero", workspace, tmp_path / "c", instead={"models/joint": other})


def test_the_parameters_of_an_evaluation() -> None:
    changes = wanted_changes("", ["lift_red_cube"], 3, None, {"iterations": 0}, None)
    assert changes == {
        "data": {"tasks": ["lift_red_cube"]},
        "eval_libero": {"episodes_per_task": 3},
        "planner": {"iterations": 0},
    }


def test_an_export_is_evaluated_with_its_own_settings(workspace: Path, tmp_path: Path) -> None:
    settings = load_settings(SMOKE).model_dump(mode="json")
    settings["planner"]["iterations"] = 2
    export = tmp_path / "export"
    export.mkdir()
    write_json(export / "settings.json", {name: settings[name] for name in ("data", "model", "planner", "export")})
    prepare_export(export, workspace, tmp_path / "run", wanted_changes("", None, 4, ["planned"], None, 3))
    made = load_settings(tmp_path / "run" / "params.yaml")
    assert (made.planner.iterations, made.eval_libero.episodes_per_task, made.eval_libero.seed) == (2, 4, 3)
    assert made.data == load_settings(SMOKE).data
    assert made.label_rewards == load_settings(workspace / "params.yaml").label_rewards
    with pytest.raises(ConfigError, match="trained on 'tabletop'"):
        prepare_export(export, workspace, tmp_path / "run", wanted_changes("libero_goal", None, 0, None, None, None))


def test_checkpoints_are_found_by_folder_and_address(workspace: Path, tmp_path: Path) -> None:
    store = open_store((tmp_path / "store").as_uri())
    store.put_bytes("runs/1/export/settings.json", b"{}")
    found = find_checkpoint(f"{store.url}/runs/1/export/", workspace, store)
    assert (found / "settings.json").read_bytes() == b"{}"
    assert found.is_relative_to(workspace / ".wav")
    for text, message in [
        ("nowhere", "neither an export"),
        ("s3://other/export", "no such export"),
        (f"{store.url}/runs/2/export", "no such export"),
        ("champion", "has no champion 'tabletop'"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            find_checkpoint(text, workspace, store)


def test_without_a_checkpoint_it_is_the_project_s_model_then_the_champion(workspace: Path, tmp_path: Path) -> None:
    store, export = open_store((tmp_path / "store").as_uri()), tmp_path / "export"
    with disable_run_logger(), pytest.raises(CheckpointError, match=r"no joint model here, and .* has no champion"):
        default_checkpoint(workspace, store)
    export.mkdir()
    (export / "settings.json").write_text("{}")
    files = promotion.upload_policy(store, export, "policies/p1/export")
    champion = promotion.Champion("p1", "c1", "e1", {}, files, "abc", "run", "2026-01-01T00:00:00+00:00")
    promotion.promote(store, "tabletop", champion, None)
    with disable_run_logger():
        assert default_checkpoint(workspace, store) == "champion"
    found = find_checkpoint("champion", workspace, store)
    assert (found / "settings.json").read_text() == "{}"
    assert find_checkpoint("champion:tabletop", workspace, store) == found
    shutil.rmtree(workspace / "models/joint/checkpoint.json")
    (workspace / "models/joint/checkpoint.json").write_text("{}")
    assert default_checkpoint(workspace, store) == ""


def test_hashes_are_those_of_dvc(tmp_path: Path) -> None:
    from dvc.repo import Repo

    folder = tmp_path / "repo"
    for name, content in [("data/a.txt", b"a\r\n"), ("data/sub/b", b"\0" * 9), ("data/A", b""), ("one", b"1")]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    with Repo.init(str(folder), no_scm=True) as repo:
        for name in ("data", "one"):
            added = repo.add(str(folder / name))[0].outs[0].hash_info.value
            assert provenance.dvc_hash(folder / name) == added
    assert provenance.dvc_hash(folder / "missing") == ""


def test_the_table_names_inputs_by_the_lock_and_outputs_as_they_are(workspace: Path, tmp_path: Path) -> None:
    lock = {"stages": {"ingest": {"outs": [{"path": "data/episodes", "md5": "1.dir"}]}}}
    (workspace / "dvc.lock").write_text(yaml.safe_dump(lock))
    folder = isolate("label_rewards", workspace, tmp_path / "run")
    (folder / "data" / "rewards").mkdir()
    (folder / "data" / "rewards" / "values.npy").write_bytes(b"1")
    rows = {(row["role"], row["path"]): row["dvc"] for row in provenance.hash_table("label_rewards", folder)}
    assert rows["input", "data/episodes"] == "1.dir"
    assert rows["output", "data/rewards"] == provenance.dvc_hash(folder / "data" / "rewards")
    assert rows["output", "reports/label_rewards/metrics.json"] == "not made"
