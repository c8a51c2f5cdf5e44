"""LeRobot and our plug-in: its registry, factories and processors on a folder of ``wav export --lerobot``.

LeRobot wants Python 3.12 and torch before 2.12, so it runs in an environment of its own, gigabytes that are kept in
``WAV_TEST_VENVS`` where that is set.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.stage_folders import DATA, PLANNER, SETTINGS, make_stages
from wav import cli
from wav.policy import Observation, Policy
from wav.policy.export import export_policy, load_export, policy_from_stages, verify_export
from wav.policy.lerobot import features

ROOT = Path(__file__).resolve().parents[2]
PLUGIN = ROOT / "clients" / "lerobot_policy_wav"
PAGE = ROOT / "docs" / "lerobot.md"
TASKS = ["lift the red cube", "lift the green cube"]
ROWS, STEPS = 2, 6


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lerobot")
    stages = make_stages(folder)
    policy = policy_from_stages(stages.joint, stages.latents, DATA, PLANNER, batch_size=ROWS, device="cpu")
    exported = export_policy(*policy, folder / "export", settings=SETTINGS, metrics=None)
    assert cli.main(["export", str(exported), "--lerobot", str(folder / "converted")]) == 0
    return folder / "converted"


def test_a_converted_export_is_still_one(converted: Path) -> None:
    listed = {record["path"] for record in verify_export(converted)["files"]}
    assert {"config.json", "policy_preprocessor.json", "policy_postprocessor.json"} <= listed
    assert Policy.load(converted, device="cpu").execute_steps == DATA.action_chunk  # 8 unless evaluated otherwise
    config = json.loads((converted / "config.json").read_text())
    assert config["views"] == {"observation.images.image": "agentview", "observation.images.image2": "wrist"}
    assert config["input_features"]["observation.state"]["shape"] == [DATA.state_dim]
    assert "lerobot-eval --policy.path=USER/NAME" in (converted / "README.md").read_text()


def test_views_of_two_arms_have_names_of_their_own() -> None:
    data = DATA.model_copy(update={"views": ("top", "left_wrist", "right_wrist")})
    names = {f"observation.images.{name}" for name in ("image", "image2", "right_wrist")}
    assert set(features(data)) == names


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of an environment that the page's command made."""
    found = sorted(Path.home().glob(".pyenv/versions/3.12.*/bin/python"))
    base = sys.executable if sys.version_info >= (3, 12) else str(found[-1]) if found else shutil.which("python3.12")
    kept = os.environ.get("WAV_TEST_VENVS")
    made = (Path(kept) if kept else tmp_path_factory.mktemp("venvs")) / "lerobot-3.12" / "bin" / "python"
    if not made.exists():
        if not base:
            pytest.skip("no Python 3.12 here")
        subprocess.run([base, "-m", "venv", str(made.parents[1])], check=True)
        project = tmp_path_factory.mktemp("project")  # pip builds in it
        for name in ("wav", "flows", "infra", "clients"):
            shutil.copytree(ROOT / name, project / name)
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, project / name)
        (line,) = re.findall(r"(?m)^    pip (install lerobot .*)$", PAGE.read_text())
        subprocess.run([str(made), "-m", "pip", "-q", *shlex.split(line)], check=True, cwd=project)
    return made


@pytest.fixture(scope="module")
def plugin(python: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the plug-in of the tree, as pip installs it."""
    folder = tmp_path_factory.mktemp("plugin")
    here = shutil.copytree(PLUGIN, folder / "source")  # pip builds in it
    pip = [str(python), "-m", "pip", "install", "-q", "--no-deps", "--target"]
    subprocess.run([*pip, str(folder / "installed"), str(here)], check=True)
    return folder / "installed"


@pytest.mark.long
def test_through_lerobot_it_acts_as_in_process(converted: Path, python: Path, plugin: Path, tmp_path: Path) -> None:
    random = np.random.default_rng(5)
    shape = (STEPS, ROWS, DATA.image_height, DATA.image_width, 3)
    images: dict[str, Any] = {view: random.integers(0, 256, shape, np.uint8) for view in DATA.views}
    state = random.normal(size=(STEPS, ROWS, DATA.state_dim)).astype(np.float32)
    np.savez(tmp_path / "seen.npz", state=state, **images)
    (tmp_path / "tasks.json").write_text(json.dumps(TASKS))
    script = ROOT / "tests" / "serving" / "lerobot_robot.py"
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{plugin}", "HF_HUB_OFFLINE": "1"}
    subprocess.run([str(python), str(script), str(converted), str(tmp_path)], env=environment, check=True)

    told = json.loads((tmp_path / "told.json").read_text())
    policy = load_export(converted, batch_size=8, device="cpu")
    assert told["policy"] == "lerobot_policy_wav.modeling_wav.WavPolicy"
    assert told["chunk"] == [ROWS, DATA.action_chunk, DATA.action_dim]
    assert told["parameters"] == sum(p.numel() for p in policy.model.model.parameters())
    expected = []
    for episode in (1, 2):
        for row in range(ROWS):
            policy.reset(row, episode=f"{episode}-{row}", seed=7)
        for step in range(0, STEPS, told["n_action_steps"]):
            seen = [
                Observation({view: images[view][step, i] for view in DATA.views}, state[step, i], TASKS[i])
                for i in range(ROWS)
            ]
            chunk = policy.act(seen, range(ROWS)).actions[:, : told["n_action_steps"]]
            expected.append(np.moveaxis(chunk, 1, 0)[: STEPS - step])
    done = np.load(tmp_path / "done.npz")
    np.testing.assert_allclose(done["actions"], np.concatenate(expected), atol=1e-4)
    np.testing.assert_allclose(done["normalised"], policy.statistics.normalize_state(state[-1]), atol=1e-5)
    for name in ("policy_preprocessor", "policy_postprocessor"):  # what LeRobot itself would have written
        ours, theirs = (json.loads((place / f"{name}.json").read_text()) for place in (converted, tmp_path / "fresh"))
        assert [step["registry_name"] for step in ours["steps"]] == [step["registry_name"] for step in theirs["steps"]]
        for mine, other in zip(ours["steps"], theirs["steps"], strict=True):
            assert mine["config"] == other["config"]
