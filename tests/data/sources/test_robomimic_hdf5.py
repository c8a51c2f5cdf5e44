"""robomimic's HDF5: its names, masks and signs; what it does not tell is declared; failures are no success."""

import json
from pathlib import Path

import h5py
import numpy as np
import pytest

from tests.data.sources.datasets import changed, motion
from wav.config import IngestSettings
from wav.data.sources import open_source
from wav.data.sources.options import RobomimicHdf5Options
from wav.data.state import encode_state
from wav.data.store import EpisodeStore
from wav.errors import ConfigError
from wav.ingest import ingest

ENV = {
    "env_name": "Lift",
    "type": 1,
    "env_kwargs": {"control_freq": 20, "controller_configs": {"type": "OSC_POSE", "control_delta": True}},
}


def write(path: Path, demos: int = 3, steps: int = 12, env: dict | None = None, masks: dict | None = None) -> Path:
    """As robomimic's dataset_states_to_obs.py writes a file."""
    with h5py.File(path, "w") as file:
        group = file.create_group("data")
        group.attrs["env_args"], group.attrs["total"] = json.dumps({**ENV, **(env or {})}), demos * steps
        for number in range(demos):
            m, demo = motion(number, steps), group.create_group(f"demo_{number}")
            demo.attrs["num_samples"], demo.attrs["model_file"] = steps, "<mujoco/>"
            demo["actions"], demo["states"] = m["actions"], np.zeros((steps, 5))
            demo["dones"] = demo["rewards"] = np.eye(steps)[-1]
            for name in ("obs", "next_obs"):
                obs, rows = demo.create_group(name), slice(1, None) if name == "next_obs" else slice(None, -1)
                obs["agentview_image"], obs["robot0_eye_in_hand_image"] = m["images"][rows, 0], m["images"][rows, 1]
                obs["robot0_eef_pos"], obs["robot0_joint_pos"] = m["pose"][rows, :3], m["joints"][rows]
                obs["robot0_eef_quat"], obs["robot0_gripper_qpos"] = (
                    quaternions(number, steps + 1)[rows],
                    m["fingers"][rows],
                )
        for name, members in (masks or {}).items():
            file[f"mask/{name}"] = np.array(members, dtype="S8")
    return path


def quaternions(number: int, count: int) -> np.ndarray:
    quat = np.random.default_rng(number).normal(scale=0.05, size=(count, 4)) + [1, 0, 0, 0]
    return quat / np.linalg.norm(quat, axis=1, keepdims=True)


@pytest.fixture
def settings(tmp_path: Path) -> IngestSettings:
    options = RobomimicHdf5Options(instructions={"Lift": "lift the red cube"})
    path = str(tmp_path / "image.hdf5")
    return IngestSettings(source="robomimic_hdf5", path=path, min_length=4, robomimic_hdf5=options)


def run(data, settings, out) -> EpisodeStore:
    ingest(data, settings, out, workers=1)
    return EpisodeStore.open(out)


def test_demonstrations_arrive_bit_for_bit(data, settings, tmp_path):
    write(tmp_path / "image.hdf5")
    store = run(data, settings, tmp_path / "out")
    assert [(info.task, info.instruction) for info in store.episodes] == [
        ("lift_the_red_cube", "lift the red cube")
    ] * 3
    for number in range(3):
        m, episode = motion(number, 12), store[number]
        pose = encode_state(m["pose"][:-1, :3], quaternions(number, 13)[:-1], m["fingers"][:-1])
        np.testing.assert_array_equal(episode.state, pose)
        np.testing.assert_array_equal(episode.actions, m["actions"].astype(np.float32))
        # stored upright with rows reversed: what is missing to a rotation by 180 degrees are the columns
        np.testing.assert_array_equal(episode.images["agentview"], m["images"][:-1, 0][:, :, ::-1])
        np.testing.assert_array_equal(episode.joints[:, :7], m["joints"][:-1].astype(np.float32))
    assert store.conventions.image_rotation == "180"


@pytest.mark.parametrize(
    ("env", "message", "remedy"),
    [
        (
            {"env_kwargs": {"control_freq": 10}},
            r"control_freq = 10 where .* declare ingest.robomimic_hdf5.control_hz: 20",
            {"control_hz": 20},
        ),
        (
            {"env_kwargs": {"control_freq": 20, "controller_configs": {"type": "OSC_POSE", "control_delta": False}}},
            "OSC_POSE with absolute actions",
            None,
        ),
        (
            {"env_kwargs": {"controller_configs": {"body_parts": {"right": {"type": "JOINT_POSITION"}}}}},
            "controller JOINT_POSITION",
            None,
        ),
        (
            {"type": 2},
            "nothing tells how the frames are rotated; declare ingest.robomimic_hdf5.image_rotation",
            {"image_rotation": "camera"},
        ),
        (
            {"env_name": "Can"},
            r"declare ingest\.robomimic_hdf5\.instructions: \{Can: \.\.\.\}",
            {"instructions": {"Can": "lift the can"}},
        ),
    ],
)
def test_what_does_not_fit_or_is_not_told_is_refused(data, settings, tmp_path, env, message, remedy):
    write(tmp_path / "image.hdf5", 1, env=env)
    with pytest.raises(ConfigError, match=message):
        open_source(data, settings)
    assert remedy is None or len(run(data, changed(settings, **remedy), tmp_path / "out")) == 1


def test_masks_choose_demonstrations(data, settings, tmp_path, caplog):
    masks = {"train": ["demo_2", "demo_0", "demo_9"], "valid": ["demo_1"], "none": []}
    write(tmp_path / "image.hdf5", masks=masks)
    assert len(run(data, settings, tmp_path / "out")) == 3
    assert "has mask/valid; all are ingested" in caplog.text
    store = run(data, changed(settings, mask="train"), tmp_path / "out")
    assert [info.source[-6:] for info in store.episodes] == ["demo_0", "demo_2"]
    assert "demo_9: is missing" in store.rejected[0].reason
    for mask, message in (("none", "none of which is there"), ("test", "has no such mask; it has none, train, valid")):
        with pytest.raises(ConfigError, match=message):
            open_source(data, changed(settings, mask=mask))


def test_unsound_demonstrations_are_quarantined(data, settings, tmp_path):
    """A 1 in dones is no proof of success; the attribute num_samples may be stale."""
    with h5py.File(write(tmp_path / "image.hdf5"), "a") as file:
        file["data/demo_0/rewards"][:] = 0
        file["data/demo_1"].attrs["num_samples"] = 11
    store = run(data, settings, tmp_path / "out")
    assert [info.source[-6:] for info in store.episodes] == ["demo_2"]
    assert "rewards never becomes 1" in store.rejected[0].reason
    assert "actions has 12 steps where attribute num_samples says 11" in store.rejected[1].reason


def test_language_of_the_simulator_is_used(data, settings, tmp_path):
    with h5py.File(write(tmp_path / "image.hdf5", 1), "a") as file:
        file["data/demo_0"].attrs["ep_meta"] = json.dumps({"lang": "raise the cube"})
    store = run(data, changed(settings, instructions={}), tmp_path / "out")
    assert store.instructions == ("raise the cube",)
