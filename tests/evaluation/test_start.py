"""The start checks that every evaluation shares: what they refuse, what they leave out, what they record."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tests.evaluation.fakes import DATA, FakePolicy
from tests.evaluation.test_report import store as make_store
from wav.data.conventions import Conventions
from wav.errors import ConfigError, DataError
from wav.evaluation.start import check_all, own_store
from wav.evaluation.verdict import report_path
from wav.io.files import write_json
from wav.sim.env import Observation
from wav.sim.workers import SimReply


class DrawingPool:
    """Answers a reset with the first frame that the store of ``test_report`` holds, or another."""

    slots = 1

    def __init__(self, level=10):
        self.level, self.resets = level, []

    def submit_reset(self, slot, task, index, record=False):
        self.resets.append(task)

    def wait(self, timeout=None):
        image = np.full((16, 16, 3), self.level, np.uint8)
        seen = Observation(dict.fromkeys(DATA.views, image), np.zeros(8, np.float32), "x")
        return [(0, SimReply(seen, False, 0, [], {}))]

    def renderer(self):
        return {"backend": "egl", "device": "0", "renderer": "a card"}


@pytest.fixture
def store(tmp_path):
    return make_store(tmp_path / "episodes")


def test_what_an_evaluation_began_with_is_recorded(store, tmp_path):
    pool = DrawingPool()
    found = check_all(FakePolicy(), DATA, pool=pool, out=tmp_path, store=store)
    assert found["simulator"] == dict(Conventions.for_simulator(DATA).simulator)
    assert found["simulator"]["mujoco"]
    assert (found["render"], found["renderer"]["renderer"]) == (DATA.render, "a card")
    assert (found["store"], found["replay"], found["initial_states"]) == (store.digest, "not replayed", "")
    assert [view["view"] for view in found["first_frames"]] == list(DATA.views)
    assert pool.resets == list(DATA.tasks)
    write_json(report_path(store.path), {"passed": True, "digest": store.digest, "success_share": 1.0, "episodes": 6})
    assert check_all(FakePolicy(), DATA, pool=pool, out=tmp_path, store=store)["replay"] == "passed, 100% of 6"
    alone = check_all(FakePolicy(), DATA, pool=DrawingPool(), out=tmp_path, store=None)
    assert (alone["store"], alone["replay"], alone["first_frames"]) == ("", "no demonstrations at hand", [])


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"simulator": {"mujoco": "3.3.0", "robosuite": "1.4.0"}}, r"simulator: .*3\.3\.0"),
        ({"render": "full"}, "render"),
    ],
)
def test_other_versions_and_render_settings_are_refused_before_a_simulator_starts(store, tmp_path, changed, words):
    policy = FakePolicy(dataclasses.replace(Conventions.for_simulator(DATA), **changed))
    pool = DrawingPool()
    for demonstrations in (store, None):
        with pytest.raises(ConfigError, match=words):
            check_all(policy, DATA, pool=pool, out=tmp_path, store=demonstrations)
    assert pool.resets == []


def test_a_failed_replay_is_refused_unless_allowed(store, tmp_path, monkeypatch):
    write_json(report_path(store.path), {"passed": False, "digest": store.digest, "success_share": 0.5, "episodes": 6})
    with pytest.raises(ConfigError, match="only 50%"):
        check_all(FakePolicy(), DATA, pool=DrawingPool(), out=tmp_path, store=store)
    monkeypatch.setenv("WAV_ALLOW_FAILED_REPLAY", "1")
    found = check_all(FakePolicy(), DATA, pool=DrawingPool(), out=tmp_path, store=store)
    assert found["replay"] == "failed, 50% of 6, allowed by WAV_ALLOW_FAILED_REPLAY"


def test_only_the_policys_own_demonstrations_are_compared_with(store, tmp_path):
    policy = FakePolicy()
    policy.statistics = store.statistics
    assert own_store(policy, store.path).digest == store.digest
    policy.statistics = make_store(tmp_path / "others", length=24).statistics
    assert own_store(policy, store.path) is None
    assert own_store(policy, tmp_path / "none") is None
    (store.path / "manifest.json").write_text("{}")
    with pytest.raises(DataError):
        own_store(policy, store.path)
