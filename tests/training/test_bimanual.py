"""A generated bimanual LeRobot dataset through the real stages of presets/piper-small.yaml, one training step each."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from tests.training.every_stage import train, with_steps
from wav.config import DataSettings, IngestSettings, Settings, load_preset
from wav.data.encode import build_text_encoder, encode_store, fit_codec
from wav.data.latents import LatentStore
from wav.data.reward_store import RewardStore
from wav.data.sources.options import AlohaHdf5Options
from wav.data.store import EpisodeStore
from wav.data.windows import WindowDataset
from wav.ingest import ingest
from wav.model.build import build_from_settings, value_channels
from wav.policy.export import export_policy, policy_from_stages
from wav.policy.policy import Policy
from wav.rewards.label import label_store
from wav.rewards.terms import episode_rewards
from wav.sim.env import Observation

PROJECT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(PROJECT / "benchmarks"))

import bimanual_data  # noqa: E402

ARMS = ("left", "right")
TERMS = (
    *("left_wrist_mse", "left_wrist_ssim", "right_wrist_mse", "right_wrist_ssim", "top_mse", "top_ssim"),
    *("left_proximity", "right_proximity"),
    *(f"{a}_state_{kind}" for a in ARMS for kind in ("velocity", "acceleration")),
    *(f"{a}_action_{kind}" for a in ARMS for kind in ("velocity", "acceleration")),
)


def small(root: Path) -> Settings:
    """presets/piper-small.yaml on the dataset at ``root``, with one training step per stage."""
    raw = load_preset("piper-small").model_dump(mode="json")
    raw["ingest"]["path"] = str(root)
    return with_steps(raw, 1, "piper-small")


@pytest.fixture(scope="module")
def stages(tmp_path_factory) -> tuple[Path, Settings]:
    """Outputs of ingest, label_rewards and encode, each by the stage's own function."""
    folder = tmp_path_factory.mktemp("bimanual")
    settings = small(bimanual_data.write_dataset(folder / "dataset", episodes=4, steps=24))
    ingest(settings.data, settings.ingest, folder / "episodes", workers=1)
    episodes = EpisodeStore.open(folder / "episodes")
    label_store(episodes, settings.label_rewards, settings.data.action_chunk, folder / "rewards")
    codec = fit_codec(episodes, settings.data, settings.encode)
    text = build_text_encoder(settings.encode, settings.data, episodes.instructions, folder / "t5")
    encode_store(episodes, codec, text, settings.data, folder / "latents")
    return folder, settings


def test_the_preset_has_the_shape_of_the_large_one():
    """Same sections, same views, widths, reward and protocol as presets/piper.yaml; other sizes."""
    large, little = (load_preset(name).model_dump() for name in ("piper", "piper-small"))
    for name in ("suites", "views", "state_dim", "action_dim", "control_hz"):
        assert little["data"][name] == large["data"][name], name
    assert little["label_rewards"] == large["label_rewards"]
    assert little["ingest"] | {"path": ""} == large["ingest"] | {"path": ""}


def test_value_channels_follow_the_arms_not_their_joints():
    """Two arms of six, of seven and of eight numbers have the sixteen terms and the return; one arm has nine."""
    views = ("top", "left_wrist", "right_wrist")
    assert {value_channels(DataSettings(views=views, action_dim=n)) for n in (12, 14, 16)} == {17}
    assert value_channels(DataSettings(action_dim=14)) == value_channels(DataSettings(views=("agentview",))) == 10


@pytest.mark.integration
def test_episodes_hold_what_the_robot_recorded(stages):
    folder, settings = stages
    store = EpisodeStore.open(folder / "episodes")
    wanted = bimanual_data.episode(0, 24, np.random.default_rng(0))
    episode = store[0]
    assert (len(store), episode.instruction, episode.task) == (
        4,
        bimanual_data.TASKS[0],
        "hand_the_cube_to_the_right_arm",
    )
    np.testing.assert_array_equal(episode.state, wanted["state"])
    np.testing.assert_array_equal(episode.joints, wanted["state"])
    np.testing.assert_array_equal(episode.actions, wanted["action"])
    assert {view: frames.shape for view, frames in episode.images.items()} == dict.fromkeys(
        settings.data.views, (24, 64, 64, 3)
    )
    for view, camera in zip(settings.data.views, bimanual_data.SIZES, strict=True):
        mean = wanted["frames"][camera].mean(axis=(0, 1, 2))
        np.testing.assert_allclose(episode.images[view].mean(axis=(0, 1, 2)), mean, atol=3)
    conventions = store.conventions
    assert conventions.state_layout == "joints: " + " ".join(bimanual_data.NAMES)
    assert (conventions.action, conventions.gripper, conventions.control_hz) == ("joint_absolute", "absolute", 30)
    described = json.loads((folder / "episodes" / "source.json").read_text())
    assert described["cameras"]["top"]["camera"] == "observation.images.cam_high"


def test_the_same_motion_in_alohas_files_is_the_same_store(stages, tmp_path):
    """So what trains on the one trains on the other."""
    folder, settings = stages
    store, names = EpisodeStore.open(folder / "episodes"), {}
    for number, info in enumerate(store.episodes):
        path, episode = tmp_path / "aloha" / info.task / f"episode_{number}.hdf5", store[number]
        names[info.task] = info.instruction
        path.parent.mkdir(parents=True, exist_ok=True)
        with h5py.File(path, "w") as file:
            file["action"], file["observations/qpos"] = episode.actions, episode.state
            for view, camera in zip(settings.data.views, bimanual_data.SIZES, strict=True):
                file[f"observations/images/{camera}"] = episode.images[view]
    options = AlohaHdf5Options(control_hz=30, instructions=names)
    source = IngestSettings(source="aloha_hdf5", path=str(tmp_path / "aloha"), aloha_hdf5=options)
    ingest(settings.data, source, tmp_path / "episodes", workers=1)
    again = EpisodeStore.open(tmp_path / "episodes")
    assert again.conventions.difference(store.conventions) == [
        f"state_layout: 'joints: 14' against {store.conventions.state_layout!r}"
    ]
    for wanted in (store[number] for number in range(4)):
        found = next(e for e in map(again.__getitem__, range(4)) if np.array_equal(e.state, wanted.state))
        np.testing.assert_array_equal(found.actions, wanted.actions)
        assert all(np.array_equal(found.images[view], wanted.images[view]) for view in settings.data.views)
        assert found.task == wanted.task


def test_sixteen_terms_and_the_return_with_the_papers_weights(stages):
    folder, settings = stages
    store = EpisodeStore.open(folder / "episodes")
    rewards = RewardStore.open(folder / "rewards", store)
    assert rewards.names == TERMS
    assert rewards.values.shape == (96, 17)
    signs = [1] * 8 + [-1] * 4 + [-0.1] * 4
    np.testing.assert_allclose(rewards.weights, np.array(signs) / 16, rtol=1e-6)
    terms = episode_rewards(store[0], settings.label_rewards)
    state = np.asarray(store[0].state, np.float64)
    for side, columns in (("left", slice(0, 7)), ("right", slice(7, 14))):
        near = np.exp(-np.linalg.norm(state[:, columns] - state[-1, columns], axis=1))
        np.testing.assert_allclose(terms.terms[:, TERMS.index(f"{side}_proximity")], near, rtol=1e-5)
        moved = np.abs(np.diff(state[:, columns], axis=0)).sum(axis=1)
        np.testing.assert_allclose(terms.terms[1:, TERMS.index(f"{side}_state_velocity")], moved, rtol=1e-4)
    assert (terms.terms[-1, :8] == 1).all()


def test_windows_hold_both_arms_and_repeat_the_last_target(stages):
    """28 channels: 14 actions and 14 states, normalised; past the end an absolute target is repeated, not zeroed."""
    folder, settings = stages
    store = EpisodeStore.open(folder / "episodes")
    latents, rewards = LatentStore.open(folder / "latents", store), RewardStore.open(folder / "rewards", store)
    windows = WindowDataset(store, latents, rewards, settings.data, validation_share=0.0)
    batch = windows.batch(np.array([20]), np.random.default_rng(0))
    assert batch.memory.shape == (1, 3, 24, 2, 4, 4)
    assert batch.future.shape == (1, 3, 24, 2, 4, 4)
    assert (batch.state.shape, batch.actions.shape, batch.values.shape) == ((1, 14), (1, 12, 28), (1, 12, 17))
    actions = store.statistics.denormalize_actions(batch.actions[0, :, :14].numpy())
    np.testing.assert_allclose(actions[4:], np.repeat(store[0].actions[-1:], 8, axis=0), atol=1e-5)
    grippers = store.statistics.normalize_state(store.concatenated("state"))[:, [6, 13]]
    assert (np.abs(grippers).max(axis=0) <= 1.01).all()
    assert (np.ptp(grippers, axis=0) > 1.9).all()


def test_every_training_stage_makes_a_step_and_the_policy_moves_two_arms(stages, start, tmp_path):
    folder, settings = stages
    model = build_from_settings(settings)
    assert (model.config.action_in_channels, model.config.value_in_channels) == (28, 17)
    for metrics in train(settings, folder, tmp_path, start, 120).values():
        assert metrics["steps"] == 1
    policy, checkpoint = policy_from_stages(
        tmp_path / "train_joint", folder / "latents", settings.data, settings.planner, batch_size=2, device="cpu"
    )
    export_policy(policy, checkpoint, tmp_path / "export", settings=settings, metrics=None)
    policy = Policy.load(tmp_path / "export", batch_size=2, device="cpu")
    episode = EpisodeStore.open(folder / "episodes")[0]
    images = {view: np.asarray(frames[0]) for view, frames in episode.images.items()}
    policy.reset("row", 0, 7)
    output = policy.act([Observation(images, episode.state[0], episode.instruction)], ["row"], with_value=True)
    assert (output.actions.shape, output.returns.shape) == ((1, 12, 14), (1, 12))
    assert np.isfinite(output.actions).all()
