"""Small generated files of robomimic and of ALOHA's recorders through every stage up to the trained policy.

Both families of files end as a policy that acts: what ingest makes of them is what the later stages take.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.sources import test_aloha_hdf5 as aloha
from tests.data.sources import test_robomimic_hdf5 as robomimic
from tests.training.every_stage import train, with_steps
from wav.config import Settings, load_preset
from wav.data.encode import build_text_encoder, encode_store, fit_codec
from wav.data.store import EpisodeStore
from wav.ingest import ingest
from wav.policy.export import policy_from_stages
from wav.rewards.label import label_store
from wav.sim.env import Observation

pytestmark = pytest.mark.long
STEPS = 24


def preset(name: str, **sections: dict[str, Any]) -> Settings:
    """A preset with two steps per training stage and other data."""
    raw = load_preset(name).model_dump(mode="json")
    for section, changes in sections.items():
        raw[section] |= changes
    return with_steps(raw, 2, name)


def of_aloha(folder: Path) -> Settings:
    """Two arms with 14 joints: presets/piper-small.yaml."""
    for number in range(4):
        state, action = aloha.arms(number, STEPS)
        more = {"action": action, "observations/qpos": state}
        more |= {f"observations/images/{camera}": aloha.pictures(number, STEPS) for camera in aloha.CAMERAS}
        aloha.write(folder / f"episode_{number}.hdf5", number, **more)
    options = {"control_hz": 30, "instructions": {".": "fold the towel"}}
    return preset("piper-small", ingest={"source": "aloha_hdf5", "path": str(folder), "aloha_hdf5": options})


def of_robomimic(folder: Path) -> Settings:
    """One arm with end-effector deltas: presets/smoke.yaml."""
    folder.mkdir()
    robomimic.write(folder / "image.hdf5", demos=4, steps=STEPS)
    options = {"instructions": {"Lift": "lift the red cube"}}
    source = {"source": "robomimic_hdf5", "path": str(folder / "image.hdf5"), "robomimic_hdf5": options}
    return preset("smoke", data={"suites": ["robomimic"], "tasks": [], "render": "full"}, ingest=source)


@pytest.mark.parametrize("make", [of_aloha, of_robomimic])
def test_files_of_this_family_become_a_policy(
    make: Callable[[Path], Settings], start: Callable[..., Any], tmp_path: Path
) -> None:
    settings = make(tmp_path / "set")
    data = settings.data
    ingest(data, settings.ingest, tmp_path / "episodes", workers=1)
    episodes = EpisodeStore.open(tmp_path / "episodes")
    assert len(episodes) == 4
    label_store(episodes, settings.label_rewards, data.action_chunk, tmp_path / "rewards")
    codec = fit_codec(episodes, data, settings.encode)
    text = build_text_encoder(settings.encode, data, episodes.instructions, tmp_path / "t5")
    encode_store(episodes, codec, text, data, tmp_path / "latents")
    for metrics in train(settings, tmp_path, tmp_path, start, 180).values():
        assert metrics["steps"] == 2
        assert metrics["grad_norm"] > 0
    policy, _ = policy_from_stages(
        tmp_path / "train_joint", tmp_path / "latents", data, settings.planner, batch_size=1, device="cpu"
    )
    episode = episodes[0]
    policy.reset("row", 0, 7)
    images = {view: np.asarray(frames[0]) for view, frames in episode.images.items()}
    output = policy.act([Observation(images, episode.state[0], episode.instruction)], ["row"], with_value=True)
    assert output.actions.shape == (1, data.action_chunk, data.action_dim)
    assert np.isfinite(output.actions).all()
    assert np.isfinite(output.returns).all()
