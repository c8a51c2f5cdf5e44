"""ALOHA-style HDF5: what files hold is read, what they do not tell is declared, and nothing is guessed."""

import io
import json
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

from tests.data.sources.datasets import changed
from wav.config import DataSettings, IngestSettings
from wav.data.sources import open_source
from wav.data.sources.options import AlohaHdf5Options
from wav.data.store import EpisodeStore
from wav.errors import ConfigError, DataError
from wav.ingest import ingest

CAMERAS = ("cam_high", "cam_left_wrist", "cam_right_wrist")
STEPS = 12


def arms(number: int, steps: int = STEPS) -> tuple[np.ndarray, np.ndarray]:
    """(states, targets) of two arms; targets run two steps ahead, grippers open to 70 mm."""
    path = np.cumsum(np.random.default_rng(number).normal(scale=0.1, size=(steps + 2, 14)), axis=0)
    path[:, [6, 13]] = np.linspace(0, 0.07, steps + 2)[:, None]
    return path[:-2].astype(np.float32), path[2:].astype(np.float32)


def pictures(number: int, steps: int = STEPS) -> np.ndarray:
    """(T, 32, 48, 3): smooth, so that JPEG keeps them, and red is not blue."""
    rows, columns = np.mgrid[:32, :48]
    frames = [np.stack([rows * 4 + 10 * t, columns * 2 + number, 0 * rows + 20], axis=-1) for t in range(steps)]
    return np.asarray(frames, np.uint8)


def jpegs(frames: np.ndarray) -> list[bytes]:
    """As OpenCV's encoder makes them of RGB: red and blue exchanged."""
    result = []
    for frame in frames:
        buffer = io.BytesIO()
        Image.fromarray(frame[..., ::-1]).save(buffer, "JPEG", quality=95, subsampling=0)
        result.append(buffer.getvalue())
    return result


def write(path: Path, number: int = 0, form: str = "raw", **more: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    state, action = arms(number)
    with h5py.File(path, "w") as file:
        file.attrs["sim"] = False
        file["action"], file["observations/qpos"] = action, state
        for camera in CAMERAS:
            images, name = pictures(number), f"observations/images/{camera}"
            if form == "raw":
                file[name] = images
            elif form == "padded":
                coded = jpegs(images)
                longest = max(map(len, coded)) + 7
                file[name] = np.stack([np.frombuffer(c.ljust(longest, b"\0"), np.uint8) for c in coded])
            else:
                file.create_dataset(name, (len(images),), dtype=h5py.vlen_dtype(np.uint8))
                for step, c in enumerate(jpegs(images)):
                    file[name][step] = np.frombuffer(c, np.uint8)
        file["observations/images/cam_high_depth"] = np.zeros((STEPS, 32, 48), np.uint16)
        for name, values in more.items():
            if name in file:
                del file[name]
            file[name] = values
    return path


@pytest.fixture
def data() -> DataSettings:
    return DataSettings(
        suite="piper",
        tasks=(),
        views=("top", "left_wrist", "right_wrist"),
        image_height=32,
        image_width=48,
        render="full",
        state_dim=14,
        action_dim=14,
        control_hz=30,
        memory_frames=2,
        action_chunk=4,
    )


@pytest.fixture
def settings(tmp_path: Path) -> IngestSettings:
    options = AlohaHdf5Options(control_hz=30, instructions={".": "fold the towel"}, channels="bgr")
    return IngestSettings(source="aloha_hdf5", path=str(tmp_path / "set"), min_length=4, aloha_hdf5=options)


def run(data: DataSettings, settings: IngestSettings, out: Path) -> EpisodeStore:
    ingest(data, settings, out, workers=1)
    return EpisodeStore.open(out)


@pytest.mark.parametrize("form", ["raw", "padded", "strings"])
def test_files_of_every_form_are_read(data, settings, tmp_path, form):
    for number in (10, 2):
        write(tmp_path / f"set/episode_{number}.hdf5", number, form)
    settings = changed(settings, channels="rgb" if form == "raw" else "bgr")
    store = run(data, settings, tmp_path / "out")
    assert [info.source for info in store.episodes] == [f"aloha_hdf5:episode_{n}.hdf5" for n in (2, 10)]
    for episode, number in ((store[0], 2), (store[1], 10)):
        state, action = arms(number)
        np.testing.assert_array_equal(episode.state, state)
        np.testing.assert_array_equal(episode.actions, action)
        assert np.abs(episode.images["top"].astype(int) - pictures(number)).max() <= (0 if form == "raw" else 12)
    conventions = store.conventions
    assert (conventions.action, conventions.gripper) == ("joint_absolute", "absolute")
    assert conventions.image_rotation == "none"
    told = json.loads((tmp_path / "out/source.json").read_text())
    assert told["actions_lead_steps"] == 2
    assert told["grippers"]["state"]["6"][1] < 0.08


def test_what_files_do_not_tell_is_declared(data, settings, tmp_path):
    write(tmp_path / "set/episode_0.hdf5", form="padded")
    bare = settings.model_copy(update={"aloha_hdf5": AlohaHdf5Options()})
    for field, value, message in (
        ("control_hz", 30, r"the control rate is not recorded; declare ingest\.aloha_hdf5\.control_hz"),
        ("instructions", {".": "fold the towel"}, r'declare ingest\.aloha_hdf5\.instructions: \{"\.": \.\.\.\}'),
        (
            "channels",
            "bgr",
            r"nothing tells whether red and blue are .* declare ingest\.aloha_hdf5\.channels",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            open_source(data, bare)
        bare = changed(bare, **{field: value})
    assert len(run(data, bare, tmp_path / "out")) == 1


def test_sizes_and_cameras_are_named_where_others_are_meant(data, settings, tmp_path):
    write(tmp_path / "set/episode_0.hdf5")
    with pytest.raises(ConfigError, match=r"observations/qpos has 14 numbers; set data\.state_dim: 14"):
        open_source(data.model_copy(update={"state_dim": 12}), settings)
    data = data.model_copy(update={"views": ("front", "left_wrist", "right_wrist")})
    with pytest.raises(ConfigError, match=r"no camera for 'front' .*cam_high.* in ingest\.aloha_hdf5\.cameras\.front"):
        open_source(data, settings)
    assert len(run(data, changed(settings, cameras={"front": "cam_high"}), tmp_path / "out")) == 1


def test_folders_are_tasks_and_files_beside_tell_the_language(data, settings, tmp_path):
    write(tmp_path / "set/fold/episode_0.hdf5")
    write(tmp_path / "set/pour/episode_0.hdf5", 1)
    (tmp_path / "set/pour/instructions.json").write_text('{"instructions": ["pour the water", "fill the glass"]}')
    settings = changed(settings, instructions={"fold": "fold the towel"})
    store = run(data, settings, tmp_path / "out")
    assert [info.task for info in store.episodes] == ["fold_the_towel", "pour_the_water"]


@pytest.mark.parametrize(
    ("more", "remedy"),
    [
        ({"observations/qpos": arms(0)[0] * [*[1] * 6, 60, *[1] * 7]}, {"raw_grippers": True}),
        ({"action": arms(0)[0]}, {"shift": 1}),
        ({"base_action": np.full((STEPS, 2), 0.3)}, {"base": "ignore"}),
        ({"observations/qpos": np.rad2deg(arms(0)[0])}, None),
        ({"observations/qpos": arms(0)[0][:-1]}, None),
    ],
)
def test_what_contradicts_is_refused_with_what_helps(data, settings, tmp_path, more, remedy):
    write(tmp_path / "set/episode_0.hdf5", **more)
    with pytest.raises(
        (ConfigError, DataError), match=f"ingest.aloha_hdf5.{next(iter(remedy))}" if remedy else "qpos|action has shape"
    ):
        open_source(data, settings)
    if remedy:
        store = run(data, changed(settings, **remedy), tmp_path / "out")
        if "shift" in remedy:
            np.testing.assert_array_equal(store[0].actions[:-1], store[0].state[1:])


def test_a_moving_base_can_be_part_of_the_action(data, settings, tmp_path):
    write(tmp_path / "set/episode_0.hdf5", base_action=np.full((STEPS, 2), 0.3, np.float32))
    store = run(data.model_copy(update={"action_dim": 16}), changed(settings, base="append"), tmp_path / "out")
    np.testing.assert_array_equal(store[0].actions[:, 14:], np.full((STEPS, 2), 0.3, np.float32))


def test_unsound_files_are_quarantined_by_name(data, settings, tmp_path):
    write(tmp_path / "set/episode_0.hdf5", form="padded")
    write(tmp_path / "set/episode_1.hdf5", action=arms(1)[1] * [np.nan, *[1] * 13])
    cut = write(tmp_path / "set/episode_2.hdf5", form="padded")
    with h5py.File(cut, "a") as file:
        file["observations/images/cam_high"][3, 200:] = 0
    (tmp_path / "set/episode_3.hdf5").write_bytes(b"no HDF5")
    (tmp_path / "set/._episode_0.hdf5").write_bytes(b"a Mac's")
    store = run(data, settings, tmp_path / "out")
    assert len(store) == 1
    reasons = [r.reason for r in store.rejected]
    assert "episode_1.hdf5: action holds NaN" in reasons[0]
    assert "episode_2.hdf5: camera cam_high: frame 3 is not a readable image" in reasons[1]
    assert "episode_3.hdf5: truncated or damaged HDF5 file" in reasons[2]
