"""What LeRobot datasets say of themselves, oddly, wrongly or not at all: read where certain, else told by name."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.spatial.transform import Rotation

from tests.data.sources.datasets import TASKS, changed, lerobot_dataset, libero_episodes
from wav.config import IngestSettings
from wav.data.sources import open_source
from wav.data.sources.options import LeRobotOptions
from wav.data.store import EpisodeStore
from wav.errors import ConfigError, DataError
from wav.ingest import ingest

EPISODES = "meta/episodes/chunk-000/file-000.parquet"
CAMERA = "observation.images.image"


@pytest.fixture
def root(lerobot_settings) -> Path:
    return Path(lerobot_settings.path)


@pytest.fixture
def read(data, lerobot_settings, tmp_path):
    """Ingest the dataset at ``root`` with changed options and settings."""

    def run(of: dict | None = None, **changes) -> EpisodeStore:
        ingest(data.model_copy(update=of or {}), changed(lerobot_settings, **changes), tmp_path / "out", workers=1)
        return EpisodeStore.open(tmp_path / "out")

    return run


def rows(root: Path, change) -> None:
    """Edit the rows of meta/episodes; ``change`` gets each and its number."""
    table = pq.read_table(root / EPISODES).to_pylist()
    for number, row in enumerate(table):
        change(row, number)
    pq.write_table(pa.Table.from_pylist(table), root / EPISODES)


def dataset_info(root: Path, change) -> None:
    path = root / "meta/info.json"
    info = json.loads(path.read_text())
    change(info)
    path.write_text(json.dumps(info))


def whole(episodes: list[dict], store: EpisodeStore) -> bool:
    """Whether the store holds these episodes' pictures."""
    pairs = [(store[i], episodes[int(info.source.rpartition("#")[2])]) for i, info in enumerate(store.episodes)]
    return all(np.array_equal(e.images["agentview"], wanted["images"][CAMERA]) for e, wanted in pairs)


def test_tables_of_other_tools_are_read(root, read):
    """Whole numbers as 1.0 (pandas), and no column ``tasks`` (LeRobot's own image-to-video conversion)."""
    lerobot_dataset(root, episodes := libero_episodes(), "v3.0")
    rows(root, lambda row, _: [row.update({k: float(v)}) for k, v in list(row.items()) if isinstance(v, int)])
    rows(root, lambda row, _: row.pop("tasks"))
    store = read()
    assert whole(episodes, store)
    assert [info.instruction for info in store.episodes] == [TASKS[i % 2].replace("_", " ") for i in range(3)]


def test_statistics_of_a_dataset_are_never_used(root, read):
    """LeRobot's quantiles are means of the episodes' quantiles."""
    lerobot_dataset(root, episodes := libero_episodes(), "v3.0", images=True)
    wrong = {name: [5.0] * 8 for name in ("min", "max", "mean", "std", "q01", "q99")}
    (root / "meta/stats.json").write_text(json.dumps({"observation.state": wrong, "action": wrong}))
    rows(root, lambda row, _: row.update({f"stats/observation.state/{k}": v for k, v in wrong.items()}))
    found = read().statistics.key("state")
    states = np.concatenate([e["state"] for e in episodes]).astype(np.float32)
    np.testing.assert_allclose([found.q01, found.q99], np.quantile(states, (0.01, 0.99), axis=0), atol=1e-6)


@pytest.mark.parametrize("form", ["laid out", "byte order mark"])
def test_json_lines_need_not_keep_to_lines(root, read, form):
    lerobot_dataset(root, libero_episodes(), "v2.1", images=True)
    path = root / "meta/tasks.jsonl"
    objects = [json.loads(line) for line in path.read_text().splitlines()]
    text = "\n".join(json.dumps(o, indent=2) for o in objects) if form == "laid out" else "\ufeff" + path.read_text()
    path.write_text(text)
    assert len(read()) == 3
    path.write_text(text + "{")
    with pytest.raises(DataError, match=r"tasks\.jsonl: truncated or damaged"):
        read()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            {f"videos/{CAMERA}/chunk_index": None},
            rf"videos/{CAMERA}: chunk_index = None: input should be a valid integer",
        ),
        ({f"videos/{CAMERA}/from_timestamp": float("nan")}, "from_timestamp = nan: input should be"),
        ({f"videos/{CAMERA}/to_timestamp": 0.8}, "runs from 0.6 to 0.8 s, which at fps = 20 is not its length of 12"),
        ({"length": 0.5}, "length = 0.5: input should be a valid integer"),
        ({"tasks": [""]}, "instruction is empty"),
    ],
)
def test_an_episode_at_fault_is_quarantined_alone(root, read, change, reason):
    lerobot_dataset(root, episodes := libero_episodes(), "v3.0")
    rows(root, lambda row, number: row.update(change if number == 1 else {}))
    store = read()
    (rejected,) = store.rejected
    assert len(store) == 2
    assert whole(episodes, store)
    with pytest.raises(DataError, match=f"^episode 1: .*{reason}"):
        raise DataError(rejected.reason)


def test_two_episodes_on_the_same_frames_are_refused(root, read):
    lerobot_dataset(root, episodes := libero_episodes(4), "v3.0")
    times = [f"videos/{CAMERA}/{end}_timestamp" for end in ("from", "to")]
    rows(root, lambda row, number: row.update({t: row[t] - 0.6 for t in times} if number == 3 else {}))
    store = read()
    assert whole(episodes, store)
    assert [r.episode[-6:] for r in store.rejected] == ["000002", "000003"]
    assert "that episode 3 has as well" in store.rejected[0].reason


def test_an_episode_listed_twice_is_refused(root, read):
    lerobot_dataset(root, libero_episodes(4), "v3.0", images=True)
    rows(root, lambda row, number: row.update(episode_index=min(row["episode_index"], 2)))
    (rejected,) = read().rejected
    assert "lists it 2 times" in rejected.reason


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_of_several_texts_task_index_names_the_instruction(root, read, version):
    """As GR00T writes them: the annotation "valid" stands beside the instruction."""
    episodes = libero_episodes()
    lerobot_dataset(root, episodes, version, images=True)
    if version == "v3.0":
        rows(root, lambda row, _: row.update(tasks=[*row["tasks"], "valid"]))
    else:
        path = root / "meta/episodes.jsonl"
        listed = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(e | {"tasks": [*e["tasks"], "valid"]}) + "\n" for e in listed))
    assert [info.instruction for info in read().episodes] == [e["task"] for e in episodes]


def test_instructions_of_any_script_are_tasks_of_their_own(data, root, read):
    episodes = libero_episodes(4)
    for number, episode in enumerate(episodes):
        episode["task"] = "把红色方块放进盒子" if number % 2 else "把绿色方块放进盒子"
    lerobot_dataset(root, episodes, "v3.0", images=True)
    store = read(episodes_per_task=2)
    assert len({info.task for info in store.episodes}) == 2
    assert len(store) == 4
    (one,) = {info.task for info in read({"tasks": ("把红色方块放进盒子",)}).episodes}
    assert one == store.episodes[1].task


def test_instructions_that_cannot_fit_are_told_before_anything_is_read(data, root, read):
    episodes = libero_episodes()
    episodes[2]["task"] = "pick up the bowl and " * 3 + "put it down again"
    lerobot_dataset(root, episodes, "v3.0", images=True)
    with pytest.raises(ConfigError, match=r"data\.text_tokens = 16: .*at least 20 tokens; set data\.text_tokens to 25"):
        read()
    assert len(read({"text_tokens": 25})) == 3


def test_frames_may_be_counted_from_episode_to_episode(root, read):
    lerobot_dataset(root, libero_episodes(), "v3.0", images=True)
    path = root / "data/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    place = table.column_names.index("frame_index")
    pq.write_table(table.set_column(place, "frame_index", pa.array(np.arange(36))), path)
    assert len(read()) == 3
    more = pa.concat_tables([table, table.slice(12, 3)])
    pq.write_table(more, path)
    (rejected,) = read().rejected
    assert "holds 15 rows of the episode where the metadata says 12; some are left from" in rejected.reason


def test_only_wanted_cameras_need_be_there(data, root, read):
    lerobot_dataset(root, libero_episodes(), "v3.0")
    (root / "videos/observation.images.image2/chunk-000/file-000.mp4").unlink()
    assert len(read({"views": ("agentview",)})) == 3
    with pytest.raises(DataError, match=r"image2/.*file-000\.mp4: missing \(1 of 3 files that are needed\)"):
        read()


def test_a_recording_that_was_not_finished_is_told(root, read):
    lerobot_dataset(root, libero_episodes(), "v3.0", images=True)
    (root / EPISODES).unlink()
    with pytest.raises(DataError, match=r"the recording was not finished .* of its 1 data files 36 rows can be read"):
        read()
    path = root / "data/chunk-000/file-000.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match="of its 1 data files 0 rows can be read"):
        read()


@pytest.mark.parametrize("name", ["data/chunk-000/file-000.parquet", f"videos/{CAMERA}/chunk-000/file-000.mp4"])
def test_pointers_are_told_as_what_they_are(root, read, name):
    lerobot_dataset(root, libero_episodes(), "v3.0")
    (root / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 14\n")
    with pytest.raises(DataError, match=r"is no (parquet file|video) but a Git LFS pointer; run `git lfs pull`"):
        read()


@pytest.mark.parametrize(("fps", "follow"), [(29.97, {}), (10, {"control_hz": 10}), (12.5, None)])
def test_the_advice_on_rates_can_be_followed(data, root, read, fps, follow):
    lerobot_dataset(root, libero_episodes(), "v3.0", images=True, fps=fps)
    if follow != {}:
        with pytest.raises(ConfigError) as refused:
            read()
        assert ("set data.control_hz: 10" in str(refused.value)) == (fps == 10)
        assert "declare ingest.lerobot.control_hz: 20" in str(refused.value)
        assert len(read(control_hz=20)) == 3
    if follow is not None:
        assert len(read(follow or {"control_hz": 30})) == 3


def features(root: Path, **changes) -> None:
    dataset_info(root, lambda info: [info["features"][key].update(c) for key, c in changes.items()])


def posed(turn: str, count: int = 3) -> list[dict]:
    """Episodes whose state is named: position, rotation in another form, the gripper's width; the arm points down."""
    episodes = libero_episodes(count)
    for number, episode in enumerate(episodes):
        rng = np.random.default_rng(number)
        angles = rng.normal(scale=0.05, size=(12, 3)) + [np.pi, 0, 0.4]
        parts = Rotation.from_euler("xyz", angles)
        width = episode["state"][:, 6:7] - episode["state"][:, 7:8]
        middle = {"euler": angles, "xyzw": parts.as_quat(), "wxyz": parts.as_quat()[:, [3, 0, 1, 2]]}[turn]
        middle = middle * np.where(rng.random((12, 1)) < 0.5, -1, 1) if turn != "euler" else middle
        episode["wanted"] = parts
        episode["state"] = np.concatenate([episode["state"][:, :3], middle, width], axis=1)
    return episodes


@pytest.mark.parametrize(
    ("turn", "names", "options"),
    [
        ("xyzw", "x y z rx ry rz rw gripper", {}),
        ("wxyz", "eef_pos_x eef_pos_y eef_pos_z quat_w quat_x quat_y quat_z gripper_width", {}),
        ("euler", "x y z roll pitch yaw gripper", {"rotation": "euler_xyz"}),
        ("wxyz", "", {"rotation": "quat_wxyz"}),
    ],
)
def test_states_are_converted_as_their_names_say(data, root, read, turn, names, options):
    episodes = posed(turn)
    lerobot_dataset(root, episodes, "v3.0", images=True)
    features(root, **{"observation.state": {"names": names.split() or None}})
    store = read(**options)
    for number, episode in enumerate(episodes):
        got = store[number]
        turned = Rotation.from_rotvec(got.state[:, 3:6]).as_matrix()
        np.testing.assert_allclose(turned, episode["wanted"].as_matrix(), atol=1e-5)
        assert np.abs(np.diff(got.state[:, 3:6], axis=0)).max() < 1  # no jumps from a quaternion to its antipode
        np.testing.assert_allclose(got.state[:, 6] - got.state[:, 7], episode["state"][:, -1], atol=1e-6)
        np.testing.assert_allclose(got.actions[:, 6], episode["action"][:, 6])  # the gripper is not inverted


@pytest.mark.parametrize(
    ("turn", "names", "message"),
    [
        ("xyzw", None, "columns 3 to 6 of the state have length 1 at every step, as a quaternion has"),
        (
            "xyzw",
            [f"joint_{i}" for i in range(8)],
            "are not those of an end-effector state; declare ingest",
        ),
        (
            "xyzw",
            ["x", "y", "z", "roll", "pitch", "yaw", "pad", "gripper"],
            "leave open what its rotation is",
        ),
    ],
)
def test_states_that_are_not_certain_are_refused(root, read, turn, names, message):
    lerobot_dataset(root, posed(turn), "v3.0", images=True)
    features(root, **{"observation.state": {"names": names}})
    with pytest.raises((ConfigError, DataError), match=message):
        read()


def test_another_rotation_is_declared_where_one_does_not_fit(root, read):
    lerobot_dataset(root, posed("euler"), "v3.0", images=True)
    with pytest.raises(ConfigError, match=r"7 numbers are not a .*quat_xyzw \(4\).*another ingest\.lerobot\.rotation"):
        read(rotation="quat_xyzw", action="osc_pose_delta")
    assert len(read(rotation="euler_xyz", action="osc_pose_delta")) == 3


def test_a_width_behind_a_zero_is_no_pair_of_fingers(root, read):
    """Octo's form (position, rotation, 0, gripper) without names: taken for fingers, the gripper would be inverted."""
    episodes = libero_episodes()
    for episode in episodes:
        episode["state"][:, 7], episode["state"][:, 6] = 2 * episode["state"][:, 6], 0
    lerobot_dataset(root, episodes, "v3.0", images=True)
    with pytest.raises(DataError, match=r"fingers .* lie on either side of 0"):
        read()


@pytest.mark.parametrize(("unit", "factor"), [("degree", 180 / np.pi), ("percent", 100 / np.pi)])
def test_joints_become_radians(data, root, tmp_path, unit, factor):
    names = [f"{name}.pos" for name in ("pan", "lift", "elbow", "flex", "roll", "gripper")]
    rng = np.random.default_rng(0)
    joints = [np.cumsum(rng.normal(scale=0.1, size=(12, 6)), axis=0) + 1 for _ in range(2)]
    scale = np.array([factor] * 5 + [100])
    pictures = libero_episodes(1)[0]["images"]
    episodes = [{"action": j * scale, "state": j * scale, "images": pictures, "task": "reach"} for j in joints]
    lerobot_dataset(root, episodes, "v3.0", images=True, names=names)
    data = data.model_copy(update={"suites": ("so101",), "state_dim": 6, "action_dim": 6})
    settings = IngestSettings(source="lerobot", path=str(root), lerobot=LeRobotOptions(image_rotation="camera"))
    with pytest.raises(ConfigError, match=r"which is no angle in radians; declare ingest\.lerobot\.unit: degree, perc"):
        open_source(data, settings)
    ingest(data, changed(settings, unit=unit), tmp_path / "out", workers=1)
    store = EpisodeStore.open(tmp_path / "out")
    np.testing.assert_allclose(store[1].state, joints[1], rtol=1e-5)
    np.testing.assert_allclose(store[1].actions, joints[1], rtol=1e-5)
    assert f"(rad, recorded in {unit})" in store.conventions.state_layout


def test_a_camera_of_one_channel_is_no_view(data, root, read):
    lerobot_dataset(root, libero_episodes(), "v3.0", images=True)
    features(root, **{CAMERA: {"shape": [32, 32, 1], "info": {"is_depth_map": True}}})
    with pytest.raises(ConfigError, match=rf"{CAMERA}' for 'agentview' .* has one channel .*image2 in ingest\.lerobot"):
        read()


def test_a_camera_of_another_name_is_named(root, read):
    episodes = libero_episodes()
    for episode in episodes:
        episode["images"]["observation.images.gopro"] = episode["images"].pop("observation.images.image2")
    lerobot_dataset(root, episodes, "v3.0", images=True)
    with pytest.raises(ConfigError, match=r"no camera for 'wrist' .*gopro; .* in ingest\.lerobot\.cameras\.wrist"):
        read()
    with pytest.raises(ConfigError, match="serves two views; name another camera"):
        read(cameras={"wrist": CAMERA})
    assert len(read(cameras={"wrist": "observation.images.gopro"})) == 3


def test_yaml_reads_a_rotation_as_a_number():
    assert LeRobotOptions(image_rotation=180).image_rotation == "180"
    with pytest.raises(ValueError, match="image_rotation"):
        LeRobotOptions(image_rotation=90)
