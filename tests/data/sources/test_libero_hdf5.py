"""LIBERO HDF5 in, from sound files and from damaged ones."""

import json
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest

from tests.data.sources.datasets import TASKS, changed, libero_file, motion
from wav.data.sources import open_source
from wav.data.sources.damage import unreadable
from wav.data.store import EpisodeStore
from wav.errors import ConfigError, DataError
from wav.ingest import ingest


def run(data, settings, out, workers=1, **changes) -> EpisodeStore:
    ingest(data, changed(settings, **changes), out, workers=workers)
    return EpisodeStore.open(out)


def edit(path: Path, change) -> None:
    with h5py.File(path, "r+") as file:
        change(file["data"])


def group_instead(group, name) -> None:
    del group[name]
    group.create_group(name)


def replace(group, name, value) -> None:
    del group[name]
    group[name] = value


def test_frames_are_paired_with_the_action_taken_on_seeing_them(data, hdf5_settings, tmp_path):
    store = run(data, hdf5_settings, tmp_path / "out")
    assert [info.episode_id for info in store.episodes][:2] == [
        "libero_object/open_the_drawer/demo_0",
        "libero_object/open_the_drawer/demo_1",
    ]
    m, episode = motion(1, 12), store[1]
    frames = m["images"][1:]
    np.testing.assert_array_equal(episode.images["agentview"], frames[:, 0, ::-1, ::-1])
    np.testing.assert_array_equal(episode.images["wrist"], frames[:, 1, ::-1, ::-1])
    np.testing.assert_array_equal(episode.actions[:-1], m["actions"][1:].astype(np.float32))
    np.testing.assert_array_equal(episode.actions[-1], [0, 0, 0, 0, 0, 0, 1])
    state = np.concatenate([m["pose"], m["fingers"]], axis=1)[1:]
    np.testing.assert_array_equal(episode.state, state.astype(np.float32))
    opening = m["fingers"][1:, :1] - m["fingers"][1:, 1:]
    np.testing.assert_array_equal(episode.joints, np.concatenate([m["joints"][1:], opening], 1).astype(np.float32))
    assert (episode.instruction, episode.task, episode.success) == ("open the drawer", "open_the_drawer", True)
    assert episode.source == "libero_hdf5:open_the_drawer_demo.hdf5#demo_1"
    conventions = store.conventions
    assert (conventions.image_rotation, conventions.gripper, conventions.control_hz) == ("180", "-1 open, +1 close", 20)
    described = json.loads((tmp_path / "out" / "source.json").read_text())
    assert described["files"][0]["observation"] == "after its action"
    assert described["files"][0]["cameras"]["wrist"]["resized"] == "no"
    store.verify()


def test_frames_recorded_before_their_action_stay(data, tmp_path, hdf5_settings):
    folder = tmp_path / "regenerated"
    folder.mkdir()
    libero_file(folder / "lift_it_demo.hdf5", after=False, attributes={"macros_image_convention": "opencv"})
    store = run(data, hdf5_settings, tmp_path / "out", path=str(folder))
    m = motion(0, 12)
    np.testing.assert_array_equal(store[0].actions, m["actions"].astype(np.float32))
    # robosuite's opencv convention has reversed the rows already
    np.testing.assert_array_equal(store[0].images["agentview"], m["images"][:-1, 0, :, ::-1])
    with pytest.raises(ConfigError, match=r"ingest\.libero_hdf5\.alignment = 'after_action', but the simulator states"):
        run(data, hdf5_settings, tmp_path / "no", path=str(folder), alignment="after_action")


def test_what_files_do_not_tell_must_be_declared(data, tmp_path, hdf5_settings):
    path = tmp_path / "KITCHEN_SCENE3_turn_on_the_stove_demo.hdf5"
    bare = dict.fromkeys(("macros_image_convention", "env_args", "problem_info"))
    libero_file(path, after=False, attributes=bare)
    edit(path, lambda data: [data[name].pop("states") for name in data])
    declared = {"path": str(path)}
    for field, value, message in (
        ("image_rotation", "180", r"KITCHEN.*declare ingest\.libero_hdf5\.image_rotation: 'none'"),
        ("control_hz", 20, r"declare ingest\.libero_hdf5\.control_hz"),
        ("alignment", "before_action", r"declare ingest\.libero_hdf5\.alignment: after_action"),
    ):
        with pytest.raises(ConfigError, match=message):
            run(data, hdf5_settings, tmp_path / "out", **declared)
        declared[field] = value
    store = run(data, hdf5_settings, tmp_path / "out", **declared)
    assert store[0].instruction == "turn on the stove"
    np.testing.assert_array_equal(store[0].images["wrist"], motion(0, 12)["images"][:-1, 1])


def test_contradictions_are_refused(data, libero, hdf5_settings, tmp_path):
    for changes, message in (
        ({"image_rotation": "180"}, r"recorded as rotated 'none' where ingest\.libero_hdf5\.image_rotation = '180'"),
        (
            {"gripper": "+1 open, -1 close"},
            r"fingers move as under '-1 open, \+1 close'; set ingest\.libero_hdf5\.gripper",
        ),
        ({"control_hz": 10}, r"= 10 where data\.control_hz = 20"),
        ({"path": str(tmp_path / "nowhere")}, r"ingest\.path = .*no such file or folder"),
        (
            {"cameras": {"wrist": "depth"}},
            r"no camera for 'wrist' .*it has agentview_rgb, .*ingest\.libero_hdf5\.cameras\.wrist",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            open_source(data, changed(hdf5_settings, **changes))
    with pytest.raises(ConfigError, match=r"data\.tasks: 'fly' is not in .* open_the_drawer, pick_up_the_bowl"):
        open_source(data.model_copy(update={"tasks": ("fly",)}), hdf5_settings)
    for demo in range(3):
        edit(
            libero / f"{TASKS[0]}_demo.hdf5", lambda g, n=f"demo_{demo}": replace(g[n], "actions", -g[n]["actions"][()])
        )
    with pytest.raises(ConfigError, match=r"format's convention is '-1 open, \+1 close', but the fingers"):
        open_source(data, hdf5_settings)
    store = run(
        data.model_copy(update={"tasks": TASKS[:1]}), hdf5_settings, tmp_path / "o", gripper="+1 open, -1 close"
    )
    np.testing.assert_array_equal(store[0].actions[:-1, 6], motion(0, 12)["actions"][1:, 6])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda d: d["actions"].__setitem__((3, 2), np.nan), "actions holds NaN or infinity at step 3"),
        (lambda d: d["actions"].__setitem__((3, 2), 1.5), r"actions\[3, 2\] = 1.5 lies outside"),
        (lambda d: replace(d, "actions", d["actions"][()].astype(np.int64)), "actions has dtype int64"),
        (lambda d: replace(d, "actions", d["actions"][:, :6]), "actions has shape"),
        (lambda d: d["obs"].pop("eye_in_hand_rgb"), "obs/eye_in_hand_rgb is missing"),
        (lambda d: replace(d["obs"], "agentview_rgb", d["obs/agentview_rgb"][()] / 255.0), "agentview_rgb is float64"),
        (lambda d: replace(d["obs"], "agentview_rgb", d["obs/agentview_rgb"][:-1]), r"agentview_rgb is uint8 \(11,"),
        (lambda d: replace(d["obs"], "agentview_rgb", d["obs/agentview_rgb"][:, ::2, ::2]), r"\(12, 16, 16, 3\) where"),
        (lambda d: d["obs"].pop("gripper_states"), "obs/gripper_states is missing"),
        (lambda d: d["obs/ee_states"].__setitem__(0, 100.0), r"state reaches 100 m"),
        (lambda d: d["dones"].__setitem__(slice(None), 0), "dones never becomes 1"),
        (lambda d: d["obs/joint_states"].__setitem__((1, 1), np.inf), "obs/joint_states holds NaN"),
        (lambda d: d["obs"].pop("joint_states"), "obs/joint_states is missing where the file's other demonstrations"),
        (lambda d: replace(d["obs"], "agentview_rgb", np.zeros((12, 32, 32, 4), np.uint8)), r"uint8 \(12, 32, 32, 4\)"),
        (lambda d: group_instead(d, "actions"), "actions is a group where numbers are expected"),
        (lambda d: group_instead(d["obs"], "agentview_rgb"), "obs/agentview_rgb is missing"),
        (lambda d: replace(d, "actions", np.zeros((0, 7))), "actions has 0 steps"),
        (lambda d: replace(d, "actions", h5py.Empty("f")), "actions has shape None"),
        (lambda d: replace(d, "actions", np.array([[b"a"] * 7] * 12)), r"actions has dtype \|S1"),
        (lambda d: replace(d, "dones", np.array([b"x"] * 12)), "dones holds no numbers"),
        (lambda d: d.attrs.__setitem__("init_index", "x"), "attribute init_index = 'x': must be an integer"),
        (lambda d: d.attrs.__setitem__("success", "no"), "attribute success = 'no': must be an integer"),
    ],
)
def test_unsound_demonstration_is_quarantined_by_name(data, libero, hdf5_settings, tmp_path, change, reason):
    path = libero / f"{TASKS[0]}_demo.hdf5"
    edit(path, lambda group: change(group["demo_1"]))
    store = run(data, hdf5_settings, tmp_path / "out")
    assert len(store) == 5
    (rejection,) = store.rejected
    assert rejection.episode == f"libero_object/{TASKS[0]}/demo_1"
    assert rejection.reason.startswith(f"{path.name}: demo_1: ")
    with pytest.raises(DataError, match=reason):
        raise DataError(rejection.reason)


def halve(group, *names) -> None:
    for name in names:
        replace(group[f"{name}/obs"], "agentview_rgb", group[f"{name}/obs/agentview_rgb"][:, ::2, ::2])


@pytest.mark.parametrize("odd", [0, 1, 2])
def test_of_the_image_sizes_in_a_file_the_usual_one_counts(data, libero, hdf5_settings, tmp_path, odd):
    edit(libero / f"{TASKS[0]}_demo.hdf5", lambda group: halve(group, f"demo_{odd}"))
    store = run(data, hdf5_settings, tmp_path / "out")
    (rejection,) = store.rejected
    assert rejection.episode == f"libero_object/{TASKS[0]}/demo_{odd}"
    assert "agentview_rgb is uint8 (12, 16, 16, 3) where uint8 (12, 32, 32, 3) is expected" in rejection.reason
    assert len(store) == 5


def test_of_equally_many_image_sizes_that_of_the_settings_counts(data, libero, hdf5_settings, tmp_path):
    path = libero / f"{TASKS[0]}_demo.hdf5"
    edit(path, lambda group: (group.pop("demo_2"), halve(group, "demo_0")))
    for size, lost in ((32, "demo_0"), (16, "demo_1"), (24, "demo_1")):  # of neither: the first one's
        sized = data.model_copy(update={"image_height": size, "image_width": size})
        (rejection,) = run(sized, hdf5_settings, tmp_path / f"out-{size}", path=str(path)).rejected
        assert rejection.episode.endswith(lost)


def test_whichever_demonstration_is_no_group_is_quarantined(data, libero, hdf5_settings, tmp_path):
    for number in (0, 2):
        edit(libero / f"{TASKS[0]}_demo.hdf5", lambda group, n=f"demo_{number}": replace(group, n, np.zeros(3)))
    store = run(data, hdf5_settings, tmp_path / "out")
    assert [r.reason.partition(": ")[2] for r in store.rejected] == [
        f"demo_{number}: is no group; record it again or drop it" for number in (0, 2)
    ]


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"macros_image_convention": np.bytes_(b"\xff\xfe")}, "macros_image_convention = .* is unknown"),
        ({"env_args": json.dumps({"env_kwargs": None})}, "control rate is not recorded; declare"),
        ({"env_args": json.dumps({"env_kwargs": [1]})}, r"env_args\.env_kwargs: \[1\] is no control_freq"),
        ({"env_args": json.dumps({"env_kwargs": {"control_freq": "fast"}})}, "'fast' is no control_freq"),
        ({"problem_info": "[1]"}, "problem_info: is list where an object is expected"),
    ],
)
def test_attributes_of_other_types_are_refused_by_name(data, libero, hdf5_settings, tmp_path, attributes, message):
    path = libero_file(libero / f"{TASKS[0]}_demo.hdf5", attributes=attributes)
    with pytest.raises((ConfigError, DataError), match=rf"{path.name}: .*{message}"):
        run(data, hdf5_settings, tmp_path / "out")


def test_bytes_gzip_and_chunks_change_nothing(data, libero, hdf5_settings, tmp_path):
    plain = run(data, hdf5_settings, tmp_path / "plain")
    path = libero / f"{TASKS[0]}_demo.hdf5"
    with h5py.File(path, "r+") as file:
        for name, value in dict(file["data"].attrs).items():
            file["data"].attrs[name] = np.bytes_(value)
        demo, packed = file["data/demo_1"], {"compression": "gzip", "shuffle": True}
        frames, actions = demo["obs/agentview_rgb"][()], demo["actions"][()].astype(">f8")
        del demo["obs/agentview_rgb"], demo["actions"]
        demo.create_dataset("obs/agentview_rgb", data=frames, chunks=(1, 32, 32, 3), **packed)
        demo.create_dataset("actions", data=actions, chunks=(5, 7), **packed)
    store = run(data, hdf5_settings, tmp_path / "out")
    assert store.file_digests() == plain.file_digests()


def test_files_with_and_without_joints_are_not_mixed(data, libero, hdf5_settings, tmp_path):
    path = libero / f"{TASKS[0]}_demo.hdf5"
    for number in range(3):
        edit(path, lambda group, n=f"demo_{number}": group[n]["obs"].pop("joint_states"))
    with pytest.raises(DataError, match=rf"{path.name}: obs/joint_states is missing where .*{TASKS[1]}_demo.hdf5 has"):
        run(data, hdf5_settings, tmp_path / "out", alignment="after_action")
    alone = run(data.model_copy(update={"tasks": TASKS[:1]}), hdf5_settings, tmp_path / "o", alignment="after_action")
    assert len(alone) == 3
    assert alone[0].joints is None


def test_hidden_files_are_nobodys(data, libero, hdf5_settings, tmp_path):
    """A Mac's "._" twin of a file, and a notebook's checkpoint of it."""
    for twin in (libero / f"._{TASKS[0]}_demo.hdf5", libero / ".ipynb_checkpoints" / f"{TASKS[1]}_demo.hdf5"):
        twin.parent.mkdir(exist_ok=True)
        twin.write_bytes(b"\x00\x05\x16\x07")
    assert len(run(data, hdf5_settings, tmp_path / "out")) == 6


def test_a_file_that_another_program_writes_is_told(libero):
    said = OSError("Unable to synchronously open file (unable to lock file, errno = 11)")
    assert "is open for writing in another program" in str(unreadable(libero / f"{TASKS[0]}_demo.hdf5", "HDF5", said))


def test_damaged_files_are_refused(data, libero, hdf5_settings, tmp_path):
    path = libero / f"{TASKS[0]}_demo.hdf5"
    whole = path.read_bytes()
    for content, message in (
        (whole[: len(whole) // 2], "truncated or damaged HDF5"),
        (b"<html>not found</html>", "truncated or damaged HDF5"),
        (b"", "truncated or damaged HDF5"),
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"{path.name}: {message}.*download it again"):
            run(data, hdf5_settings, tmp_path / "out")
    path.unlink()
    with h5py.File(path, "w") as file:
        file["observations"] = np.zeros(3)
    with pytest.raises(DataError, match="holds no data/demo_i groups"):
        run(data, hdf5_settings, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_task_without_any_sound_episode_is_refused_where_it_is_named(data, libero, hdf5_settings, tmp_path, caplog):
    for number in range(3):
        edit(libero / f"{TASKS[0]}_demo.hdf5", lambda g, n=number: g[f"demo_{n}/actions"].__setitem__((3, 2), np.nan))
    store = run(data, hdf5_settings, tmp_path / "out")
    assert ({info.task for info in store.episodes}, len(store.rejected)) == ({TASKS[1]}, 3)
    assert f"no episode of task '{TASKS[0]}' is fit" in caplog.text
    with pytest.raises(DataError, match=rf"no episode of task '{TASKS[0]}' is fit \(first: .*NaN.*data\.tasks"):
        run(data.model_copy(update={"tasks": TASKS}), hdf5_settings, tmp_path / "two")
    assert len(run(data.model_copy(update={"tasks": TASKS[1:]}), hdf5_settings, tmp_path / "two")) == len(store)


def test_noops_are_dropped_on_request(data, tmp_path, hdf5_settings):
    path = libero_file(tmp_path / "lift_it_demo.hdf5", after=False)

    def still(group):
        for name in group:
            for step in (0, 3, 4, 6, 11):
                group[name]["actions"][step, :6] = 0.0

    edit(path, still)
    store = run(data, hdf5_settings, tmp_path / "out", path=str(path), drop_noops=True)
    # step 6 closes the gripper, the last frame shows the result: both stay
    kept = [1, 2, 5, 6, 7, 8, 9, 10, 11]
    m = motion(0, 12)
    np.testing.assert_array_equal(store[0].images["wrist"], m["images"][kept, 1, ::-1, ::-1])
    np.testing.assert_array_equal(store[0].joints[:, :7], m["joints"][kept].astype(np.float32))
    assert len(run(data, hdf5_settings, tmp_path / "all", path=str(path))[0].state) == 12


def test_images_are_resized_only_on_request_and_it_is_recorded(data, hdf5_settings, tmp_path):
    larger = data.model_copy(update={"image_height": 48, "image_width": 64})
    store = run(larger, hdf5_settings, tmp_path / "out")
    assert store[0].images["wrist"].shape == (12, 48, 64, 3)
    described = json.loads((tmp_path / "out" / "source.json").read_text())["files"][0]["cameras"]["agentview"]
    assert described == {"camera": "agentview_rgb", "height": 32, "width": 32, "resized": "lanczos"}


def test_extra_fields_come_back_bit_for_bit(data, libero, hdf5_settings, tmp_path):
    rng = np.random.default_rng(5)
    expert, joints = rng.uniform(-1, 1, (12, 7)).astype(np.float32), rng.normal(size=(12, 8)).astype(np.float32)
    expert[:, 6] = 1

    def more(group):
        group["demo_0/expert_actions"], group["demo_0/obs/joints"] = expert, joints
        group["demo_0"].attrs.update({"init_index": 1003, "seed": 4})
        group.attrs["render"], group.attrs["simulator_versions"] = "fast", json.dumps({"mujoco": "3.3.2"})

    for task in TASKS:
        edit(libero / f"{task}_demo.hdf5", more)
    store = run(data.model_copy(update={"render": "fast"}), hdf5_settings, tmp_path / "out")
    np.testing.assert_array_equal(store[0].joints, joints)
    np.testing.assert_array_equal(store[0].labels()[:-1], expert[1:])
    assert (store.episodes[0].init_index, store.episodes[0].seed) == (1003, 4)
    assert (store.conventions.render, dict(store.conventions.simulator)) == ("fast", {"mujoco": "3.3.2"})
    assert not store.episodes[1].has_expert
    edit(libero / f"{TASKS[0]}_demo.hdf5", lambda group: group.attrs.pop("render"))
    with pytest.raises(DataError, match="ingest files of one simulator"):
        open_source(data, hdf5_settings)


def test_folder_of_suites_and_number_of_episodes(data, libero, hdf5_settings, tmp_path):
    suites = tmp_path / "suites"
    shutil.copytree(libero, suites / "libero_object")
    shutil.copytree(libero, suites / "libero_goal")
    store = run(data, hdf5_settings, tmp_path / "out", path=str(suites), episodes_per_task=2)
    assert len(store) == 4


def test_several_suites_become_one_store(data, libero, hdf5_settings, tmp_path):
    """Two suites with tasks of one name: each under its own, statistics over both."""
    root, both = tmp_path / "suites", data.model_copy(update={"suites": ("libero_object", "libero_goal")})
    shutil.copytree(libero, root / "libero_object")
    settings = hdf5_settings.model_copy(update={"path": str(root), "episodes_per_task": 2})
    with pytest.raises(ConfigError, match=r"has no folder 'libero_goal'; give a folder with one for each of data\.su"):
        open_source(both, settings)
    shutil.copytree(libero, root / "libero_goal_no_noops")  # as OpenVLA's regeneration calls it
    store = run(both, settings, tmp_path / "out")
    named = [f"{suite}/{task}" for suite in ("libero_goal", "libero_object") for task in sorted(TASKS)]
    assert [info.task for info in store.episodes] == [task for task in named for _ in range(2)]
    assert store.conventions.suite == "libero_object+libero_goal"
    assert len({info.episode_id for info in store.episodes}) == 8
    assert store.episodes[0].episode_id == f"{named[0]}/demo_0"
    one = both.model_copy(update={"tasks": (named[-1],)})
    assert {info.task for info in run(one, settings, tmp_path / "one").episodes} == {named[-1]}
    with pytest.raises(ConfigError, match=r"data\.tasks: 'libero_goal/none' is not in"):
        open_source(both.model_copy(update={"tasks": ("libero_goal/none",)}), settings)


def test_other_suites_folders_and_two_files_of_a_task_are_refused(data, libero, hdf5_settings, tmp_path):
    (libero.parent / "all").mkdir()
    libero.rename(libero.parent / "all" / "libero_goal")
    settings = hdf5_settings.model_copy(update={"path": str(libero.parent / "all")})
    with pytest.raises(ConfigError, match="holds libero_goal but no folder 'libero_object'"):
        open_source(data, settings)
    goal = data.model_copy(update={"suites": ("libero_goal",)})
    assert len(open_source(goal, settings).files) == 2
    folder = libero.parent / "all" / "libero_goal"
    (folder / "no_noops").mkdir()
    shutil.copy(folder / f"{TASKS[0]}_demo.hdf5", folder / "no_noops" / f"{TASKS[0]}_demo.hdf5")
    with pytest.raises(ConfigError, match=rf"{TASKS[0]}_demo.hdf5 and .* are of one task"):
        open_source(goal, settings)
