"""Files that stay open between episodes: how often, how many, and that it changes no frame."""

import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.data.sources.datasets import TASKS, lerobot_dataset, libero_episodes, write_video
from wav.data.sources import lerobot_episodes, open_source, videos
from wav.data.sources.frames import preparation
from wav.data.sources.open_files import _CACHES, LIMIT, files_closed
from wav.data.sources.videos import Clip, VideoFile, decode_video
from wav.data.store import EpisodeStore
from wav.errors import DataError
from wav.ingest import ingest

FPS = 20
AS_IS = preparation("180", "180", False, 32, 32)


def open_files() -> int:
    return sum(cache.cache_info().currsize for cache in _CACHES)


@pytest.fixture
def opened(monkeypatch) -> list[str]:
    """Names of the files that are opened."""
    names: list[str] = []
    open_video, parquet = VideoFile._open, lerobot_episodes.tables.dataset
    monkeypatch.setattr(VideoFile, "_open", lambda self: (names.append(self.path.name), open_video(self))[1])
    monkeypatch.setattr(
        lerobot_episodes.tables,
        "dataset",
        lambda path, **options: (names.append(path.name), parquet(path, **options))[1],
    )
    return names


def test_each_file_is_opened_once_however_many_episodes_it_has(data, lerobot_settings, tmp_path, opened, monkeypatch):
    seeks = []
    seek = VideoFile._seek
    monkeypatch.setattr(VideoFile, "_seek", lambda self, start: (seeks.append(start), seek(self, start))[1])
    lerobot_dataset(Path(lerobot_settings.path), libero_episodes(9), "v3.0", fps=FPS)
    source = open_source(data, lerobot_settings)
    opened.clear()  # settling the gripper reads some rows
    assert ingest(data, lerobot_settings, tmp_path / "out", workers=1, source=source).episodes == 9
    assert sorted(opened) == ["file-000.mp4", "file-000.mp4", "file-000.parquet"]
    assert seeks == [0, 0]  # the episodes lie one behind the other
    assert open_files() == 0


def test_files_of_one_episode_each_do_not_pile_up(data, lerobot_settings, tmp_path, monkeypatch):
    most = [0]

    def watch(clip, prepare):
        frames = decode_video(clip, prepare)
        most[0] = max(most[0], open_files())
        return frames

    monkeypatch.setattr("wav.data.sources.lerobot_episodes.decode_video", watch)
    lerobot_dataset(Path(lerobot_settings.path), libero_episodes(LIMIT + 4), "v2.1", fps=FPS)
    ingest(data, lerobot_settings, tmp_path / "out", workers=1)
    assert most[0] == 2 * LIMIT  # videos and parquet files


@pytest.mark.integration
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("tasks", [(), TASKS[1:]])  # of one task: every other episode, each sought
def test_jobs_of_one_file_in_any_process_read_the_same(data, lerobot_settings, tmp_path, monkeypatch, workers, tasks):
    from wav.shards import grouped

    monkeypatch.setattr("wav.data.sources.staging.grouped", lambda sizes: grouped(sizes, 1))
    episodes = libero_episodes(6)
    lerobot_dataset(Path(lerobot_settings.path), episodes, "v3.0", fps=FPS)
    ingest(data.model_copy(update={"tasks": tasks}), lerobot_settings, tmp_path / "out", workers=workers)
    store, wanted = EpisodeStore.open(tmp_path / "out"), episodes[1::2] if tasks else episodes
    assert len(store) == len(wanted)
    for number, episode in enumerate(wanted):
        np.testing.assert_array_equal(store[number].images["wrist"], episode["images"]["observation.images.image2"])


def test_clips_in_any_order_are_those_of_a_fresh_file(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (60, 32, 32, 3), np.uint8)
    path = tmp_path / "a.mp4"
    write_video(path, [frames], FPS)
    with files_closed():
        for start, count in (
            (0, 7),
            (7, 5),
            (12, 1),
            (40, 9),
            (13, 20),
            (0, 3),
            (3, 4),
            (6, 4),
            (6, 4),
            (58, 2),
            (1, 2),
        ):
            clip = Clip(path, start / FPS, count, FPS, (32, 32), alone=False)
            np.testing.assert_array_equal(decode_video(clip, AS_IS), frames[start : start + count])
        with pytest.raises(DataError, match="truncated, frame 5 of 9"):
            decode_video(Clip(path, 55 / FPS, 9, FPS, (32, 32), alone=False), AS_IS)
        with pytest.raises(DataError, match="32x32 where the metadata says 16x16"):
            decode_video(Clip(path, 0.0, 9, FPS, (16, 16), alone=False), AS_IS)
        again = decode_video(Clip(path, 9 / FPS, 9, FPS, (32, 32), alone=False), AS_IS)
        np.testing.assert_array_equal(again, frames[9:18])


def test_a_video_replaced_between_episodes_is_noticed(tmp_path):
    first, second = np.random.default_rng(0).integers(0, 256, (2, 12, 32, 32, 3), np.uint8)
    path = tmp_path / "a.mp4"
    write_video(path, [first], FPS)
    with files_closed():
        decode_video(Clip(path, 0.0, 4, FPS, None, alone=False), AS_IS)
        write_video(tmp_path / "b.mp4", [second], FPS)
        os.replace(tmp_path / "b.mp4", path)
        frames = decode_video(Clip(path, 4 / FPS, 4, FPS, None, alone=False), AS_IS)
    np.testing.assert_array_equal(frames, second[4:8])


@pytest.mark.parametrize("statistics", [True, False])
@pytest.mark.parametrize("rows", [5, 1000])
def test_row_groups_need_not_be_episodes(data, lerobot_settings, tmp_path, rows, statistics):
    root = Path(lerobot_settings.path)
    episodes = libero_episodes(5)
    lerobot_dataset(root, episodes, "v3.0", fps=FPS, images=True)
    path = root / "data/chunk-000/file-000.parquet"
    pq.write_table(pq.read_table(path), path, row_group_size=rows, write_statistics=statistics)
    ingest(data, lerobot_settings, tmp_path / "out", workers=1)
    store = EpisodeStore.open(tmp_path / "out")
    assert len(store) == 5
    for number, episode in enumerate(episodes):
        np.testing.assert_array_equal(store[number].state, episode["state"].astype(np.float32))
        np.testing.assert_array_equal(store[number].images["wrist"], episode["images"]["observation.images.image2"])


def test_a_time_between_two_frames_is_named(tmp_path):
    assert videos.MAX_OFFSET < 0.5
    clip = Clip(tmp_path / "a.mp4", 1.0, 4, FPS, None, alone=False)
    assert [clip.index(1.0 + step / FPS) for step in (-1, 0, 3, 4.4)] == [-1, 0, 3, 4]
    with pytest.raises(DataError, match=r"a\.mp4: frame at 1\.070 s lies between"):
        clip.index(1.07)
