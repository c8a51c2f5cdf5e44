"""LIBERO HDF5 out and in again: nothing may change on the way, and what does not fit is refused by name."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import pytest
import yaml

from tests.data.sources.datasets import TASKS, motion
from tests.helpers.libero import KIT, needs_assets
from wav import cli
from wav.config import DataSettings, IngestSettings, load_preset, load_settings
from wav.data.conventions import Conventions
from wav.data.episode import Episode
from wav.data.sinks.libero_hdf5 import export_hdf5
from wav.data.sinks.libero_states import SimulatorStates, recover_states
from wav.data.sources.options import LiberoHdf5Options
from wav.data.store import EpisodeStore
from wav.data.writer import EpisodeStoreWriter
from wav.errors import ConfigError, DataError, SimulationError
from wav.ingest import ingest

VERSIONS = {"mujoco": "3.3.2", "robosuite": "1.4.0", "libero-assets": "0123456789abcdef"}
FIELDS = ("state", "joints", "actions", "expert_actions")


@pytest.fixture
def data() -> DataSettings:
    return DataSettings(
        suite="libero_object", tasks=TASKS, image_height=32, image_width=32, memory_frames=2, action_chunk=4
    )


def demonstration(seed: int, length: int = 12, **changes) -> Episode:
    """As the scripted expert records it: frame t, action t; the last action is a hold."""
    m, task = motion(seed, length - 1), TASKS[seed // 2 % 2]
    hold = np.zeros((1, 7))
    hold[0, 6] = m["actions"][-1, 6]
    actions = np.concatenate([m["actions"], hold]).astype(np.float32)
    labels = np.concatenate([m["actions"] * ([0.5] * 6 + [1.0]), hold])
    joints = np.concatenate([m["joints"], m["fingers"][:, :1] - m["fingers"][:, 1:]], axis=1)
    fields = {
        "episode_id": f"libero_object/{task}/{1000 + seed:05d}",
        "task": task,
        "instruction": task.replace("_", " "),
        "images": {"agentview": m["images"][:, 0], "wrist": m["images"][:, 1]},
        "state": np.concatenate([m["pose"], m["fingers"]], axis=1).astype(np.float32),
        "joints": joints.astype(np.float32),
        "actions": actions,
        "expert_actions": labels.astype(np.float32),
        "success": True,
        "init_index": 1000 + seed,
        "seed": 77 + seed,
        "source": "scripted mujoco==3.3.2",
    }
    return Episode(**{**fields, **changes})


@pytest.fixture
def make_store(tmp_path: Path, data: DataSettings) -> Callable[..., EpisodeStore]:
    def make(*episodes: Episode, **conventions) -> EpisodeStore:
        meant = Conventions.for_simulator(data, VERSIONS)
        meant = Conventions.from_json({**meant.to_json(), **conventions})
        with EpisodeStoreWriter(tmp_path / "episodes", meant, shard_bytes=100_000) as writer:
            for episode in episodes or [demonstration(seed, 10 + seed) for seed in range(4)]:
                writer.add(episode)
        return EpisodeStore.open(tmp_path / "episodes")

    return make


def read_back(data: DataSettings, folder: Path, **changes) -> EpisodeStore:
    options = LiberoHdf5Options(**changes)
    settings = IngestSettings(source="libero_hdf5", path=str(folder), libero_hdf5=options)
    ingest(data, settings, folder.parent / "again", workers=1)
    return EpisodeStore.open(folder.parent / "again")


def assert_equal(again: EpisodeStore, store: EpisodeStore) -> None:
    assert again.conventions == store.conventions
    assert len(again) == len(store)
    assert not again.rejected
    for one, two in zip(again, store, strict=True):
        for field in FIELDS:
            mine, theirs = getattr(one, field), getattr(two, field)
            assert (mine is None) == (theirs is None), field
            assert mine is None or (mine.dtype == theirs.dtype and mine.tobytes() == theirs.tobytes()), field
        assert one.views == two.views
        for view in one.views:
            assert one.images[view].tobytes() == two.images[view].tobytes(), view
        for field in ("task", "instruction", "success", "init_index", "seed", "length"):
            assert getattr(one, field) == getattr(two, field), field


@pytest.mark.parametrize("alignment", ["after_action", "before_action"])
def test_what_is_written_comes_back_bit_for_bit(data, make_store, tmp_path, alignment):
    store = make_store()
    report = export_hdf5(store, tmp_path / "libero", alignment=alignment)
    assert report.files == {f"{task}_demo.hdf5": 2 for task in TASKS}
    again = read_back(data, tmp_path / "libero")
    assert_equal(again, store)
    assert [info.episode_id for info in again.episodes][:2] == [f"libero_object/{TASKS[0]}/demo_{i}" for i in (0, 1)]
    described = json.loads((tmp_path / "again" / "source.json").read_text())["files"]
    assert {file["observation"] for file in described} == {f"{alignment.partition('_')[0]} its action"}
    other = {"after_action": "before_action", "before_action": "after_action"}[alignment]
    with pytest.raises(ConfigError, match=r"ingest\.libero_hdf5\.alignment = .*attribute alignment says the other"):
        read_back(data, tmp_path / "libero", alignment=other)


def test_a_store_without_labels_and_joints_and_with_one_view(data, make_store, tmp_path):
    episode = demonstration(0)
    bare = demonstration(0, joints=None, expert_actions=None, images={"wrist": episode.images["wrist"]})
    store = make_store(bare, views=["wrist"])
    export_hdf5(store, tmp_path / "libero")
    assert_equal(read_back(data.model_copy(update={"views": ("wrist",), "tasks": ()}), tmp_path / "libero"), store)


def test_the_layout_is_liberos(make_store, tmp_path):
    store = make_store()
    export_hdf5(store, tmp_path / "libero")
    with h5py.File(tmp_path / "libero" / f"{TASKS[0]}_demo.hdf5") as file:
        group, episode = file["data"], store[1]
        assert json.loads(group.attrs["problem_info"])["language_instruction"] == episode.instruction
        assert json.loads(group.attrs["env_args"])["env_kwargs"]["control_freq"] == 20
        assert (group.attrs["macros_image_convention"], group.attrs["num_demos"]) == ("opengl", 2)
        assert group.attrs["total"] == store[0].length + store[1].length
        assert {"env_name", "bddl_file_name"} <= set(group.attrs)
        demo = group["demo_1"]
        assert set(demo) == {"actions", "expert_actions", "dones", "rewards", "robot_states", "obs"}
        assert {"agentview_rgb", "eye_in_hand_rgb", "ee_pos", "ee_ori", "ee_states"} <= set(demo["obs"])
        assert {"gripper_states", "joint_states"} <= set(demo["obs"])
        assert demo.attrs["num_samples"] == episode.length
        np.testing.assert_array_equal(demo["dones"], np.eye(episode.length, dtype=np.uint8)[-1])
        np.testing.assert_array_equal(demo["rewards"], demo["dones"])
        # observation t is the one after action t, the frames are the raw buffer
        np.testing.assert_array_equal(demo["actions"][0], [0, 0, 0, 0, 0, 0, -1])
        np.testing.assert_array_equal(demo["actions"][1:], episode.actions[:-1])
        np.testing.assert_array_equal(demo["obs/agentview_rgb"][3], episode.images["agentview"][3, ::-1, ::-1])
        quaternion = demo["robot_states"][:, 5:]
        np.testing.assert_allclose(np.linalg.norm(quaternion, axis=1), 1)
        angle = np.linalg.norm(demo["obs/ee_ori"], axis=1)
        np.testing.assert_allclose(quaternion[:, 3], np.cos(angle / 2))
        np.testing.assert_array_equal(demo["robot_states"][:, :5], episode.state[:, [6, 7, 0, 1, 2]])


def _changed(field: str, column: int, value: float) -> np.ndarray:
    array = getattr(demonstration(0), field).copy()
    array[-1, column] = value
    return array


@pytest.mark.parametrize(
    ("changes", "conventions", "message"),
    [
        ({}, {"image_rotation": "none"}, r"conventions\.image_rotation = 'none'.*holds '180'"),
        ({}, {"action": "joint_absolute"}, r"conventions\.action = 'joint_absolute'"),
        ({}, {"gripper": "0 open, 1 close"}, r"conventions\.gripper = '0 open, 1 close'"),
        ({}, {"state_layout": "joints(7)"}, r"conventions\.state_layout"),
        ({"success": False}, {}, "success = False"),
        ({"instruction": ' "lift" '}, {}, "begins or ends in spaces or quotes"),
        ({"joints": np.zeros((12, 14), np.float32)}, {}, "joints has 14 columns where .* 8"),
        ({"actions": _changed("actions", 0, 0.25)}, {}, "actions: the last row is .* alignment before_action"),
        ({"expert_actions": _changed("expert_actions", 6, -1)}, {}, "expert_actions: the last row is"),
        ({"actions": _changed("actions", 1, 1.5)}, {}, r"actions\[11, 1\] = 1.5 lies outside"),
        ({"state": _changed("state", 0, 40.0)}, {}, "state reaches 40 m"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_left(make_store, tmp_path, changes, conventions, message):
    store = make_store(demonstration(1), demonstration(0, **changes), **conventions)
    with pytest.raises(DataError, match=message):
        export_hdf5(store, tmp_path / "libero")
    assert not (tmp_path / "libero").exists()
    assert not list(tmp_path.glob(".libero*"))


def test_other_views_and_instructions_are_refused(make_store, tmp_path):
    frames = demonstration(0).images["wrist"]
    store = make_store(demonstration(0, images={"front": frames}), views=["front"])
    with pytest.raises(DataError, match=r"conventions\.views: LIBERO's HDF5 has no camera 'front', only agentview"):
        export_hdf5(store, tmp_path / "libero")
    store = make_store(demonstration(0), demonstration(1, instruction="lift it"))
    with pytest.raises(DataError, match=r"instruction = 'lift it' where the task's first episode"):
        export_hdf5(store, tmp_path / "libero")


def test_a_last_action_that_moves_needs_the_other_alignment(data, make_store, tmp_path):
    moving = demonstration(0, actions=_changed("actions", 0, 0.25), expert_actions=None)
    store = make_store(moving)
    export_hdf5(store, tmp_path / "libero", alignment="before_action")
    assert_equal(read_back(data.model_copy(update={"tasks": ()}), tmp_path / "libero"), store)


@pytest.mark.parametrize("alignment", ["after_action", "before_action"])
def test_with_the_simulators_states_the_alignment_is_seen_in_the_numbers(data, make_store, tmp_path, alignment):
    store = make_store()
    taken = np.linspace(-0.5, 0.5, 7)

    def recover(indices):
        for index in reversed(indices):
            joints = store[index].joints[:, :7].astype(np.float64)
            rows = np.concatenate([np.zeros((len(joints), 1)), joints, np.ones((len(joints), 9))], axis=1)
            yield index, SimulatorStates(np.concatenate([rows[:1] - 1, rows[:-1]]), rows[-1], taken)

    export_hdf5(store, tmp_path / "libero", alignment=alignment, recover=recover)
    for path in (tmp_path / "libero").iterdir():
        with h5py.File(path, "r+") as file:
            del file["data"].attrs["alignment"]
            demo = file["data/demo_0"]
            np.testing.assert_array_equal(demo.attrs["init_state"], demo["states"][0])
            assert (demo["actions"][0].tolist() == taken.tolist()) == (alignment == "after_action")
    assert_equal(read_back(data, tmp_path / "libero"), store)


def test_states_are_recovered_for_scripted_liberos_alone(make_store, data):
    store = make_store(demonstration(0, source="lerobot:x"), suite="tabletop")
    with pytest.raises(DataError, match=r"conventions\.suite = 'tabletop': only LIBERO's suites"):
        next(recover_states(store, [0], data, IngestSettings()))


@pytest.mark.parametrize(
    ("answer", "kind", "message"),
    [
        (RuntimeError("DataError: x/1: another seed"), DataError, "^x/1: another seed"),
        (SimulationError("process 1 died"), SimulationError, "process 1 died"),
        (RuntimeError("KeyError: 'y'"), RuntimeError, "KeyError"),
    ],
)
def test_errors_of_a_process_that_recovers_states_keep_their_kind(
    make_store, data, tmp_path, monkeypatch, answer, kind, message
):
    store = make_store()
    monkeypatch.setattr("wav.sim.registry.simulator_versions", lambda _: VERSIONS)
    monkeypatch.setattr("wav.sim.workers.map_in_processes", lambda *_: iter([(0, answer)]))
    recover = partial(recover_states, store, data=data, ingest=IngestSettings())
    with pytest.raises(kind, match=message):
        export_hdf5(store, tmp_path / "libero", recover=recover)
    assert not (tmp_path / "libero").exists()
    monkeypatch.setattr("wav.sim.registry.simulator_versions", lambda _: {**VERSIONS, "mujoco": "3.4"})
    with pytest.raises(DataError, match="the states cannot be had here"):
        export_hdf5(store, tmp_path / "libero", recover=recover)


def test_command_writes_and_refuses_an_existing_folder(make_store, tmp_path, capsys):
    store = make_store()
    assert cli.main(["export-hdf5", str(store.path), str(tmp_path / "libero")]) == 0
    assert f"{TASKS[1]}_demo.hdf5: 2 demonstrations" in capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "libero").iterdir()}
    assert cli.main(["export-hdf5", str(store.path), str(tmp_path / "libero")]) == 1
    assert "exists already" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "libero").iterdir()} == before


def cut_front(path: Path, share: float) -> None:
    """Drop the first steps of every demonstration, as who trims a dataset does."""
    with h5py.File(path, "a") as file:
        for demo in file["data"].values():
            steps = len(demo["actions"])
            names: list[str] = []
            demo.visit(names.append)
            for name in names:
                if isinstance(demo[name], h5py.Dataset) and demo[name].shape[:1] == (steps,):
                    kept = demo[name][int(share * steps) :]
                    del demo[name]
                    demo[name] = kept
            demo.attrs["num_samples"] = steps - int(share * steps)


@needs_assets
@pytest.mark.long
def test_a_recorded_demonstration_with_its_states_is_replayed_from_the_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WAV_LIBERO_ASSETS", str(KIT))
    monkeypatch.setenv("WAV_LOCAL_DIR", str(tmp_path / "local"))
    raw = load_preset("libero-cpu").model_dump(mode="json")
    raw["data"] |= {"image_height": 32, "image_width": 32}
    raw["ingest"] |= {"episodes_per_task": 2, "detour": 0.5}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(raw))
    settings = load_settings(tmp_path / "params.yaml")
    ingest(settings.data, settings.ingest, tmp_path / "episodes", workers=2)
    store = EpisodeStore.open(tmp_path / "episodes")
    options = ["--states", "--params", str(tmp_path / "params.yaml")]
    assert cli.main(["export-hdf5", str(store.path), str(tmp_path / "libero"), *options]) == 0
    again = read_back(settings.data, tmp_path / "libero")
    assert_equal(again, store)
    raw["ingest"] |= {"source": "libero_hdf5", "path": str(tmp_path / "libero")}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(raw))
    assert cli.main(["replay", str(again.path), "--params", str(tmp_path / "params.yaml")]) == 0
    assert "2 of 2 demonstrations succeed again" in capsys.readouterr().out
    cut_front(next((tmp_path / "libero").glob("*.hdf5")), 0.4)
    cut = read_back(settings.data, tmp_path / "libero")
    assert cut[0].length < store[0].length
    assert cli.main(["replay", str(cut.path), "--params", str(tmp_path / "params.yaml"), "--json"]) == 0
    outcomes = json.loads(capsys.readouterr().out)["outcomes"]
    assert [(one["success"], one["position_error"] < 1e-4) for one in outcomes] == [(True, True)] * 2
    raw["ingest"] |= {"source": "scripted", "seed": 1}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(raw))
    assert cli.main(["export-hdf5", str(store.path), str(tmp_path / "no"), *options]) == 1
    assert "recorded under another ingest.seed" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
