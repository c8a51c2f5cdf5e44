"""Stores whose shards lie in an object store: only what is read comes, damage does not, and they grow."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.fake_s3 import FakeS3
from wav.config import EncodeSettings, LabelRewardsSettings
from wav.data.encode import build_text_encoder, encode_store, fit_codec
from wav.data.latents import LatentStore
from wav.data.reward_store import RewardStore
from wav.data.store import EpisodeStore
from wav.data.windows import WindowDataset
from wav.data.writer import EpisodeStoreWriter
from wav.errors import StorageError
from wav.io.files import ORIGIN
from wav.io.storage import open_store
from wav.io.storage.streaming import put, stream
from wav.rewards.label import label_store

NAMES = ("episodes", "rewards", "latents")


@pytest.fixture
def folders(make_store, data, tmp_path: Path) -> Path:
    """Episodes in four shards, their rewards and latents."""
    store = make_store(shard_bytes=1)
    settings = EncodeSettings(patch=8, channels=12, fit_frames=60, text_dim=16)
    text = build_text_encoder(settings, data, store.instructions, tmp_path / "t5")
    label_store(store, LabelRewardsSettings(), 6, tmp_path / "rewards")
    encode_store(store, fit_codec(store, data, settings), text, data, tmp_path / "latents")
    return tmp_path


@pytest.fixture(params=["folder", "S3"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, str]]:
    """Address and endpoint of an object store."""
    if request.param == "folder":
        yield (tmp_path / "store").as_uri(), ""
        return
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "of-a-test")
    with FakeS3() as server:
        yield "s3://bucket/data", server.endpoint


def windows(root: Path, data) -> WindowDataset:
    episodes = EpisodeStore.open(root / "episodes")
    latents, rewards = LatentStore.open(root / "latents", episodes), RewardStore.open(root / "rewards", episodes)
    return WindowDataset(episodes, latents, rewards, data, "train", 0.0)


def test_training_reads_its_shards_and_no_others(folders: Path, place, data, tmp_path: Path) -> None:
    (url, endpoint), near = place, tmp_path / "near"
    for name in NAMES:
        put(open_store(url, endpoint), folders / name, name)
        stream(url, name, near / name, endpoint)
    whole, streamed = windows(folders, data), windows(near, data)
    assert not list(near.rglob("shard-*"))
    streamed.expect(np.array([13]))
    first = {path.name for path in near.rglob("shard-00001/*.npy")}
    assert first == {"image.npy", "clip.npy", "values.npy", "state.npy", "expert_actions.npy"}
    rows = np.arange(12, 21)
    batches = [each.batch(rows, np.random.default_rng(0)) for each in (whole, streamed)]
    for one, other in zip(*(vars(batch).values() for batch in batches), strict=True):
        np.testing.assert_array_equal(one, other)
    assert {path.name for path in near.rglob("shard-*")} == {"shard-00001"}
    LatentStore.open(near / "latents").verify()


def test_a_store_that_grew_is_sent_and_fetched_in_part(
    folders: Path, place, make_episode, conventions, tmp_path: Path
) -> None:
    (url, endpoint), near = place, tmp_path / "near"
    put(open_store(url, endpoint), folders / "episodes", "episodes")
    stream(url, "episodes", near, endpoint)
    before = EpisodeStore.open(near)
    before.rows("state", np.arange(12))
    with EpisodeStoreWriter(folders / "episodes", conventions) as writer:
        writer.adopt(EpisodeStore.open(folders / "episodes"))
        writer.add(make_episode(4, 10))
    line = put(open_store(url, endpoint), folders / "episodes", "episodes")
    assert "33 files, 8 of them new" in line  # six of a shard, table, statistics; the quarantine is as it was
    stream(url, "episodes", near, endpoint)
    assert [path.name for path in near.glob("shard-*/*.npy")] == ["state.npy"]
    after = EpisodeStore.open(near)
    assert (len(after), after.digest) == (5, EpisodeStore.open(folders / "episodes").digest)
    np.testing.assert_array_equal(before.rows("state", np.arange(44)), after.rows("state", np.arange(44)))


def test_what_is_wrong_is_said(folders: Path, data, tmp_path: Path) -> None:
    url, near = (tmp_path / "store").as_uri(), tmp_path / "near"
    with pytest.raises(StorageError, match="is there already, and whole"):
        stream(url, "episodes", folders / "episodes")
    with pytest.raises(StorageError):
        stream(url, "episodes", near)
    put(open_store(url), folders / "episodes", "episodes")
    stream(url, "episodes", near)
    for path in (tmp_path / "store" / "stores" / "sha256").iterdir():
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    store = EpisodeStore.open(near)
    with pytest.raises(StorageError, match="it is damaged"):
        store.rows("state", np.arange(3))
    assert not list(near.rglob("state.npy"))
    (near / ORIGIN).write_text("{}")
    with pytest.raises(ValueError, match=r"lacks 'url'.*wav storage stream"):
        EpisodeStore.open(near)
