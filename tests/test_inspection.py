"""``wav inspect``: what a dataset is, what it leaves open, and a preset that really ingests it."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

from tests.data.sources.datasets import lerobot_dataset, libero_episodes, libero_file
from tests.data.sources.test_aloha_hdf5 import write as aloha
from tests.data.sources.test_robomimic_hdf5 import write as robomimic
from wav import cli
from wav.config import load_settings
from wav.data.store import EpisodeStore
from wav.ingest import ingest

ARM = [f"{joint}.pos" for joint in ("pan", "lift", "elbow", "flex", "roll", "gripper")]
DEGREES = {"ingest.lerobot.image_rotation": "camera", "ingest.lerobot.unit": "degree"}


def joints(episodes: list[dict], factor: float = 1.0) -> list[dict]:
    """The same motion as joint targets of a small arm, in radians times ``factor``."""
    for episode in episodes:
        steps = len(episode["action"])
        path = np.cumsum(np.full((steps + 1, 6), 0.04), axis=0) * factor
        episode["state"], episode["action"] = path[:-1], path[1:]
    return episodes


def v3(folder: Path) -> Path:
    return lerobot_dataset(folder / "set", libero_episodes(), "v3.0")


def v2(folder: Path) -> Path:
    return lerobot_dataset(folder / "set", libero_episodes(), "v2.1", images=True)


def degrees(folder: Path) -> Path:
    return lerobot_dataset(folder / "set", joints(libero_episodes(), 180 / np.pi), "v2.1", images=True, names=ARM)


def libero(folder: Path) -> Path:
    (folder / "set").mkdir()
    return libero_file(folder / "set" / "pick_up_the_bowl_demo.hdf5").parent


def suites(folder: Path) -> Path:
    """Two suites, and a task of one name in both."""
    for suite in ("libero_goal", "libero_10"):
        (folder / "set" / suite).mkdir(parents=True)
        libero_file(folder / "set" / suite / "pick_up_the_bowl_demo.hdf5")
    return folder / "set"


def robomimic_file(folder: Path) -> Path:
    return robomimic(folder / "set.hdf5")


def two_arms(folder: Path) -> Path:
    for number in range(2):
        aloha(folder / "set" / f"episode_{number}.hdf5", number, "padded")
    return folder / "set"


CASES = {
    "lerobot v3": (v3, {"ingest.lerobot.image_rotation": "180"}, 3),
    "lerobot v2, images": (v2, {"ingest.lerobot.image_rotation": "180"}, 3),
    "degrees": (degrees, DEGREES, 3),
    "libero": (libero, {}, 3),
    "several suites of libero": (suites, {}, 6),
    "robomimic": (robomimic_file, {"ingest.robomimic_hdf5.instructions": "{Lift: lift the red cube}"}, 3),
    "aloha": (
        two_arms,
        {
            "ingest.aloha_hdf5.control_hz": "50",
            "ingest.aloha_hdf5.instructions": "{.: fold the cloth}",
            "ingest.aloha_hdf5.channels": "bgr",
        },
        2,
    ),
}


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A project's folder: params.yaml, and presets/ for what is written."""
    monkeypatch.setenv("WAV_LOCAL_DIR", str(tmp_path / "local"))
    (tmp_path / "params.yaml").write_text("ingest: {min_length: 4}\n")
    monkeypatch.chdir(tmp_path)


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = cli.main(["inspect", *map(str, arguments)])
    said = capsys.readouterr()
    return status, said.out, said.err


@pytest.mark.parametrize("name", CASES)
def test_what_is_asked_for_and_nothing_else_makes_a_preset_that_ingests(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, answers, episodes = CASES[name]
    path = make(tmp_path)
    status, out, _ = run(capsys, path, "--json")
    first = json.loads(out)
    assert {one["field"] for one in first["undeclared"]} == set(answers)
    assert (status, first["ready"]) == ((1, False) if answers else (0, True))
    assert first["read"] == episodes, "stand-ins let the rest be tried"
    given = [word for pair in answers.items() for word in ("--set", "=".join(pair))]
    status, out, _ = run(capsys, path, *given, "--write", "presets/own.yaml")
    assert status == 0, out
    settings = load_settings("presets/own.yaml")
    report = ingest(settings.data, settings.ingest, tmp_path / "store", workers=1)
    assert (report.episodes, report.rejected) == (episodes, 0)
    assert set(EpisodeStore.open(tmp_path / "store").conventions.views) == set(settings.data.views)


def test_the_preset_says_what_is_missing_and_the_reader_refuses_it_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, _ = run(capsys, degrees(tmp_path), "--write", "presets/own.yaml")
    assert status == 1
    assert "complete it where it says TO BE DECLARED" in out
    assert "NOT KNOWN" in out
    text = Path("presets/own.yaml").read_text()
    assert text.count("# TO BE DECLARED: ") == 2
    Path("presets/own.yaml").write_text(text.replace("image_rotation: ''", "image_rotation: camera"))
    settings = load_settings("presets/own.yaml")
    with pytest.raises(ValueError, match=r"declare ingest\.lerobot\.unit"):
        ingest(settings.data, settings.ingest, tmp_path / "store", workers=1)


def test_pictures_are_the_first_frames(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, _ = run(capsys, two_arms(tmp_path), "--pictures", "shots")
    assert status == 1
    (path,) = Path("shots").glob("*.png")
    with Image.open(path) as picture:
        assert picture.size == (3 * 48, 32)


def test_what_would_be_quarantined_is_said_with_its_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = libero(tmp_path)
    with h5py.File(path / "pick_up_the_bowl_demo.hdf5", "a") as file:
        file["data/demo_1/actions"][3, 0] = np.nan
    status, out, _ = run(capsys, path)
    assert status == 0
    assert "2 fit; 1 would be quarantined (of 3)" in out
    assert "actions holds NaN or infinity at step 3" in out


def test_a_folder_of_something_else_is_told_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bag").mkdir()
    (tmp_path / "bag" / "a.mcap").write_bytes(b"\x89MCAP0\r\n")
    (tmp_path / "half" / "meta").mkdir(parents=True)
    (tmp_path / "half" / "meta" / "info.json").write_text("{")
    (tmp_path / "empty").mkdir()
    (tmp_path / "own").mkdir()
    with h5py.File(tmp_path / "own" / "a.hdf5", "w") as file:
        file["poses"], file["frames"] = 1, 2
    said = {"bag": "an MCAP recording", "half": "not valid JSON", "empty": "no robot data", "none": "no such file"}
    said |= {"own": "own/a.hdf5: is HDF5 of an unknown layout (frames, poses at its root); convert it to LeRobot v3.0"}
    for name, sentence in said.items():
        status, out, err = run(capsys, tmp_path / name)
        assert (status, out) == (1, "")
        assert sentence in err
        assert err.count("\n") == 1
    path = libero(tmp_path)
    for given in ("x", "data.vews=[a]", "data.views=[", "ingest.path={}"):
        status, out, err = run(capsys, path, "--set", given)
        assert (status, err.count("\n")) == (1, 1), err
