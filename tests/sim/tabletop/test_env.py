"""The tabletop suite: initial states, determinism, the expert, the processes."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest

from wav.config import DataSettings
from wav.errors import ConfigError, SimulationError
from wav.sim.registry import select_tasks, task_specs
from wav.sim.tabletop.tasks import SCENES, TASKS, initial_state
from wav.sim.workers import SimPool, map_in_processes

DATA = DataSettings(image_height=32, image_width=32)


def test_at_least_four_tasks_of_which_two_share_a_scene() -> None:
    scenes = [spec.scene for spec in TASKS.values()]
    assert len(TASKS) >= 4
    assert max(scenes.count(scene) for scene in SCENES) >= 2
    assert len({spec.instruction for spec in TASKS.values()}) == len(TASKS)


def test_initial_states_are_a_function_of_scene_and_index() -> None:
    one, two = initial_state("lift_red_cube", 3), initial_state("lift_green_cube", 3)
    assert one.placements == two.placements
    np.testing.assert_array_equal(one.joint_offset, two.joint_offset)
    states = {initial_state("lift_red_cube", i).placements["red_cube"] for i in [*range(50), *range(1000, 1100)]}
    assert len(states) == 150  # evaluation's and the demonstrations' never coincide


def test_colours_change_sides() -> None:
    left = [initial_state("lift_red_cube", i).placements["red_cube"].y > 0 for i in range(50)]
    assert 10 < sum(left) < 40


def test_unknown_tasks_and_suites_are_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match="did you mean 'lift_red_cube'"):
        select_tasks("tabletop", ("lift_red_cub",))
    with pytest.raises(ConfigError, match="unknown suite"):
        task_specs("table")


@pytest.fixture(scope="module")
def env():
    from wav.sim.tabletop.env import TabletopEnv

    environment = TabletopEnv(DATA)
    yield environment
    environment.close()


def _play(env, task: str, index: int) -> list[np.ndarray]:
    rng = np.random.default_rng(index)
    first = env.reset(task, index)
    seen = [first.state, *first.images.values()]
    for _ in range(5):
        seen.append(env.step(rng.uniform(-1, 1, 7).astype(np.float32)).state)
    return seen


def test_an_episode_does_not_depend_on_what_ran_before(env) -> None:
    before = _play(env, "lift_red_cube", 7)
    _play(env, "put_can_in_bin", 2)
    _play(env, "lift_green_cube", 9)
    for one, two in zip(before, _play(env, "lift_red_cube", 7), strict=True):
        np.testing.assert_array_equal(one, two)


def test_observations_have_liberos_shape(env) -> None:
    observation = env.reset("lift_green_cube", 0)
    assert set(observation.images) == {"agentview", "wrist"}
    for image in observation.images.values():
        assert image.shape == (32, 32, 3)
        assert image.dtype == np.uint8
        assert image.std() > 5
    assert observation.state.shape == (8,)
    assert observation.joints is not None
    assert observation.joints.shape == (8,)
    assert observation.instruction == "lift the green cube"
    assert not any(env.successes().values())


@pytest.mark.parametrize("task", list(TASKS))
def test_the_expert_solves_every_task(env, task: str) -> None:
    from wav.sim.demonstrations import run_expert

    assert run_expert(env, "tabletop", task, 1000, noise=0.1)[0]
    assert env.success(task)
    other = [name for name, holds in env.successes().items() if holds and name != task]
    if task.startswith("lift"):
        assert other == []  # only the instructed cube was lifted


def test_fast_rendering_leaves_physics_alone(env) -> None:
    from wav.sim.tabletop.env import TabletopEnv

    full = TabletopEnv(DATA.model_copy(update={"render": "full"}))
    slow, fast = _play(full, "lift_red_cube", 1), _play(env, "lift_red_cube", 1)
    full.close()
    np.testing.assert_array_equal(slow[0], fast[0])
    np.testing.assert_array_equal(slow[-1], fast[-1])
    assert np.abs(slow[1].astype(int) - fast[1].astype(int)).mean() > 0  # pixels do differ: hence one setting for both


def test_a_pool_answers_alike_for_any_number_of_processes_and_survives_a_kill() -> None:
    actions = np.random.default_rng(0).uniform(-1, 1, (3, 7)).astype(np.float32)
    seen = []
    for workers in (1, 2):
        with SimPool("tabletop", DATA, workers=workers, slots=2) as pool:
            states = {}
            for slot in range(2):
                pool.submit_reset(slot, "lift_red_cube", slot, record=True)
            while len(states) < 2:
                for slot, reply in pool.wait():
                    if reply.steps_done == 0:
                        assert len(reply.frames) == 1
                        pool.submit_steps(slot, actions)
                    else:
                        assert reply.steps_done == len(reply.frames) == 3
                        states[slot] = reply.observation.state
            seen.append(states)
            if workers == 1:
                continue  # a kill is survived alike
            os.kill(pool.pids[0], signal.SIGKILL)
            pool.submit_steps(0, actions)
            slot, reply = pool.wait()[0]
            assert slot == 0
            assert reply.error
            pool.submit_reset(0, "lift_red_cube", 0)
            assert pool.wait()[0][1].error is None
    np.testing.assert_array_equal(seen[0][0], seen[1][0])
    np.testing.assert_array_equal(seen[0][1], seen[1][1])


def test_map_in_processes_returns_results_and_errors() -> None:
    jobs = ["2 * 0", "2 * 1", "1 / 0", "__import__('os')._exit(9)", "2 * 4", "2 * 5"]
    results = dict(map_in_processes(eval, [(job,) for job in jobs], workers=2))
    assert [results[x] for x in (0, 1, 4, 5)] == [0, 2, 8, 10]
    assert "ZeroDivisionError" in str(results[2])
    assert isinstance(results[3], SimulationError)


def test_a_killed_process_costs_no_result(tmp_path: Path) -> None:
    """The job that kills its process at the first call is run again."""
    system = "__import__('os')"
    jobs = [
        (f"{system}.path.exists({path!r}) or [open({path!r}, 'w'), {system}.kill({system}.getpid(), 9)]",)
        for path in (str(tmp_path / "a"), str(tmp_path / "b"))
    ]
    assert dict(map_in_processes(eval, jobs, workers=2)) == {0: True, 1: True}
