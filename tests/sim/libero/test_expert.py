"""LIBERO's expert: goals and grasps as pure logic, and (with the assets) episodes solved and recorded."""

from __future__ import annotations

import numpy as np
import pytest

from tests.helpers.libero import INSTALLED, KIT, needs_assets
from wav.config import DataSettings
from wav.errors import DataError
from wav.sim.libero import assets as libero_assets
from wav.sim.libero.expert_goals import Goal, ordered_goals
from wav.sim.libero.grasps import HeightMap, Solids, axes, box_points, grasps, gripper_points

NOTHING = np.empty((0, 3))


# ---- goals ----


def test_goals_come_in_working_order():
    state = [["close", "drawer"], ["in", "bowl_1", "drawer"], ["turnon", "stove_1"], ["on", "pot_1", "stove_1_cook"]]
    goals = ordered_goals(state)
    assert [goal.predicate for goal in goals] == ["turnon", "in", "on", "close"]
    assert goals[1] == Goal("in", "bowl_1", "drawer")
    assert sorted(goal.state for goal in goals) == sorted(state)
    assert ordered_goals([["Open", "a"]])[0].predicate == "open"


@pytest.mark.parametrize("state", [["up", "a"], ["in", "a"], ["open", "a", "b"], []])
def test_a_goal_the_expert_does_not_know_is_refused(state):
    with pytest.raises(DataError, match="the expert knows"):
        ordered_goals([state])


@pytest.mark.skipif(not INSTALLED, reason="hf-libero is not installed: make libero")
@pytest.mark.parametrize("suite", ["libero_object", "libero_spatial", "libero_goal", "libero_10"])
def test_every_problem_definition_of_the_suite_has_goals_the_expert_knows(suite):
    import re

    from wav.sim.libero.tasks import bddl_file, task_specs

    for task in task_specs(suite):
        text = bddl_file(suite, task).read_text()
        atoms = re.findall(r"\((\w+(?: \w+)+)\)", text[text.index("(:goal") :])
        assert ordered_goals([[word if i else word.lower() for i, word in enumerate(a.split())] for a in atoms])


# ---- geometry ----


def test_a_carton_is_taken_by_its_narrow_side_wherever_it_points():
    for turn in (0.0, 0.5, 1.2):
        c, s = np.cos(turn), np.sin(turn)
        carton = box_points(np.zeros(3), np.array([0.02, 0.05, 0.03])) @ np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]])
        best = next(grasps(carton, NOTHING, -0.03))
        assert abs(axes(best.yaw)[1] @ np.array([-s, c])) < 0.7  # closes along the short side rather than the long
        assert 0.035 < best.width < 0.068
        assert np.linalg.norm(best.position[:2]) < 0.01
        assert -0.03 < best.position[2] < 0.03


def test_a_bowl_is_taken_by_its_rim_and_a_wide_block_not_at_all():
    angles = np.arange(0, 2 * np.pi, 0.05)
    ring = np.concatenate([np.column_stack([0.05 * np.cos(angles), 0.05 * np.sin(angles), np.full(len(angles), z)])
                           for z in np.arange(0.0, 0.05, 0.004)])  # fmt: skip
    best = next(grasps(ring, NOTHING, 0.0))
    assert best.width < 0.02
    assert np.linalg.norm(best.position[:2]) == pytest.approx(0.05, abs=0.006)
    assert next(grasps(box_points(np.zeros(3), np.array([0.06, 0.06, 0.04])), NOTHING, -0.04), None) is None


def test_a_grasp_keeps_away_from_what_stands_beside():
    block = box_points(np.zeros(3), np.array([0.015, 0.015, 0.03]))
    free = next(grasps(block, NOTHING, -0.03))
    wall = box_points(np.array([0.0, 0.045, 0.0]), np.array([0.1, 0.01, 0.03]))  # where a finger would go
    beside = next(grasps(block, wall, -0.03))
    assert free.yaw == pytest.approx(0.0)
    assert abs(axes(beside.yaw)[1][1]) < 0.7  # closes along the wall instead
    walls = [wall, wall * (1, -1, 1), wall[:, [1, 0, 2]], wall[:, [1, 0, 2]] * (-1, 1, 1)]
    assert next(grasps(block, np.concatenate(walls), -0.03), None) is None


def test_heights_clear_what_lies_on_the_way():
    table = np.zeros(2)
    tower = box_points(np.array([0.2, 0.0, 0.1]), np.array([0.02, 0.02, 0.1]))
    around = HeightMap(tower, table, floor=0.0)
    shape = np.array([[0.0, 0.0, -0.05]])
    assert around.clearance(shape, table) == pytest.approx(0.05)
    assert around.path_clearance(shape, table, np.array([0.3, 0.0])) == pytest.approx(0.25)
    assert around.path_clearance(shape, table, np.array([0.0, 0.3])) == pytest.approx(0.05)
    low = gripper_points(0.0)
    assert low[:, 2].min() < 0 < low[:, 2].max()
    assert np.abs(low[:, 1]).max() > np.abs(low[:, 0]).max()  # the hand is longer along the closing direction


# ---- with LIBERO ----


@pytest.fixture(scope="module")
def libero(tmp_path_factory):
    """Environments by suite, one small picture each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WAV_LIBERO_ASSETS", str(KIT))
        patch.setenv("WAV_LOCAL_DIR", str(tmp_path_factory.mktemp("local")))
        libero_assets.find_assets.cache_clear()
        from wav.sim import demonstrations

        def settings(suite: str) -> DataSettings:
            return DataSettings(suite=suite, tasks=(), image_height=16, image_width=16, views=("agentview",))

        yield demonstrations, settings
        demonstrations.kept_env.cache_clear()
        libero_assets.find_assets.cache_clear()


def _first_task(suite: str) -> str:
    from wav.sim.registry import task_specs

    return next(iter(task_specs(suite)))


@needs_assets
@pytest.mark.parametrize("suite", ["libero_object", "libero_spatial"])
def test_the_expert_solves_a_task_from_an_initial_state_of_evaluation(libero, suite):
    demonstrations, settings = libero
    outcome = demonstrations.solves(suite, _first_task(suite), 0, settings(suite), 0.0, 0.0, 0)
    assert outcome.success
    assert outcome.steps < 150


@needs_assets
def test_a_demonstration_is_reproducible_its_labels_clean_and_its_start_not_evaluations(libero):
    from wav.sim.libero.tasks import initial_states

    demonstrations, settings = libero
    suite, data = "libero_object", settings("libero_object")
    task = _first_task(suite)
    first, again = (demonstrations.record_demonstration(suite, task, 1000, data, 0.1, 1.0, 3) for _ in range(2))
    first.validate()
    assert first.success
    for name in ("state", "joints", "actions", "expert_actions"):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
    np.testing.assert_array_equal(first.images["agentview"], again.images["agentview"])
    noise = (first.actions - first.expert_actions)[:-1]
    assert 0.02 < noise[:, :3].std() < 0.15  # executed: the label plus noise, clipped
    assert np.abs(noise[:, 6]).max() == 0
    env = demonstrations.kept_env(suite, data)
    starts = {}
    for index in (0, 1000, 1001):
        env.reset(task, index)
        scene = env.scene
        free = [scene.sim.model.get_joint_qpos_addr(item.joints[-1])[0] for item in scene.objects_dict.values()]
        places = np.concatenate([[address, address + 1] for address in free])  # x and y of every object
        starts[index] = scene.sim.data.qpos[places]
        gaps = np.abs(initial_states(suite, task)[:, 1 + places] - starts[index]).max(axis=1)
        assert (gaps.min() > 0.003) == (index >= 1000)
    assert np.abs(starts[1000] - starts[1001]).max() > 0.005


@needs_assets
def test_clouds_are_where_the_objects_are(libero):
    demonstrations, settings = libero
    env = demonstrations.kept_env("libero_object", settings("libero_object"))
    env.reset(_first_task("libero_object"), 0)
    sim, solids = env.scene.sim, Solids(env.scene.sim)
    body = env.scene.obj_body_id["alphabet_soup_1"]
    cloud, others = solids.cloud(body), solids.others(body, sim.data.body_xpos[body])
    assert np.abs(cloud.mean(axis=0) - sim.data.body_xpos[body]).max() < 0.01
    assert np.ptp(cloud, axis=0) == pytest.approx([0.065, 0.065, 0.078], abs=0.01)  # a can
    assert np.linalg.norm(others - sim.data.body_xpos[body], axis=1).min() > 0.03
