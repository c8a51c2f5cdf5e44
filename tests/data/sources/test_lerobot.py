"""LeRobot v2.1 and v3.0 in, videos and image columns, from sound datasets and damaged ones."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.sources.datasets import TASKS, changed, lerobot_dataset, libero_episodes, write_video
from wav.config import IngestSettings
from wav.data.sources import open_source
from wav.data.sources.options import LeRobotOptions
from wav.data.store import EpisodeStore
from wav.errors import ConfigError, DataError
from wav.ingest import ingest

VARIANTS = [("v2.1", False), ("v3.0", False), ("v2.1", True), ("v3.0", True)]
PARQUET_V2 = "data/chunk-000/episode_000001.parquet"
PARQUET_V3 = "data/chunk-000/file-000.parquet"


def run(data, settings, out, **changes) -> EpisodeStore:
    ingest(data, changed(settings, **changes), out, workers=1)
    return EpisodeStore.open(out)


@pytest.fixture
def root(lerobot_settings) -> Path:
    return Path(lerobot_settings.path)


@pytest.mark.parametrize(("version", "images"), VARIANTS)
def test_episodes_arrive_bit_for_bit(data, lerobot_settings, root, tmp_path, version, images):
    episodes = libero_episodes()
    lerobot_dataset(root, episodes, version, images=images)
    store = run(data, lerobot_settings, tmp_path / "out")
    assert len(store) == 3
    assert [info.task for info in store.episodes] == [TASKS[0], TASKS[1], TASKS[0]]
    for episode, wanted in zip((store[i] for i in range(3)), episodes, strict=True):
        np.testing.assert_array_equal(episode.images["agentview"], wanted["images"]["observation.images.image"])
        np.testing.assert_array_equal(episode.images["wrist"], wanted["images"]["observation.images.image2"])
        np.testing.assert_array_equal(episode.actions, wanted["action"].astype(np.float32))
        np.testing.assert_array_equal(episode.state, wanted["state"].astype(np.float32))
        assert (episode.instruction, episode.joints) == (wanted["task"], None)
    assert store.conventions.image_rotation == "180"
    described = json.loads((tmp_path / "out" / "source.json").read_text())
    assert (described["format"], described["gripper_stored"]) == (f"lerobot {version}", "-1 open, +1 close")


def test_raw_frames_are_rotated_and_tasks_selected(data, lerobot_settings, root, tmp_path):
    episodes = libero_episodes(4)
    lerobot_dataset(root, episodes, "v3.0")
    chosen = data.model_copy(update={"tasks": (f"KITCHEN_SCENE4_{TASKS[1]}",)})
    store = run(chosen, lerobot_settings, tmp_path / "out", image_rotation="none", episodes_per_task=1)
    (info,) = store.episodes
    assert (info.task, info.source) == (f"KITCHEN_SCENE4_{TASKS[1]}", "lerobot:v3.0#1")
    wanted = episodes[1]["images"]["observation.images.image"][:, ::-1, ::-1]
    np.testing.assert_array_equal(store[0].images["agentview"], wanted)
    with pytest.raises(ConfigError, match=r"data\.tasks: 'fly' is not in .*open_the_drawer, pick_up_the_bowl"):
        open_source(data.model_copy(update={"tasks": ("fly",)}), lerobot_settings)


def test_noops_are_dropped_on_request(data, lerobot_settings, root, tmp_path):
    episodes = libero_episodes()
    episodes[0]["action"][[2, 3], :6] = 5e-5 / 6
    lerobot_dataset(root, episodes, "v2.1")
    store = run(data, lerobot_settings, tmp_path / "out", drop_noops=True)
    kept = [0, 1, *range(4, 12)]
    np.testing.assert_array_equal(store[0].images["wrist"], episodes[0]["images"]["observation.images.image2"][kept])
    assert store[1].length == 12


@pytest.mark.parametrize(
    ("stored", "name"),
    [
        (lambda a: -a, "+1 open, -1 close"),
        (lambda a: (1 - a) / 2, "1 open, 0 close"),
        (lambda a: (1 + a) / 2, "0 open, 1 close"),
    ],
)
def test_gripper_is_measured_on_the_fingers(data, lerobot_settings, root, tmp_path, stored, name):
    episodes = libero_episodes()
    wanted = [e["action"].copy() for e in episodes]
    for e in episodes:
        e["action"][:, 6] = stored(e["action"][:, 6])
    lerobot_dataset(root, episodes, "v2.1", images=True)
    store = run(data, lerobot_settings, tmp_path / "out")
    np.testing.assert_array_equal(store[1].actions, wanted[1].astype(np.float32))
    assert json.loads((tmp_path / "out" / "source.json").read_text())["gripper_stored"] == name
    with pytest.raises(
        ConfigError, match=r"ingest\.lerobot\.gripper is '-1 open, \+1 close', but the fingers move as under"
    ):
        open_source(data, changed(lerobot_settings, gripper="-1 open, +1 close"))
    assert len(run(data, lerobot_settings, tmp_path / "declared", gripper=name)) == 3


def test_what_the_metadata_does_not_tell_must_be_declared(data, lerobot_settings, root, tmp_path):
    episodes = libero_episodes()
    for e in episodes:
        e["action"][:, 6] = -1  # never closes: nothing to measure
    lerobot_dataset(root, episodes, "v2.1", images=True, fps=10)
    declared = {"image_rotation": ""}
    for field, value, message in (
        ("control_hz", 20, r"fps = 10 where data\.control_hz = 20; .*declare ingest\.lerobot\.control_hz: 20"),
        ("image_rotation", "180", r"declare ingest\.lerobot\.image_rotation: 'none'"),
        ("gripper", "-1 open, +1 close", r"declare ingest\.lerobot\.gripper \(one of '-1 open, \+1 close'"),
    ):
        with pytest.raises(ConfigError, match=message):
            run(data, lerobot_settings, tmp_path / "out", **declared)
        declared[field] = value
    assert len(run(data, lerobot_settings, tmp_path / "out", **declared)) == 3


def rewrite(path: Path, change) -> None:
    """Change a parquet file's table."""
    pq.write_table(change(pq.read_table(path)), path)


def with_column(name, make):
    def change(table):
        return table.set_column(table.column_names.index(name), name, make(table[name]))

    return change


def edited(column, step, place, value):
    rows = column.to_pylist()
    rows[step][place] = value
    return pa.array(rows)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (with_column("action", lambda c: edited(c, 3, 1, float("nan"))), "'action' holds NaN or infinity at step 3"),
        (with_column("action", lambda c: edited(c, 3, 1, 4.0)), r"actions\[3, 1\] = 4"),
        (
            with_column("action", lambda c: pa.array([[int(v) for v in r] for r in c.to_pylist()])),
            "has type list<.*int64",
        ),
        (with_column("action", lambda c: pa.array([r[:6] for r in c.to_pylist()])), "rows that are not 7 numbers"),
        (with_column("observation.state", lambda c: edited(c, 0, 6, 1.0)), "fingers at 1 m"),
        (with_column("task_index", lambda c: pa.array([0] * len(c))), r"task_index means \['pick up the bowl'\]"),
        (
            with_column("timestamp", lambda c: pa.array([2 * v for v in c.to_pylist()])),
            "timestamp of frame 1 is 0.1000",
        ),
        (with_column("timestamp", lambda c: pa.array([str(v) for v in c.to_pylist()])), "'timestamp' has type string"),
        (
            with_column("task_index", lambda c: pa.array([str(v) for v in c.to_pylist()])),
            "'task_index' has type string",
        ),
        (with_column("frame_index", lambda c: pa.array([0.5 for _ in c])), "'frame_index' has type double"),
        (with_column("action", lambda c: pa.array([str(v) for v in c.to_pylist()])), "'action' has type string"),
        (lambda table: table.slice(0, 0), "holds 0 rows of the episode where the metadata says 12; download"),
        (lambda table: table.slice(0, 7), "holds 7 rows of the episode where the metadata says 12; download"),
        (lambda table: table.drop_columns(["action"]), "column 'action' is missing"),
    ],
)
def test_unsound_numbers_are_quarantined_by_name(data, lerobot_settings, root, tmp_path, change, reason):
    lerobot_dataset(root, libero_episodes(4), "v2.1", images=True)
    rewrite(root / PARQUET_V2, change)
    store = run(data, lerobot_settings, tmp_path / "out")
    (rejection,) = store.rejected
    assert rejection.episode == f"libero_object/{TASKS[1]}/episode_000001"
    assert len(store) == 3
    with pytest.raises(DataError, match=f"^episode 1: .*{reason}"):
        raise DataError(rejection.reason)


@pytest.mark.parametrize(
    ("version", "name", "lost"),
    [
        ("v2.1", "videos/chunk-000/observation.images.image2/episode_000001.mp4", 1),
        ("v3.0", "videos/observation.images.image2/chunk-000/file-000.mp4", 4),
        ("v2.1", PARQUET_V2, 1),
    ],
)
def test_truncated_files_are_quarantined_by_name(data, lerobot_settings, root, tmp_path, version, name, lost):
    lerobot_dataset(root, libero_episodes(4), version)
    path = root / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    if lost == 4:
        with pytest.raises(DataError, match=rf"no episode was accepted .*{path.name}: truncated or damaged video"):
            run(data, lerobot_settings, tmp_path / "out")
        return
    store = run(data, lerobot_settings, tmp_path / "out")
    assert len(store) == 4 - lost
    assert path.name in store.rejected[0].reason
    assert "download" in store.rejected[0].reason


def test_frames_that_no_episode_names_are_left_alone(data, lerobot_settings, root, tmp_path):
    """v3.0 gives each episode's range: what lies between or behind them, of dropped episodes say, is nobody's."""
    episodes = libero_episodes(4)
    lerobot_dataset(root, episodes, "v3.0")
    clips = [e["images"]["observation.images.image"] for e in episodes]
    parts = [clips[0], clips[1], clips[0][:5], clips[2], clips[3], clips[1][:7]]
    write_video(root / "videos/observation.images.image/chunk-000/file-000.mp4", parts, 20)
    for name in (START, END):
        table_v3(name, lambda rows: [*rows[:2], *(row + 5 / 20 for row in rows[2:])])(root)
    store = run(data, lerobot_settings, tmp_path / "out")
    assert (len(store), store.rejected) == (4, ())
    for number, clip in enumerate(clips):
        np.testing.assert_array_equal(store[number].images["agentview"], clip)


def test_frames_between_two_places_are_not_guessed(data, lerobot_settings, root, tmp_path):
    lerobot_dataset(root, libero_episodes(4), "v3.0")
    table_v3(START, lambda rows: [rows[0], rows[1] + 0.6 / 20, *rows[2:]])(root)
    (rejection,) = run(data, lerobot_settings, tmp_path / "out").rejected
    assert rejection.episode.endswith("episode_000001")
    assert "frame at 0.600 s lies between two frames of an episode that begins at 0.630 s" in rejection.reason


@pytest.mark.parametrize("rows", ["none", "all"])
def test_an_episode_of_no_length_is_quarantined(data, lerobot_settings, root, tmp_path, rows):
    lerobot_dataset(root, libero_episodes(4), "v2.1")
    path = root / "meta" / "episodes.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[1]["length"] = 0
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    if rows == "none":
        rewrite(root / PARQUET_V2, lambda table: table.slice(0, 0))
    (rejection,) = run(data, lerobot_settings, tmp_path / "out").rejected
    assert "length = 0" in rejection.reason


def test_a_merged_dataset_is_told_apart_by_its_instructions(data, lerobot_settings, root, tmp_path):
    """LeRobot's LIBERO holds all suites in one: every episode gets the suite that knows its instruction."""
    lerobot_dataset(root, libero_episodes(4), "v3.0")
    first, second = sorted({info.task for info in run(data, lerobot_settings, tmp_path / "alone").episodes})
    tasks = (f"libero_goal/{first}", f"libero_10/KITCHEN_SCENE3_{second}")
    both = data.model_copy(update={"suites": ("libero_goal", "libero_10"), "tasks": tasks})
    store = run(both, lerobot_settings, tmp_path / "out")
    assert {info.task for info in store.episodes} == set(tasks)
    assert {info.episode_id.rpartition("/")[0] for info in store.episodes} == set(tasks)


def test_tasks_of_one_instruction_are_refused(data, lerobot_settings, root):
    lerobot_dataset(root, libero_episodes(), "v2.1")
    tasks = ("KITCHEN_SCENE1_open_the_drawer", "KITCHEN_SCENE2_open_the_drawer")
    with pytest.raises(ConfigError, match=r"data\.tasks: 'KITCHEN_SCENE1_.*' and 'KITCHEN_SCENE2_.*' have one instruc"):
        open_source(data.model_copy(update={"suites": ("libero_90",), "tasks": tasks}), lerobot_settings)


@pytest.mark.parametrize(
    ("picture", "reason"),
    [
        (b"not a picture", "is not a readable image"),
        (None, "frame 2 is empty"),
        ("grey", "has mode L"),
        ("small", "is 16x16 where the metadata says 32x32"),
        ("alpha", "has mode RGBA"),
        ("bomb", "is not a readable image"),
    ],
)
def test_damaged_images_are_quarantined(data, lerobot_settings, root, tmp_path, picture, reason):
    from tests.data.sources.datasets import png

    made = {
        "grey": png(np.zeros((32, 32), np.uint8)),
        "small": png(np.zeros((16, 16, 3), np.uint8)),
        "alpha": png(np.zeros((32, 32, 4), np.uint8)),
        "bomb": png(np.zeros((15000, 12000), np.uint8)),
    }
    lerobot_dataset(root, libero_episodes(4), "v3.0", images=True)
    key = "observation.images.image"

    def change(table):
        rows = table[key].to_pylist()
        rows[14]["bytes"] = made.get(picture, picture)
        return with_column(key, lambda c: pa.array(rows, c.type))(table)

    rewrite(root / PARQUET_V3, change)
    store = run(data, lerobot_settings, tmp_path / "out")
    (rejection,) = store.rejected
    assert reason in rejection.reason
    assert f"{key}: frame 2" in rejection.reason


def info(change):
    def edit(root):
        path = root / "meta" / "info.json"
        raw = json.loads(path.read_text())
        change(raw)
        path.write_text(json.dumps(raw))

    return edit


START = "videos/observation.images.image/from_timestamp"
END = "videos/observation.images.image/to_timestamp"


def strings(column):
    return pa.array([str(value) for value in column.to_pylist()])


def table_v3(name, change):
    def edit(root):
        path = root / "meta/episodes/chunk-000/file-000.parquet"
        rewrite(path, with_column(name, lambda c: pa.array(change(c.to_pylist()))))

    return edit


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            info(lambda raw: raw.update(codebase_version="v4.0")),
            r"codebase_version = 'v4.0': input should be 'v2.0', 'v2.1' or 'v3.0'; .*convert it",
        ),
        (info(lambda raw: raw.pop("codebase_version")), "codebase_version: Field required; .*convert it"),
        (info(lambda raw: raw.pop("fps")), "fps: Field required"),
        (info(lambda raw: raw.update(fps=0)), "fps = 0: input should be greater than 0"),
        (info(lambda raw: raw["features"]["action"].update(dtype="int64")), r"features\.action\.dtype = 'int64'"),
        (info(lambda raw: raw["features"]["action"].update(shape=[14])), r"data\.action_dim = 7: .*shape \[14\]"),
        (
            info(lambda raw: raw["features"].pop("observation.images.image2")),
            r"no camera for 'wrist'.*ingest\.lerobot\.cameras",
        ),
        (info(lambda raw: raw["features"].pop("observation.state")), "has no feature observation.state or state"),
        (info(lambda raw: raw.update(fps=True)), "fps = True: input should be a valid number"),
        (info(lambda raw: raw.update(features=[])), r"features = \[\]: input should be a valid dictionary"),
        (
            info(lambda raw: raw["features"]["action"].update(shape=None)),
            r"features\.action\.shape = None: input should be a valid tuple",
        ),
        (info(lambda raw: raw.update(codebase_version="v2.2")), "codebase_version = 'v2.2': input should be"),
        (info(lambda raw: raw.update(codebase_version="v2.1")), r"tasks\.jsonl: missing"),
        (
            lambda root: rewrite(root / PARQUET_V3, with_column("action", strings)),
            "episode 0: .*'action' has type string",
        ),
        (
            lambda root: rewrite(root / PARQUET_V3, with_column("episode_index", strings)),
            "'episode_index' has type stri",
        ),
        (lambda root: (root / PARQUET_V3).unlink(), r"file-000.parquet: missing \(1 of 3 files"),
        (lambda root: (root / "meta/info.json").write_text("{"), "info.json: not valid JSON"),
        (lambda root: (root / "meta/tasks.parquet").write_bytes(b"PAR1"), "tasks.parquet: truncated or damaged"),
        (lambda root: (root / "meta/episodes/chunk-000/file-000.parquet").unlink(), "holds no chunk"),
    ],
)
def test_unusable_datasets_are_refused(data, lerobot_settings, root, tmp_path, damage, message):
    lerobot_dataset(root, libero_episodes(), "v3.0")
    damage(root)
    with pytest.raises((DataError, ConfigError), match=message):
        run(data, lerobot_settings, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def bimanual(count=2, steps=10):
    rng = np.random.default_rng(0)
    sizes = {"cam_high": (30, 53), "cam_left_wrist": (30, 40), "cam_right_wrist": (30, 40)}
    return [
        {
            "action": rng.normal(size=(steps, 14)),
            "state": rng.normal(size=(steps, 14)),
            "images": {
                f"observation.images.{key}": rng.integers(0, 256, (steps, *size, 3), np.uint8)
                for key, size in sizes.items()
            },
            "task": "fold the towel",
        }
        for _ in range(count)
    ]


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_bimanual_dataset_passes_through(data, root, tmp_path, version):
    changes = {"views": ("top", "left_wrist", "right_wrist"), "state_dim": 14, "action_dim": 14, "suites": ("piper",)}
    data = data.model_copy(update={**changes, "control_hz": 30})
    settings = IngestSettings(source="lerobot", path=str(root), lerobot=LeRobotOptions(image_rotation="camera"))
    episodes = bimanual()
    lerobot_dataset(root, episodes, version, fps=30, names=None, images=True)
    with pytest.raises(
        ConfigError, match=r"14-D states with 14-D actions .*declare ingest\.lerobot\.action: joint_absolute"
    ):
        open_source(data, settings)
    settings = changed(settings, action="joint_absolute")
    with pytest.raises(ConfigError, match=r"data\.state_dim = 8: .* has shape \[14\]; set data\.state_dim to it"):
        open_source(data.model_copy(update={"state_dim": 8}), settings)
    store = run(data, settings, tmp_path / "out")
    np.testing.assert_array_equal(store[1].actions, episodes[1]["action"].astype(np.float32))
    np.testing.assert_array_equal(store[1].joints, episodes[1]["state"].astype(np.float32))
    assert {images.shape for images in store[0].images.values()} == {(10, 32, 32, 3)}
    conventions = store.conventions
    assert (conventions.action, conventions.gripper, conventions.image_rotation) == (
        "joint_absolute",
        "absolute",
        "none",
    )
    cameras = json.loads((tmp_path / "out" / "source.json").read_text())["cameras"]
    assert cameras["top"] == {"camera": "observation.images.cam_high", "height": 30, "width": 53, "resized": "lanczos"}
    with pytest.raises(ConfigError, match=r"ingest\.lerobot\.drop_noops = true"):
        open_source(data, changed(settings, drop_noops=True))


def test_equal_names_of_state_and_action_mean_joint_targets(data, root, tmp_path):
    changes = {"views": ("top",), "state_dim": 14, "action_dim": 14, "suites": ("piper",), "control_hz": 30}
    names = {"motors": [f"joint_{i}" for i in range(14)]}
    lerobot_dataset(root, bimanual(), "v3.0", fps=30, names=names, images=True)
    settings = IngestSettings(source="lerobot", path=str(root), lerobot=LeRobotOptions(image_rotation="camera"))
    conventions = open_source(data.model_copy(update=changes), settings).conventions()
    assert conventions.action == "joint_absolute"
    assert conventions.state_layout.startswith("joints: joint_0 joint_1")
