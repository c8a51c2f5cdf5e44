"""Videos of LeRobot datasets that hold fewer or more frames than their episodes' tables have rows."""

from pathlib import Path

import pytest

from tests.data.sources.datasets import lerobot_dataset, libero_episodes, write_video
from wav.data.store import EpisodeStore
from wav.ingest import ingest


@pytest.fixture
def root(lerobot_settings) -> Path:
    return Path(lerobot_settings.path)


def run(data, settings, out) -> EpisodeStore:
    ingest(data, settings, out, workers=1)
    return EpisodeStore.open(out)


def test_short_video_names_the_first_missing_frame(data, lerobot_settings, root, tmp_path):
    episodes = libero_episodes(4)
    lerobot_dataset(root, episodes, "v3.0")
    clips = [e["images"]["observation.images.image"] for e in episodes]
    clips[3] = clips[3][:5]
    write_video(root / "videos/observation.images.image/chunk-000/file-000.mp4", clips, 20)
    store = run(data, lerobot_settings, tmp_path / "out")
    (rejection,) = store.rejected
    assert rejection.episode.endswith("episode_000003")
    assert "truncated, frame 5 of 12" in rejection.reason


def test_a_video_longer_than_its_table_is_quarantined(data, lerobot_settings, root, tmp_path):
    episodes = libero_episodes(4)
    lerobot_dataset(root, episodes, "v2.1")
    clip = episodes[1]["images"]["observation.images.image2"]
    path = root / "videos/chunk-000/observation.images.image2/episode_000001.mp4"
    write_video(path, [clip, clip[:3]], 20)
    store = run(data, lerobot_settings, tmp_path / "out")
    (rejection,) = store.rejected
    assert rejection.episode.endswith("episode_000001")
    assert f"{path}: holds 15 frames where the episode's table has 12 rows" in rejection.reason
    assert "download its video and table again" in rejection.reason
    assert len(store) == 3
