"""Quickened arms: the same states to the bit as robosuite's own, with fewer look-ups."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.libero import KIT, needs_assets
from wav.config import DataSettings
from wav.sim.registry import make_env, select_tasks

SUITES = ["tabletop", pytest.param("libero_object", marks=[pytest.mark.long, needs_assets])]


def play(env: Any, task: str) -> tuple[list[bytes], list[float]]:
    """States and pictures of two episodes with large actions, and look-ups of actuators in each step."""
    seen, counts = [], []
    for index in (0, 1):
        first = env.reset(task, index)
        seen += [first.state.tobytes(), *(image.tobytes() for image in first.images.values())]
        model = env.scene.sim.model
        look_up, found = model.actuator_name2id, []
        model.actuator_name2id = lambda name, look_up=look_up, found=found: found.append(name) or look_up(name)
        for action in np.random.default_rng(index).uniform(-1, 1, (6, 7)).astype(np.float32):
            env.step(action, render=False)
            data = env.scene.sim.data
            seen += [np.array(x).tobytes() for x in (data.qpos, data.qvel, data.qacc, data.ctrl)]
        last = env.observe()
        seen += [last.state.tobytes(), *(image.tobytes() for image in last.images.values())]
        model.actuator_name2id = look_up
        counts.append(len(found) / 6)
    return seen, counts


@pytest.mark.parametrize("suite", SUITES)
def test_the_same_states_with_fewer_look_ups(suite: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WAV_LOCAL_DIR", str(tmp_path / "local"))
    if KIT.is_dir():
        monkeypatch.setenv("WAV_LIBERO_ASSETS", str(KIT))
    data = DataSettings(suite=suite, tasks=(), image_height=32, image_width=32)
    task = select_tasks(suite, ())[0].name
    module = "wav.sim.tabletop.env" if suite == "tabletop" else "wav.sim.libero.env"
    found = []
    for quick in (True, False):
        env = make_env(suite, data)
        if not quick:
            monkeypatch.setattr(f"{module}.use_fast_control", lambda robot: None)
        found.append(play(env, task))
        env.close()
    (ours, few), (theirs, many) = found
    assert ours == theirs
    assert few == [2, 2]  # the first of 25 physics steps is robosuite's own
    assert many == [50, 50]
