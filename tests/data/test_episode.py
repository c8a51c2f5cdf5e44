"""Episodes refuse what training could not digest."""

import numpy as np
import pytest

from wav.errors import DataError


def test_good_episode(make_episode):
    episode = make_episode()
    episode.validate()
    assert episode.length == 12
    assert episode.views == ("agentview", "wrist")
    assert episode.labels() is episode.expert_actions
    bare = make_episode(expert_actions=None, joints=None)
    bare.validate()
    assert bare.labels() is bare.actions


def with_nan() -> np.ndarray:
    state = np.zeros((12, 8), np.float32)
    state[5, 2] = np.nan
    return state


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"instruction": " "}, "instruction is empty"),
        ({"images": {}}, "images has no view"),
        ({"images": {"agentview": np.zeros((11, 4, 4, 3), np.uint8)}}, r"images\['agentview'\] has shape \(11,"),
        ({"images": {"agentview": np.zeros((12, 4, 4, 3), np.float32)}}, r"images\['agentview'\] has dtype float32"),
        ({"state": np.zeros((12, 8))}, "state has dtype float64; convert it to float32"),
        ({"state": with_nan()}, "state holds .* at step 5"),
        ({"state": np.zeros((0, 8), np.float32)}, "has no frames"),
        ({"actions": np.zeros((11, 7), np.float32)}, r"actions has shape \(11, 7\)"),
        ({"expert_actions": np.zeros((12, 6), np.float32)}, "expert_actions has shape"),
        ({"joints": np.zeros(12, np.float32)}, "joints has shape"),
        ({"joints": [1]}, "joints is list"),
    ],
)
def test_bad_episodes(make_episode, changes, message):
    with pytest.raises(DataError, match=f"episode lift_red_cube/00000: {message}"):
        make_episode(**changes).validate()
