"""LeRobot v3.0 as large datasets come: several files in a chunk, several chunks, several files of metadata."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.sources.datasets import lerobot_dataset, libero_episodes, write_video
from wav.data.store import EpisodeStore
from wav.errors import ConfigError
from wav.ingest import ingest

FPS = 20


def scattered(root: Path, episodes: list[dict]) -> None:
    """Spread a v3.0 dataset's data, videos and metadata over files and chunks that do not go together."""
    lerobot_dataset(root, episodes, "v3.0", fps=FPS)
    table = pq.read_table(root / "data/chunk-000/file-000.parquet")
    meta = pq.read_table(root / "meta/episodes/chunk-000/file-000.parquet").to_pylist()
    keys = list(episodes[0]["images"])
    data_at, video_at = [(0, 0), (0, 1), (0, 1), (1, 0)], [(0, 0), (0, 0), (0, 1), (1, 0)]
    clips: dict[tuple[str, int, int], list[np.ndarray]] = {}
    for row, episode, data, video in zip(meta, episodes, data_at, video_at, strict=True):
        row["data/chunk_index"], row["data/file_index"] = data
        for key in keys:
            into = clips.setdefault((key, *video), [])
            row[f"videos/{key}/chunk_index"], row[f"videos/{key}/file_index"] = video
            start = sum(len(clip) for clip in into)
            row[f"videos/{key}/from_timestamp"] = start / FPS
            row[f"videos/{key}/to_timestamp"] = (start + len(episode["images"][key])) / FPS
            into.append(episode["images"][key])
    for place in sorted(set(data_at)):
        wanted = [row["episode_index"] for row, at in zip(meta, data_at, strict=True) if at == place]
        path = root / f"data/chunk-{place[0]:03d}/file-{place[1]:03d}.parquet"
        path.parent.mkdir(exist_ok=True)
        part = table.filter(pa.compute.is_in(table["episode_index"], pa.array(wanted)))
        pq.write_table(part.take(np.random.default_rng(0).permutation(len(part))), path)  # rows in no order
    for (key, chunk, file), parts in clips.items():
        write_video(root / f"videos/{key}/chunk-{chunk:03d}/file-{file:03d}.mp4", parts, FPS)
    folder = root / "meta/episodes"
    for name, rows in (
        ("chunk-000/file-000", meta[2:]),
        ("chunk-000/file-001", meta[:1]),
        ("chunk-001/file-000", meta[1:2]),
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")


def test_pictures_that_evaluation_would_not_draw_are_refused(data, lerobot_settings, tmp_path):
    lerobot_dataset(Path(lerobot_settings.path), libero_episodes(), "v2.1")
    fast = data.model_copy(update={"render": "fast"})
    with pytest.raises(ConfigError, match=r"data\.render = 'fast': .* rendered with 'full'.*set data\.render: full"):
        ingest(fast, lerobot_settings, tmp_path / "out", workers=1)
    real = fast.model_copy(update={"suites": ("my_robot",)})  # nothing is drawn for a robot without simulator
    assert ingest(real, lerobot_settings, tmp_path / "out", workers=1).episodes == 3


def test_episodes_are_found_wherever_they_lie(data, lerobot_settings, tmp_path):
    plain = tmp_path / "plain"
    lerobot_dataset(plain, libero_episodes(4), "v3.0", fps=FPS)
    ingest(data, lerobot_settings.model_copy(update={"path": str(plain)}), tmp_path / "one", workers=1)
    scattered(Path(lerobot_settings.path), libero_episodes(4))
    ingest(data, lerobot_settings, tmp_path / "two", workers=2)
    one, two = EpisodeStore.open(tmp_path / "one"), EpisodeStore.open(tmp_path / "two")
    assert len(two) == 4
    written = [{k: v for k, v in store.file_digests().items() if k != "source.json"} for store in (one, two)]
    assert written[0] == written[1]  # source.json names the path
