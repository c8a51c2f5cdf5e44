"""LIBERO: its files read safely (no simulator), and its simulator under the published protocol (with the assets)."""

from __future__ import annotations

import importlib.util
import logging
import os
import pickle
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.libero import KIT, needs_assets, needs_libero
from wav.config import DataSettings
from wav.errors import ConfigError, DataError, ServiceError
from wav.sim.libero import assets as libero_assets
from wav.sim.libero import tasks as libero_tasks
from wav.sim.registry import LIBERO_SUITES, select_tasks, task_specs
from wav.sim.workers import SimPool

ROOT = Path(__file__).parents[3]
FIXTURES = ("wooden_cabinet", "flat_stove")
SPATIAL = DataSettings(suite="libero_spatial", tasks=(), image_height=64, image_width=64)


@pytest.fixture(autouse=True)
def _assets(monkeypatch, tmp_path):
    monkeypatch.setenv("WAV_LIBERO_ASSETS", str(KIT))
    monkeypatch.setenv("WAV_LOCAL_DIR", str(tmp_path))
    libero_assets.find_assets.cache_clear()
    yield
    libero_assets.find_assets.cache_clear()


# ---- files ----


def _init_file(path: Path, content: bytes, member: str = "archive/data.pkl") -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, content)
    return path


def test_the_safe_loader_reads_arrays_and_nothing_else(tmp_path):
    states = np.arange(6.0).reshape(2, 3)
    good = _init_file(tmp_path / "good", pickle.dumps(states, protocol=2))
    np.testing.assert_array_equal(libero_tasks.read_init_file(good), states)

    class Attack:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'owned'}",)

    for name, content, words in (
        ("attack", pickle.dumps(Attack(), protocol=2), "is not allowed"),
        ("nested", pickle.dumps(np.array([Attack()], dtype=object), protocol=2), "is not allowed"),
        ("eval", b"cbuiltins\neval\n(S'1'\ntR.", "is not allowed"),
        ("list", pickle.dumps([1.0], protocol=2), "holds list"),
        ("float32", pickle.dumps(states.astype(np.float32), protocol=2), "float32"),
        ("flat", pickle.dumps(states.ravel(), protocol=2), r"\(6,\)"),
        ("nan", pickle.dumps(states * np.nan, protocol=2), "NaN"),
        ("cut", pickle.dumps(states, protocol=2)[:40], "not a file of initial states"),
    ):
        with pytest.raises(DataError, match=words):
            libero_tasks.read_init_file(_init_file(tmp_path / name, content))
    assert not (tmp_path / "owned").exists()
    with pytest.raises(DataError, match=r"no data\.pkl"):
        libero_tasks.read_init_file(_init_file(tmp_path / "empty", b"", "archive/version"))
    (tmp_path / "text").write_text("not a zip")
    with pytest.raises(DataError, match="not a file of initial states"):
        libero_tasks.read_init_file(tmp_path / "text")
    with pytest.raises(DataError, match="no such file"):
        libero_tasks.read_init_file(tmp_path / "none")


@needs_libero
def test_the_safe_loader_agrees_with_torch():
    import torch

    task = next(iter(task_specs("libero_goal")))
    path = libero_tasks._init_file("libero_goal", task)
    unsafe = torch.load(path, weights_only=False)  # the package's own file: what LIBERO does
    np.testing.assert_array_equal(libero_tasks.read_init_file(path), unsafe)


@needs_libero
def test_suites_have_their_tasks_limits_and_fifty_initial_states(monkeypatch):
    assert {suite: len(task_specs(suite)) for suite in LIBERO_SUITES} == {
        "libero_spatial": 10,
        "libero_object": 10,
        "libero_goal": 10,
        "libero_10": 10,
        "libero_90": 90,
    }
    limits = {suite: {spec.max_steps for spec in task_specs(suite).values()} for suite in LIBERO_SUITES}
    assert limits == {
        "libero_spatial": {220},
        "libero_object": {280},
        "libero_goal": {300},
        "libero_10": {520},
        "libero_90": {400},
    }
    for suite in LIBERO_SUITES:
        for name, spec in list(task_specs(suite).items())[:10]:
            states = libero_tasks.initial_states(suite, name)
            assert len(states) == len(np.unique(states, axis=0)) == 50
            assert spec.scene == name
            assert spec.instruction.islower()
            assert "SCENE" not in spec.instruction
    monkeypatch.setitem(libero_tasks.INIT_DIGESTS, "libero_goal", "0" * 16)
    libero_tasks.init_digest.cache_clear()
    with pytest.raises(DataError, match="digest"):
        libero_tasks.initial_states("libero_goal", next(iter(task_specs("libero_goal"))))
    libero_tasks.init_digest.cache_clear()


@needs_libero
def test_instructions_are_liberos_own():
    from wav.sim.libero.tasks import instruction

    assert instruction("KITCHEN_SCENE10_close_the_top_drawer") == "close the top drawer"
    assert instruction("pick_up_the_milk_and_place_it_in_the_basket") == "pick up the milk and place it in the basket"
    with pytest.raises(ConfigError, match="did you mean 'pick_up_the_milk_and_place_it_in_the_basket'"):
        select_tasks("libero_object", ("pick_up_the_milk",))
    with pytest.raises(ConfigError, match="did you mean 'libero_object'"):
        task_specs("libero_objects")


# ---- installation and assets ----


def test_what_is_missing_is_named_with_its_remedy(monkeypatch, tmp_path):
    monkeypatch.setenv("WAV_LIBERO_ASSETS", str(tmp_path))
    with pytest.raises(ServiceError, match=r"WAV_LIBERO_ASSETS.*has no folder"):
        libero_assets.find_assets()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ServiceError, match="make libero"):
        libero_assets.package_folder()


@needs_libero
def test_hf_libero_disturbs_nothing_else():
    """Installed without its dependencies, it lacks some that its simulator does not use; all others stay sound."""
    done = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True, check=False)
    complaints = [line for line in done.stdout.splitlines() if "requires" in line or "has requirement" in line]
    assert [line for line in complaints if not line.startswith("hf-libero 0.1.4 requires ")] == []


def test_versions_are_checked(monkeypatch):
    versions = dict(libero_assets.REQUIRED)
    monkeypatch.setattr(libero_assets.importlib.metadata, "version", versions.__getitem__)
    assert libero_assets.check_versions() == versions
    versions["mujoco"] = "3.3.3"
    with pytest.raises(ServiceError, match=r"mujoco = 3\.3\.3: needs exactly 3\.3\.2"):
        libero_assets.check_versions()


def test_assets_are_searched_in_order_and_a_download_is_announced(monkeypatch, tmp_path, caplog):
    package, cache = tmp_path / "package", tmp_path / "home" / ".cache" / "libero" / "assets"
    monkeypatch.delenv("WAV_LIBERO_ASSETS")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(libero_assets, "package_folder", lambda: package)

    class File:
        size = 7_000_000

    class Info:
        siblings, sha = (File, File), "abc"

    class Hub:
        def repo_info(self, *_, **__):
            return Info

    def fetch(*_, local_dir, **__):
        for name in libero_assets.FOLDERS:
            (local_dir / name).mkdir(parents=True)

    import huggingface_hub

    def offline(*_, **__):
        raise OSError("no route")

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(ServiceError, match=r"no route.*hf download .*set WAV_LIBERO_ASSETS"):
        libero_assets.find_assets()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert libero_assets.find_assets() == cache
    assert "downloading 14 MB" in caplog.text
    libero_assets.find_assets.cache_clear()
    fetch(local_dir=package / "assets")
    assert libero_assets.find_assets() == package / "assets"
    libero_assets.find_assets.cache_clear()
    fetch(local_dir=tmp_path / "mine")
    monkeypatch.setenv("WAV_LIBERO_ASSETS", str(tmp_path / "mine"))
    assert libero_assets.find_assets() == tmp_path / "mine"


@needs_assets
def test_the_import_asks_nothing_and_needs_no_torch(tmp_path):
    code = (
        "import sys, wav.sim.libero.assets as a; m = a.bootstrap(); print(m._assets_path_cache, 'torch' in sys.modules)"
    )
    env = {**os.environ, "HOME": str(tmp_path), "WAV_LOCAL_DIR": str(tmp_path / "local"), "PYTHONPATH": str(ROOT)}
    env.pop("LIBERO_CONFIG_PATH", None)
    done = subprocess.run(
        f'exec 0<&-; exec {sys.executable} -c "{code}"',
        shell=True,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-2:] == [str(KIT), "False"]
    assert (tmp_path / "local" / "libero" / "config.yaml").is_file()
    assert not (tmp_path / ".libero").exists()


# ---- the simulator ----


def _tasks() -> list[str]:
    return list(task_specs("libero_spatial"))


def _play(environment, task: str, index: int, steps: int = 4) -> list[np.ndarray]:
    rng = np.random.default_rng(index)
    first = environment.reset(task, index)
    seen = [first.state, *first.images.values()]
    for _ in range(steps):
        observation = environment.step(rng.uniform(-1, 1, 7).astype(np.float32))
        seen += [observation.state, *observation.images.values()]
    return [*seen, environment.scene.sim.get_state().flatten(), environment.scene.sim.model.body_pos.copy()]


def test_an_episode_does_not_depend_on_what_ran_before(env):
    one, two = _tasks()[:2]
    before = _play(env, one, 7)
    np.random.seed(1)
    _play(env, two, 2)
    _play(env, one, 9)
    for a, b in zip(before, _play(env, one, 7), strict=True):
        np.testing.assert_array_equal(a, b)
    from wav.sim.libero.env import LiberoEnv

    fresh = LiberoEnv(SPATIAL)
    for a, b in zip(before, _play(fresh, one, 7), strict=True):
        np.testing.assert_array_equal(a, b)
    fresh.close()


def test_initial_states_are_set_and_the_draw_of_fixtures_varies(env):
    task = _tasks()[0]
    env.reset_to(task, libero_tasks.initial_states("libero_spatial", task)[3], 3, settle=False)
    state = env.scene.sim.get_state().flatten()
    np.testing.assert_array_equal(state, libero_tasks.initial_states("libero_spatial", task)[3])
    poses = [env.reset(task, index) and env.scene.sim.model.body_pos.copy() for index in (0, 1)]
    assert np.abs(poses[0] - poses[1]).max() < 0.05
    drawn = [env.reset(task, index).images["agentview"] for index in (1000, 1001)]
    assert (drawn[0] != drawn[1]).any()
    assert not any(env.successes().values())
    for index in (50, 999, -1):
        with pytest.raises(ConfigError, match="0-49"):
            env.reset(task, index)
    with pytest.raises(DataError, match="shape"):
        env.reset_to(task, np.zeros(5), 0)


def test_it_is_liberos_own_environment_rotated_by_180_degrees(env):
    """States and, unsimplified, pixels against LIBERO's OffScreenRenderEnv under its usual evaluation loop."""
    from libero.libero.envs import OffScreenRenderEnv

    from wav.data.state import encode_state
    from wav.sim.libero.env import LiberoEnv, _global_seed

    task, actions = _tasks()[0], np.random.default_rng(3).uniform(-1, 1, (3, 7))
    full = LiberoEnv(SPATIAL.model_copy(update={"render": "full"}))
    seen = [full.reset(task, 4), *(full.step(a) for a in actions)]
    full.close()
    path = str(libero_tasks.bddl_file("libero_spatial", task))
    theirs = OffScreenRenderEnv(bddl_file_name=path, camera_heights=64, camera_widths=64)
    with _global_seed("libero_spatial", task, 4):
        theirs.reset()
    theirs.set_init_state(libero_tasks.initial_states("libero_spatial", task)[4])
    for _ in range(10):
        raw, *_ = theirs.step([0, 0, 0, 0, 0, 0, -1])
    raws = [raw, *(theirs.step(a)[0] for a in actions)]
    theirs.close()
    for mine, raw in zip(seen, raws, strict=True):
        state = encode_state(raw["robot0_eef_pos"], raw["robot0_eef_quat"], raw["robot0_gripper_qpos"])
        np.testing.assert_array_equal(mine.state, state)
        np.testing.assert_array_equal(mine.joints[:7], raw["robot0_joint_pos"].astype(np.float32))
        np.testing.assert_array_equal(mine.images["agentview"], raw["agentview_image"][::-1, ::-1])
        np.testing.assert_array_equal(mine.images["wrist"], raw["robot0_eye_in_hand_image"][::-1, ::-1])


def test_the_gripper_opens_at_minus_one(env):
    env.reset(_tasks()[0], 0)
    for command, widths in ((1.0, (0.0, 0.01)), (-1.0, (0.07, 0.09))):
        for _ in range(15):
            env.step(np.array([0, 0, 0.2, 0, 0, 0, command], dtype=np.float32), render=False)
        opening = env.state()[6] - env.state()[7]
        assert widths[0] <= opening <= widths[1]


@needs_assets
def test_results_do_not_depend_on_workers_and_survive_a_kill():
    actions = np.random.default_rng(0).uniform(-1, 1, (3, 7)).astype(np.float32)
    task, seen = _tasks()[0], []
    for workers in (1, 2):
        with SimPool("libero_spatial", SPATIAL, workers=workers, slots=2) as pool:
            states = {}
            for slot in range(2):
                pool.submit_reset(slot, task, slot)
            while len(states) < 2:
                for slot, reply in pool.wait():
                    assert reply.error is None
                    if reply.steps_done == 0:
                        pool.submit_steps(slot, actions)
                    else:
                        states[slot] = np.concatenate(
                            [reply.observation.state, *(i.ravel() for i in reply.observation.images.values())]
                        )
            if workers == 2:
                os.kill(pool.pids[0], signal.SIGKILL)
                pool.submit_steps(0, actions)
                assert pool.wait()[0][1].error
                pool.submit_reset(0, task, 0)
                assert pool.wait()[0][1].error is None
                pool.submit_steps(0, actions)
                again = pool.wait()[0][1].observation
                np.testing.assert_array_equal(again.state, states[0][:8])
            seen.append(states)
    for slot in range(2):
        np.testing.assert_array_equal(seen[0][slot], seen[1][slot])


@needs_assets
@pytest.mark.parametrize("number", [3, *(pytest.param(n, marks=pytest.mark.long) for n in (4, 6, 7, 9))])
def test_an_object_drawn_on_a_fixture_stands_there_whatever_was_reset_before(env, number):
    task, states = _tasks()[number], []
    for index in (1000, 1005, 0, 1000):
        env.reset(task, index)
        scene, sim = env.scene, env.scene.sim
        start = next(s for s in scene.parsed_problem["initial_state"] if s[0] == "on" and s[2].startswith(FIXTURES))
        there = sim.data.body_xpos[scene.obj_body_id[start[1]]]
        region = sim.data.site_xpos[sim.model.site_name2id(start[2])]
        assert np.linalg.norm((there - region)[:2]) < 0.06
        states.append([sim.get_state().flatten(), sim.model.body_pos.copy(), sim.model.body_quat.copy()])
    for first, again in zip(states[0], states[-1], strict=True):
        np.testing.assert_array_equal(first, again)


@needs_assets
def test_a_task_is_the_same_alone_and_among_several_suites():
    from wav.sim.libero.env import LiberoEnv

    task, seen = "turn_on_the_stove", []
    for suites, name in ((("libero_goal",), task), (("libero_10", "libero_goal"), f"libero_goal/{task}")):
        data = SPATIAL.model_copy(update={"suites": suites, "image_height": 16, "image_width": 16})
        (spec,) = select_tasks(data.suite, (name,))
        assert (spec.max_steps, spec.instruction) == (300, "turn on the stove")
        environment = LiberoEnv(data)
        seen.append(environment.reset(name, 3))
        assert environment.successes() == {name: False}
        environment.close()
    np.testing.assert_array_equal(seen[0].state, seen[1].state)
    np.testing.assert_array_equal(seen[0].images["agentview"], seen[1].images["agentview"])
    with pytest.raises(ConfigError, match="did you mean 'libero_goal/turn_on_the_stove'"):
        select_tasks("libero_10+libero_goal", (task,))


@needs_assets
@pytest.mark.long
@pytest.mark.parametrize("suite", ["libero_spatial", "libero_object", "libero_goal", "libero_10"])
def test_every_task_loads_and_renders(suite):
    from wav.sim.libero.env import LiberoEnv

    environment = LiberoEnv(SPATIAL.model_copy(update={"suites": (suite,)}))
    for task in task_specs(suite):
        observation = environment.reset(task, 0)
        assert all(image.std() > 5 for image in observation.images.values()), task
        assert not environment.success(task)
    environment.close()
