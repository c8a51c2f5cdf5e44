"""LeRobot 0.6.1 and our plug-in: its registry, factories and processors on a folder of ``wav export --lerobot``.

LeRobot wants Python 3.12 and an older torch. Where this Python is 3.11, its source runs on this torch with the lines of
3.12's syntax written as 3.11 has them (:func:`as_older_python`): no simulator, no dataset, no device of LeRobot's.
"""

from __future__ import annotations

import json
import os
import re
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
PACKAGES = (
    "lerobot==0.6.1", "draccus==0.11.6", "mergedeep==1.3.4", "typing-inspect==0.9.0", "mypy-extensions==1.2.0",
    "toml==0.10.2", "einops==0.8.2", "pyyaml-include==2.2", "torchvision==0.28.0",
)  # fmt: skip
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


def as_older_python(folder: Path) -> None:
    """Write type aliases and parameters of Python 3.12 (PEP 695) as 3.11 has them."""
    for file in folder.rglob("*.py"):
        text = file.read_text()
        try:
            compile(text, str(file), "exec")
        except SyntaxError:
            text = re.sub(r"(?m)^type (\w+) = ", r"\1 = ", text)
            found = re.findall(r"(?m)^(?:class|def) \w+\[([^\]]+)\]\(", text)
            names = {part.split(":")[0].strip() for parts in found for part in parts.split(",")}
            text = re.sub(r"(?m)^(class \w+)\[(.+)\]\((.*)\):", r"\1(\3, Generic[\2]):", text).replace("(, ", "(")
            text = re.sub(r"(?m)^(class \w+)\[(\w+)\]:", r"\1(Generic[\2]):", text)
            text = re.sub(r"(?m)^(def \w+)\[[^\]]+\]\(", r"\1(", text)
            lines = "".join(f'{name} = TypeVar("{name}")\n' for name in sorted(names | {"T"}))
            text = re.sub(
                r"(?m)^(?=(?:import|from) (?!__future__))",
                f"from typing import Generic, TypeVar\n{lines}",
                text,
                count=1,
            )
            file.write_text(text)


@pytest.fixture(scope="module")
def lerobot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with LeRobot, what its import asks for, and the plug-in."""
    kept = os.environ.get("WAV_TEST_VENVS")
    folder = (Path(kept) if kept else tmp_path_factory.mktemp("venvs")) / "lerobot-0.6.1"
    if not folder.exists():
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--ignore-requires-python"]
        subprocess.run([*pip, "--target", str(folder), *PACKAGES], check=True)
        as_older_python(folder / "lerobot")
    plugin = tmp_path_factory.mktemp("plugin")
    here = shutil.copytree(PLUGIN, plugin / "source")  # pip builds in it
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--ignore-requires-python"]
    subprocess.run([*pip, "--target", str(plugin / "installed"), str(here)], check=True)
    shutil.copytree(plugin / "installed", folder, dirs_exist_ok=True)
    return folder


@pytest.mark.long
def test_through_lerobot_it_acts_as_in_process(converted: Path, lerobot: Path, tmp_path: Path) -> None:
    random = np.random.default_rng(5)
    shape = (STEPS, ROWS, DATA.image_height, DATA.image_width, 3)
    images: dict[str, Any] = {view: random.integers(0, 256, shape, np.uint8) for view in DATA.views}
    state = random.normal(size=(STEPS, ROWS, DATA.state_dim)).astype(np.float32)
    np.savez(tmp_path / "seen.npz", state=state, **images)
    (tmp_path / "tasks.json").write_text(json.dumps(TASKS))
    script = ROOT / "tests" / "serving" / "lerobot_robot.py"
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{lerobot}", "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, str(script), str(converted), str(tmp_path)], env=environment, check=True)

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
