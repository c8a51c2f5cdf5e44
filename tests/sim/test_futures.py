"""Futures of one state: the expert's own actions lead where the expert went, in any order and in a fresh simulator."""

from __future__ import annotations

import numpy as np
import pytest

from wav.config import load_settings
from wav.sim.demonstrations import kept_env, run_expert
from wav.sim.futures import branch_points, execute

TASK, INDEX, EVERY, CHUNK = "lift_green_cube", 4, 5, 6


@pytest.fixture(scope="module")
def data():
    return load_settings("params.yaml").data.model_copy(update={"image_height": 32, "image_width": 32})


def test_the_experts_actions_lead_where_the_expert_went_and_others_elsewhere(data):
    episode: list[tuple] = []
    env = kept_env("tabletop", data)
    run_expert(env, "tabletop", TASK, INDEX, on_step=lambda *row: episode.append(row))
    branches = branch_points("tabletop", data, TASK, INDEX, count=3, every=EVERY)
    assert len(branches) == 3
    assert [branch.step % EVERY for branch in branches] == [0, 0, 0]
    assert [len(branch.seen) for branch in branches] == [branch.step // EVERY + 1 for branch in branches]
    branch = branches[-1]
    np.testing.assert_array_equal(branch.final.state, episode[-1][0].state)
    np.testing.assert_array_equal(branch.seen[-1].images["wrist"], episode[branch.step][0].images["wrist"])
    actions = np.stack([episode[branch.step + i][1] for i in range(CHUNK)])
    other = np.random.default_rng(0).uniform(-1, 1, actions.shape).astype(np.float32)
    wanted = np.stack([episode[branch.step + 1 + i][0].state for i in range(CHUNK)])
    for chunks in (np.stack([actions, other]), np.stack([other, actions])):
        ends = [
            np.stack([seen.state for seen in segment.seen[1:]]) for segment in execute("tabletop", data, branch, chunks)
        ]
        mine = ends[0] if chunks is not None and np.array_equal(chunks[0], actions) else ends[1]
        np.testing.assert_array_equal(mine, wanted)
        assert np.abs(ends[0] - ends[1]).max() > 0.01


def test_an_episode_that_reaches_the_goal_in_a_chunk_says_so(data):
    branch = branch_points("tabletop", data, TASK, INDEX, count=4, every=EVERY)[-1]
    episode: list[tuple] = []
    run_expert(kept_env("tabletop", data), "tabletop", TASK, INDEX, on_step=lambda *row: episode.append(row))
    actions = np.stack([row[1] for row in episode[branch.step :]])
    solved, still = execute("tabletop", data, branch, np.stack([actions, np.zeros_like(actions)]))
    assert solved.solved
    assert not still.solved
