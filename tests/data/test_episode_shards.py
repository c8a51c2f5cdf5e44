"""Stores whose work was done in shards equal those made at once, and a run that was broken off goes on."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest

from wav.config import EncodeSettings, LabelRewardsSettings
from wav.data.encode import build_text_encoder, encode_store, fit_codec
from wav.data.store import EpisodeStore
from wav.data.writer import EpisodeStoreWriter
from wav.errors import DataError, ServiceError
from wav.rewards.label import label_store
from wav.shards import made, staging_folder


class Elsewhere:
    """A mapper that runs jobs in a random order, at most ``limit`` of them."""

    def __init__(self, limit: int = 100) -> None:
        self.limit, self.ran = limit, 0

    def __call__(self, function, jobs, workers):
        for index in np.random.default_rng(0).permutation(len(jobs)):
            if self.ran == self.limit:
                raise KeyboardInterrupt
            self.ran += 1
            try:
                yield int(index), function(*jobs[index])
            except DataError as error:
                yield int(index), error


@pytest.fixture
def store(make_store):
    """Four episodes in as many shards."""
    return make_store(shard_bytes=1)


@pytest.fixture
def stages(store, data, tmp_path: Path):
    """Functions (out, run) that label and encode the store."""
    settings = EncodeSettings(patch=8, temporal=4, channels=12, fit_frames=60, text_dim=16)
    parts = fit_codec(store, data, settings), build_text_encoder(settings, data, store.instructions, tmp_path / "t5")

    def encode(out, run=None, episodes=store):
        encode_store(episodes, *parts, data, out, run=run)

    def label(out, run=None, episodes=store):
        label_store(episodes, LabelRewardsSettings(), 6, out, run=run)

    return {"rewards": label, "latents": encode}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["rewards", "latents"])
def test_shards_make_the_same_bytes_and_are_made_once(stages, name, tmp_path: Path) -> None:
    make, out = stages[name], tmp_path / "elsewhere"
    make(tmp_path / "here")
    with pytest.raises(KeyboardInterrupt):
        make(out, Elsewhere(limit=3))
    assert not out.exists()
    assert len(list(staging_folder(out).iterdir())) == 3
    (staging_folder(out) / ".of-a-killed-process.tmp-1").mkdir()
    rest = Elsewhere()
    make(out, rest)
    assert rest.ran == 1
    assert contents(out) == contents(tmp_path / "here")
    assert {path.name for path in tmp_path.iterdir()} == {"episodes", "t5", "here", "elsewhere"}


def test_worker_that_sees_another_store_is_an_error(store, make_episode, conventions, tmp_path: Path) -> None:
    def changes_first(function, jobs, workers):
        with EpisodeStoreWriter(store.path, conventions) as writer:
            writer.add(make_episode(9, 9))
        return Elsewhere()(function, jobs, workers)

    with pytest.raises(DataError, match="let all workers see one store"):
        label_store(store, LabelRewardsSettings(), 6, tmp_path / "rewards", run=changes_first)


def test_result_that_is_not_here_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ServiceError, match="let all workers share this folder's disk"):
        list(made(lambda *_: None, {"key": ()}, tmp_path / "staging", Elsewhere()))


@pytest.mark.parametrize("name", ["rewards", "latents"])
def test_what_other_versions_of_libraries_made_is_made_again(stages, name, tmp_path: Path, monkeypatch) -> None:
    make, out = stages[name], tmp_path / name
    make(out)
    monkeypatch.setattr("wav.source_code.version", lambda library: "0" if library == "torch" else version(library))
    run = Elsewhere()
    make(out, run)
    assert run.ran == 4


@pytest.mark.parametrize("name", ["rewards", "latents"])
def test_appended_episodes_are_the_only_ones_that_cost(
    stages, name, store, make_episode, conventions, tmp_path: Path
) -> None:
    """What was there is neither written nor made again; what is damaged is."""
    make, out = stages[name], tmp_path / name
    make(out)
    before = {path: path.stat().st_ino for root in (store.path, out) for path in root.glob("shard-*/*")}
    with EpisodeStoreWriter(store.path, conventions) as writer:
        writer.adopt(EpisodeStore.open(store.path))
        writer.add(make_episode(4, 10))
    grown = EpisodeStore.open(store.path)
    assert (len(grown), grown[4].episode_id) == (5, make_episode(4).episode_id)
    run = Elsewhere()
    make(out, run, grown)
    assert run.ran == 1
    assert {path: path.stat().st_ino for path in before} == before
    make(tmp_path / "anew", episodes=grown)
    assert contents(out) == contents(tmp_path / "anew")
    damaged = next((out / "shard-00001").iterdir())
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    again = Elsewhere()
    make(out, again, grown)
    assert again.ran == 1
    assert contents(out) == contents(tmp_path / "anew")
