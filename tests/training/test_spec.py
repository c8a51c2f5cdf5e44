"""Run keys: what changes a run, what does not; the spec's text."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.training.conftest import settings
from wav.config import Settings
from wav.errors import ConfigError, DataError
from wav.training.spec import TrainPaths, TrainSpec, make_spec


def test_text_roundtrip(spec_of) -> None:
    spec = spec_of(pretrain_video={"learning_rate": 3e-4})
    assert TrainSpec.from_json(spec.to_json()) == spec


@pytest.mark.parametrize("damage", ["{}", "{", b"\xff", "[" * 5000])
def test_a_damaged_spec_is_one_sentence(damage: str | bytes) -> None:
    with pytest.raises(ConfigError, match=r"^training spec: [^\n]{,200}; write it with wav.training.spec.make_spec$"):
        TrainSpec.from_json(damage)


def test_key_follows_what_changes_the_result(spec_of) -> None:
    key = spec_of().key
    assert spec_of(name="elsewhere").key == key
    assert spec_of(pretrain_video={"keep_last": 5, "log_every": 1, "checkpoint_every": 2}).key == key
    assert spec_of(pretrain_video={"keep_best": 1, "keep_every": 9, "spike_factor": 0}).key == key
    assert spec_of(pretrain_video={"ranks": 2, "zero_stage": 2}).key == key  # a run goes on with other ranks
    assert spec_of(train_joint={"steps": 7}).key == key
    for section, change in [
        ("pretrain_video", {"learning_rate": 1e-4}),
        ("pretrain_video", {"steps": 7}),
        ("model", {"layers": 3}),
        ("data", {"memory_horizon": 9}),
    ]:
        assert spec_of(**{section: change}).key != key, (section, change)


@pytest.mark.parametrize(("written", "read"), [(True, "on"), (False, "off"), ("on", "on"), ("auto", "auto")])
def test_switches_are_booleans_too(written: object, read: str) -> None:
    """As parameter files and exports from before have them, and as YAML 1.1 reads on and off."""
    found = settings(train_joint={"gradient_checkpointing": written, "compile": written})
    assert found.train_joint.gradient_checkpointing == found.train_joint.compile == read
    assert Settings.model_validate({"export": {"compile": written}}).export.compile == read


def test_key_follows_the_inputs_and_the_code(spec_of, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_of()
    other = tmp_path / "latents"
    other.mkdir()
    (other / "manifest.json").write_text("{}")
    make = {"store": "file:///x", "device": "cpu"}
    assert make_spec("pretrain_video", settings(), replace(spec.paths, latents=other), **make).key != spec.key
    monkeypatch.setattr("wav.training.spec.code_digest", lambda stage: "other code")
    assert spec_of().key != spec.key


def codes(project: Path) -> dict[str, str]:
    """Digest of every stage's code in a copy of the project."""
    text = "import json; from wav.stages import TRAINING; from wav.training.spec import code_digest; "
    text += "print(json.dumps({stage: code_digest(stage) for stage in TRAINING}))"
    done = subprocess.run([sys.executable, "-c", text], cwd=project, env={**os.environ, "PYTHONPATH": str(project)},
                          capture_output=True, text=True, check=True)  # fmt: skip
    found: dict[str, str] = json.loads(done.stdout)
    return found


@pytest.mark.integration
def test_an_interrupted_run_survives_edits_that_decide_nothing(tmp_path: Path) -> None:
    """A comment in a training file, an inference, reader, reward or reporting file do not change a run's key."""
    root = Path(__file__).parents[2]
    shutil.copytree(root / "wav", tmp_path / "wav", ignore=shutil.ignore_patterns("__pycache__"))

    def edit(name: str, text: str) -> None:
        with (tmp_path / "wav" / name).open("a") as file:
            file.write(text)

    before = codes(tmp_path)
    edit("training/step.py", "# a comment\n")
    for name in ("training/record.py", "training/loop.py", "planning/planner.py", "rewards/terms.py", "codec/pca.py"):
        edit(name, "EDITED = 1\n")
    assert codes(tmp_path) == before
    edit("training/objectives/joint.py", "EDITED = 1\n")
    assert {stage for stage, code in codes(tmp_path).items() if code != before[stage]} == {"train_joint"}
    edit("model/layers.py", "EDITED = 1\n")
    assert not set(codes(tmp_path).values()) & set(before.values())


def test_only_the_stage_s_sections_are_read(spec_of, workspace: Path, tmp_path: Path) -> None:
    view = settings().for_stage("pretrain_video")
    paths = TrainPaths(workspace / "episodes", workspace / "latents", tmp_path / "out", tmp_path / "cache")
    assert make_spec("pretrain_video", view, paths, store="file:///x").key == spec_of().key


def test_missing_inputs_are_named(tmp_path: Path, workspace: Path) -> None:
    paths = TrainPaths(tmp_path / "none", workspace / "latents", tmp_path / "out", tmp_path / "cache")
    with pytest.raises(DataError, match=r"none/manifest\.json: missing.*dvc repro ingest"):
        make_spec("pretrain_video", Settings(), paths, store="file:///x")
    with pytest.raises(ConfigError, match="previous stage"):
        make_spec("train_value", Settings(), replace(paths, episodes=workspace / "episodes"), store="file:///x")
    paths = replace(paths, episodes=workspace / "episodes", init=tmp_path / "models" / "video")
    with pytest.raises(DataError, match=r"checkpoint\.json: missing"):
        make_spec("train_value", Settings(), paths, store="file:///x")
