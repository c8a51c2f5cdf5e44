"""The console script: what it prints, how it exits, one line per error; one real episode in the simulator."""

import dataclasses
import json
import re
import shutil
import socket
from pathlib import Path

import av
import pytest

from tests.helpers.stage_folders import make_export
from wav import cli, doctor
from wav.config import Runtime, load_settings
from wav.evaluation.act import act_episodes
from wav.sim.registry import select_tasks

PRESETS = Path(__file__).resolve().parents[1] / "presets"


@pytest.fixture(autouse=True)
def _no_local_services(monkeypatch, tmp_path):
    monkeypatch.setenv("WAV_LOCAL_DIR", str(tmp_path / "local"))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return make_export(tmp_path_factory.mktemp("cli"), batch_size=2)


def run(capsys, *arguments):
    status = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def one_line(error, *words):
    assert error.count("\n") == 1
    assert "Traceback" not in error
    for word in words:
        assert word in error


@pytest.mark.simulator
def test_act_runs_real_episodes_and_says_how_they_went(exported, tmp_path, capsys, monkeypatch):
    def short(suite, names):
        return tuple(dataclasses.replace(spec, max_steps=26) for spec in select_tasks(suite, names))

    monkeypatch.setattr("wav.evaluation.act.select_tasks", short)
    status, out, err = run(
        capsys, "act", exported, "--suite", "tabletop", "--episodes", 2, "--workers", 1, "--videos", tmp_path
    )
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert len(lines) == 3
    names = sorted(line.split(" (")[0] for line in lines[:2])
    assert names == ["tabletop: lift_green_cube", "tabletop: lift_red_cube"]
    assert all("failure after 26 steps" in line or "success after" in line for line in lines[:2])
    assert lines[2].startswith("tabletop: ")
    assert lines[2].endswith("of 2 episodes solved (planned)")
    videos = sorted(tmp_path.glob("*.mp4"))
    assert [v.name for v in videos] == [f"tabletop-planned-lift_{c}_cube-000.mp4" for c in ("green", "red")]
    with av.open(str(videos[0])) as container:
        assert sum(1 for _ in container.decode(video=0)) == 27


def test_act_refuses_another_suite_and_unknown_tasks(exported, capsys):
    status, out, err = run(capsys, "act", exported, "--suite", "libero_object")
    assert (status, out) == (1, "")
    one_line(err, "--suite = libero_object", "trained on 'tabletop'", "give --suite tabletop")
    status, _, err = run(capsys, "act", exported, "--task", "lift_blue_cube")
    assert status == 1
    one_line(err, "lift_blue_cube", "did you mean")


def test_act_refuses_a_damaged_or_missing_export(exported, tmp_path, capsys):
    status, _, err = run(capsys, "act", tmp_path / "nothing")
    assert status == 1
    one_line(err, "nothing")
    copy = shutil.copytree(exported, tmp_path / "copy")
    (copy / "statistics.json").write_text("{}\n")
    status, _, err = run(capsys, "act", copy)
    assert status == 1
    one_line(err, "statistics.json", "truncated", "export the policy again")


def test_act_refuses_other_simulator_versions(exported, tmp_path, monkeypatch):
    monkeypatch.setattr("wav.sim.registry.simulator_versions", lambda *_: {"mujoco": "9.9", "robosuite": "1.4.0"})
    with pytest.raises(ValueError, match=r"simulator: .*mujoco.*against.*9\.9"):
        act_episodes(exported, suite="tabletop", episodes=1, device="cpu", report=lambda line: None)


def test_usage_errors_exit_with_two(capsys):
    for arguments in ([], ["act"], ["act", "x", "--episodes", "0"], ["doctr"]):
        assert cli.main(arguments) == 2
    said = capsys.readouterr().err
    assert "'--episodes': Input should be greater than or equal to 1" in said
    assert "Did you mean 'doctor'?" in said


def test_config_check(tmp_path, capsys):
    path = tmp_path / "params.yaml"
    path.write_text("planner: {iterations: 2}\n")
    assert run(capsys, "config", "check", path) == (0, f"{path}: valid\n", "")
    path.write_text("planner: {iteration: 2}\n")
    status, out, err = run(capsys, "config", "check", path)
    assert (status, out) == (1, "")
    one_line(err, "planner.iteration", "did you mean 'iterations'")
    assert run(capsys, "config", "check", tmp_path / "none.yaml")[0] == 1


@pytest.mark.integration
def test_summary_of_the_paper_size(capsys):
    status, out, err = run(capsys, "summary", PRESETS / "libero.yaml")
    assert (status, err) == (0, "")
    for line in (
        r"video +28 layers, 32 heads x 64 = 2048 wide, 128 channels",
        r"video +1,948,569,728",
        r"value +163,792,394",
        r"action +193,243,663",
        r"total +2,305,605,785",
        r"pretrain_video +2\.65 +5\.29 +2\.64 +10\.6 +47\.4",  # the last block computes no memory frames
        r"search, K=1 M=8 N=4, 16 video passes +45",
        r"search as the reference computes it, 150 passes +1,158",
        r"actions, 2 video passes +",
        r"train_joint +2 +4\.29 +0\.537 +3\.22 +1\.07 .* 16 bf16",
    ):
        assert re.search(line, out), line


@pytest.mark.integration
def test_summary_as_numbers(capsys):
    status, out, _ = run(capsys, "summary", PRESETS / "smoke.yaml", "--json", "--gpus", "2")
    numbers = json.loads(out)
    assert status == 0
    joint = numbers["stages"]["train_joint"]
    assert joint["micro_batch"] * 2 == load_settings(PRESETS / "smoke.yaml").train_joint.batch_size
    assert numbers["plan"]["total"] == numbers["plan"]["search"] + numbers["plan"]["act"]


@pytest.mark.integration
def test_summary_of_any_parameter_file(tmp_path, capsys):
    status, out, err = run(capsys, "summary", PRESETS / "piper-small.yaml", "--gpus", "1")
    assert (status, err) == (0, "")
    assert "memory per GPU of 1" in out
    path = tmp_path / "params.yaml"
    path.write_text("model: {value_expert: false}\n")
    status, out, _ = run(capsys, "summary", path, "--gpus", "2")
    assert status == 0
    assert re.search(r"value +none", out)
    assert "train_value" not in out
    status, out, err = run(capsys, "summary", path, "--gpus", "5")
    assert (status, out) == (1, "")
    one_line(err, "pretrain_video.batch_size = 32", "5 GPUs", "--gpus")


def test_doctor_names_what_to_fix(monkeypatch, tmp_path, capsys):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("PREFECT_API_URL", f"http://127.0.0.1:{port}/api")
    monkeypatch.setenv("WAV_STORE", "s3://wav")
    monkeypatch.setenv("WAV_S3_ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setitem(doctor.REQUIRED, "mujoco", "0.0.1")
    monkeypatch.setattr(doctor, "check_renderer", lambda: iter([doctor.Check("renderer", True, "egl")]))
    status, out, _ = run(capsys, "doctor")
    assert status == 1
    failures = [line for line in out.splitlines() if line.startswith("FAIL")]
    assert [line.split()[1] for line in failures] == ["mujoco:", "prefect:", "store:"]
    assert "pip install mujoco==0.0.1" in failures[0]
    assert all("make up" in line for line in failures[1:])
    status, out, _ = run(capsys, "doctor", "--json")
    assert status == 1
    assert {entry["name"] for entry in json.loads(out)} >= {"renderer", "disk", "memory", "robosuite", "torch"}


def test_doctor_passes_a_ready_machine(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "answers", lambda ask: "")
    monkeypatch.setattr(doctor, "check_renderer", lambda: iter([doctor.Check("renderer", True, "egl")]))
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:1/api")
    found = []
    assert doctor.run_checks(Runtime(store=f"file://{tmp_path}", workspace=tmp_path), found.append)
    assert {check.name for check in found if not check.ok} <= {"gpu", "memory", "libero"}
    monkeypatch.setattr(doctor, "MIN_DISK_GIB", 1e9)
    assert not doctor.run_checks(Runtime(store=f"file://{tmp_path}", workspace=tmp_path), found.append)


def test_doctor_really_renders():
    assert all(check.ok for check in doctor.check_renderer())
