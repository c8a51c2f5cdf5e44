"""Robot data is known by content, whatever its name; what no reader takes is told with the way to one that is taken."""

import json
import sqlite3
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest

from tests.data.sources.datasets import lerobot_dataset, libero_episodes, libero_file
from tests.data.sources.test_aloha_hdf5 import write as aloha
from tests.data.sources.test_robomimic_hdf5 import write as robomimic
from wav.config import IngestSettings
from wav.data.sources import open_source
from wav.data.sources.recognise import check_source, recognise
from wav.errors import ConfigError


def hdf5(*names: str):
    """A file with datasets of these names."""

    def make(folder: Path) -> None:
        with h5py.File(folder / "data.bin", "w") as file:
            for name in names:
                file[name] = np.zeros(3)

    return make


def text(*names: str):
    def make(folder: Path) -> None:
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("{}")

    return make


def content(name: str, data: bytes):
    return lambda folder: (folder / name).write_bytes(data)


def bag(folder: Path) -> None:
    with sqlite3.connect(folder / "a.db3") as database:
        database.executescript("create table topics (id); create table messages (id);")


def zipped(folder: Path) -> None:
    with zipfile.ZipFile(folder / "replay.zip", "w") as archive:
        archive.writestr("meta/episode_ends/.zarray", "{}")


def maniskill(folder: Path) -> None:
    hdf5("traj_0/actions")(folder)
    (folder / "data.json").write_text(json.dumps({"env_info": {"env_id": "PickCube-v1"}}))


KINDS = {
    "lerobot": lambda folder: lerobot_dataset(folder / "x", libero_episodes(1), "v3.0", images=True),
    "libero_hdf5": lambda folder: libero_file(folder / "a.h5", demos=1),
    "robomimic_hdf5": lambda folder: robomimic(folder / "a.h5", 1),
    "aloha_hdf5": lambda folder: aloha(folder / "a.h5"),
    "AgileX data_tools": hdf5("camera/color/x", "arm/jointStatePosition/x"),
    "RoboTwin": hdf5("joint_action/vector", "observation/head_camera/rgb"),
    "RoboMIND": hdf5("puppet/joint_position", "master/joint_position", "observations/rgb_images/x"),
    "D4RL": hdf5("observations", "actions", "rewards", "terminals"),
    "stable-worldmodel": hdf5("ep_len", "ep_offset", "pixels"),
    "ManiSkill": maniskill,
    "minari": text("data/metadata.json", "data/main_data.hdf5"),
    "RLDS": text("bridge/1.0.0/dataset_info.json", "bridge/1.0.0/features.json"),
    "zarr": text("a.zarr/meta/episode_ends/zarr.json"),
    "zarr store": zipped,
    "minari dataset": text("x/data/metadata.json", "x/data/0/part.arrow"),
    "Lance": text("a.lance/_versions/1.manifest"),
    "Lance table": text("_versions/1.manifest"),
    "episode store": text("manifest.json", "quarantine.json", "statistics.json"),
    "MCAP": content("a.bin", b"\x89MCAP0\r\n" + bytes(20)),
    "ROS bag": bag,
    "nothing": text("notes.json"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_are_told_apart(tmp_path, kind):
    KINDS[kind](tmp_path)
    found = recognise(tmp_path / "x" if kind == "lerobot" else tmp_path)
    if kind == "nothing":
        assert found is None
        return
    assert found is not None
    assert found.reader == (kind if kind in ("lerobot", "libero_hdf5", "robomimic_hdf5", "aloha_hdf5") else "")
    assert found.reader or (kind in found.name and found.remedy)


def test_half_a_signature_is_none(tmp_path):
    """Notes that somebody has put beside episodes must not keep them from being read."""
    aloha(tmp_path / "data" / "episode_0.hdf5")
    text("data/metadata.json")(tmp_path)
    assert recognise(tmp_path).reader == "aloha_hdf5"


def test_another_kind_is_refused_by_name(data, tmp_path):
    KINDS["aloha_hdf5"](tmp_path)
    with pytest.raises(
        ConfigError, match=r"holds ALOHA-style HDF5, which 'lerobot' does not read; set ingest\.source: a"
    ):
        open_source(data, IngestSettings(source="lerobot", path=str(tmp_path)))
    (tmp_path / "a.h5").unlink()
    KINDS["RLDS"](tmp_path)
    with pytest.raises(ConfigError, match=r"holds an RLDS \(TFDS\) dataset, .* convert it to LeRobot v3\.0"):
        open_source(data, IngestSettings(source="lerobot", path=str(tmp_path)))
    check_source(tmp_path, "a reader of one's own")
