"""The episode store."""

import dataclasses
import json

import numpy as np
import pytest

from wav.data.conventions import Conventions
from wav.data.store import EpisodeStore
from wav.data.writer import EpisodeStoreWriter
from wav.errors import DataError

FIELDS = ("state", "joints", "actions", "expert_actions")


def assert_same(a, b):
    for name in FIELDS:
        x, y = getattr(a, name), getattr(b, name)
        assert (x is None) == (y is None)
        if x is not None:
            np.testing.assert_array_equal(x, y)
    assert list(a.images) == list(b.images)
    for view in a.images:
        np.testing.assert_array_equal(a.images[view], b.images[view])
    for name in ("episode_id", "task", "instruction", "success", "init_index", "seed", "source"):
        assert getattr(a, name) == getattr(b, name)


@pytest.mark.parametrize("shard_bytes", [1, 50_000, 2**28])
def test_round_trip(make_store, make_episode, shard_bytes):
    lengths = (12, 9, 15, 8)
    store = make_store(lengths, shard_bytes=shard_bytes)
    assert len({info.shard for info in store.episodes}) == {1: 4, 50_000: 2, 2**28: 1}[shard_bytes]
    assert len(store) == 4
    assert store.frames == sum(lengths)
    for index, length in enumerate(lengths):
        assert_same(store[index], make_episode(index, length))
        store[index].validate()
        assert not store[index].state.flags.owndata
    store.verify()
    np.testing.assert_array_equal(store.offsets, np.cumsum([0, *lengths]))
    everything = np.concatenate([store[i].images["wrist"] for i in range(4)])
    rows = np.random.default_rng(0).permutation(store.frames)
    np.testing.assert_array_equal(store.images("wrist", rows), everything[rows])
    np.testing.assert_array_equal(store.concatenated("labels"), np.concatenate([store[i].labels() for i in range(4)]))
    assert store.instructions == ("lift green cube", "lift red cube")


def test_store_is_a_pure_function_of_its_episodes(make_store):
    first = make_store()
    content = {p.name: p.read_bytes() for p in first.path.rglob("*") if p.is_file()}
    second = make_store()
    assert second.digest == first.digest
    assert content == {p.name: p.read_bytes() for p in second.path.rglob("*") if p.is_file()}
    assert make_store((12, 9, 15, 9)).digest != first.digest


def test_optional_fields_get_shards_of_their_own(tmp_path, conventions, make_episode):
    episodes = [make_episode(0), make_episode(1, joints=None), make_episode(2, joints=None, expert_actions=None)]
    with EpisodeStoreWriter(tmp_path / "e", conventions) as writer:
        for episode in episodes:
            writer.add(episode)
    store = EpisodeStore.open(tmp_path / "e")
    for index, episode in enumerate(episodes):
        assert_same(store[index], episode)
    assert [(i.has_joints, i.has_expert) for i in store.episodes] == [(True, True), (False, True), (False, False)]
    np.testing.assert_array_equal(store.concatenated("labels")[-12:], episodes[2].actions)


def test_statistics_are_of_the_labels(make_store):
    store = make_store()
    labels = store.concatenated("labels")
    np.testing.assert_allclose(store.statistics.key("action").mean, labels.astype(np.float64).mean(0))
    assert store.statistics.key("state").count == store.frames


def test_quarantine_report(tmp_path, conventions, make_episode):
    with EpisodeStoreWriter(tmp_path / "e", conventions) as writer:
        writer.add(make_episode(0))
        writer.quarantine("task/7", "task", "too short")
    report = json.loads((tmp_path / "e" / "quarantine.json").read_text())
    assert report == [{"episode": "task/7", "task": "task", "reason": "too short"}]
    assert EpisodeStore.open(tmp_path / "e").rejected[0].reason == "too short"


def write_bad(path, conventions, *episodes):
    with EpisodeStoreWriter(path, conventions) as writer:
        for episode in episodes:
            writer.add(episode)


def test_misfits_leave_nothing(tmp_path, conventions, make_episode, make_store):
    good = make_episode(0)
    other_views = dataclasses.replace(good, images={"agentview": good.images["agentview"]})
    small = dataclasses.replace(good, images={v: f[:, :8] for v, f in good.images.items()})
    nan = dataclasses.replace(good, state=np.full_like(good.state, np.nan))
    other_robot = dataclasses.replace(good, episode_id="x", state=np.zeros((12, 14), np.float32))
    for message, episodes in {
        "is in the store already": (good, good),
        r"views \('agentview',\) where data.views": (other_views,),
        "are 8x32 where data.image_height": (small,),
        "state holds": (nan,),
        "state has 14 dimensions": (good, other_robot),
        "no episode was accepted": (),
    }.items():
        with pytest.raises(DataError, match=message):
            write_bad(tmp_path / "bad", conventions, *episodes)
        assert list(tmp_path.iterdir()) == []
    store = make_store()
    with pytest.raises(DataError):
        write_bad(store.path, conventions, good, good)
    assert EpisodeStore.open(store.path).digest == store.digest


def test_damage_is_named(make_store):
    store = make_store()
    state = store.path / "shard-00000" / "state.npy"
    content = state.read_bytes()
    state.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(DataError, match=r"state\.npy: content does not match"):
        EpisodeStore.open(store.path).verify()
    state.write_bytes(content[:-10])
    with pytest.raises(DataError, match=r"state\.npy: truncated, .* bytes .*; make the episodes again with `dvc repro"):
        EpisodeStore.open(store.path)
    state.unlink()
    with pytest.raises(DataError, match=r"state\.npy: missing"):
        EpisodeStore.open(store.path)


def test_conventions_say_what_differs(conventions):
    other = dataclasses.replace(conventions, image_rotation="none", simulator={"mujoco": "3.9.0"})
    assert conventions.difference(conventions) == []
    assert conventions.difference(other) == [
        "image_rotation: '180' against 'none'",
        "simulator: {'mujoco': '3.3.2'} against {'mujoco': '3.9.0'}",
    ]
    raw = json.loads(json.dumps(conventions.to_json()))
    assert Conventions.from_json(raw) == conventions
    del raw["gripper"]
    with pytest.raises(DataError, match=r"c\.json: conventions\.gripper is missing"):
        Conventions.from_json(raw, "c.json")
