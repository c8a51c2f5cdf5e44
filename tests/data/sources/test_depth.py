"""Depth cameras of LeRobot datasets, read as grey pictures where the settings name them as depth."""

import io
import json
import math
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.data.sources.datasets import changed, lerobot_dataset, libero_episodes, write_depth_video
from wav.data.sources.options import LeRobotOptions
from wav.data.store import EpisodeStore
from wav.errors import ConfigError, DataError
from wav.ingest import ingest

CAMERA = "observation.images.image"
SCALE = {"video.depth_min": 0.01, "video.depth_max": 10.0, "video.shift": 3.5, "video.use_log": True}
AS_DEPTH = {"depth": {"agentview": (0.5, 2.0)}}
EPISODES, STEPS = 2, 12


@pytest.fixture
def root(lerobot_settings) -> Path:
    return Path(lerobot_settings.path)


@pytest.fixture
def metres() -> np.ndarray:
    """What the camera measured, (frames of all episodes, 32, 32); a tenth of it nothing."""
    rng = np.random.default_rng(0)
    depth = rng.uniform(0.2, 3.0, (EPISODES * STEPS, 32, 32))
    return np.where(rng.random(depth.shape) < 0.1, 0.0, depth)


@pytest.fixture
def read(data, lerobot_settings, tmp_path):
    def run(**changes) -> EpisodeStore:
        ingest(data, changed(lerobot_settings, **changes), tmp_path / "out", workers=1)
        return EpisodeStore.open(tmp_path / "out")

    return run


def describe(root: Path, **info) -> None:
    """Make one camera a depth camera of the metadata."""
    path = root / "meta/info.json"
    whole = json.loads(path.read_text())
    whole["features"][CAMERA] |= {"shape": [32, 32, 1], "info": {"is_depth_map": True, **info}}
    path.write_text(json.dumps(whole))


def video(root: Path, metres: np.ndarray, low=0.01, high=10.0, shift=3.5, logarithmic=True) -> None:
    """A dataset with such a camera, its codes computed as LeRobot's quantize_depth computes them."""
    lerobot_dataset(root, libero_episodes(EPISODES, STEPS), "v3.0")
    scale = np.log if logarithmic else np.asarray
    add = shift if logarithmic else 0.0
    share = (scale(metres + add) - scale(low + add)) / (scale(high + add) - scale(low + add))
    codes = np.rint(4095 * share).clip(0, 4095)
    write_depth_video(root / f"videos/{CAMERA}/chunk-000/file-000.mp4", codes, 20)
    describe(root, **dict(zip(SCALE, (low, high, shift, logarithmic), strict=True)))


def stored(store: EpisodeStore) -> np.ndarray:
    """(frames, 32, 32, 3) of the view, in the dataset's order."""
    order = sorted(range(len(store)), key=lambda i: int(store.episodes[i].source.rpartition("#")[2]))
    return np.concatenate([store[i].images["agentview"] for i in order]).astype(int)


def expected(metres: np.ndarray) -> np.ndarray:
    """255 at 0.5 m and nearer, 0 at 2 m and farther and where nothing was measured."""
    grey = np.interp(metres, [0.5, 2.0], [255.0, 0.0])
    return np.where(metres == 0, 0, grey)


@pytest.mark.parametrize("logarithmic", [True, False])
def test_a_depth_video_becomes_grey_pictures(root, read, metres, logarithmic):
    """A code is at most 1.7 mm (or 1.2 mm, linear) from what was measured: 0.3 of the 255 grey levels of 1.5 m."""
    video(root, metres, logarithmic=logarithmic)
    seen = stored(read(**AS_DEPTH))
    assert np.array_equal(seen[..., 0], seen[..., 1])
    assert np.array_equal(seen[..., 0], seen[..., 2])
    assert np.abs(seen[..., 0] - expected(metres)).max() <= 0.5 + 0.3
    assert json.loads((root.parent / "out/source.json").read_text())["depth"] == {"agentview": [0.5, 2.0]}


@pytest.mark.parametrize("unit", ["metres", "millimetres"])
def test_depth_images_become_grey_pictures(root, read, metres, unit):
    """Without videos LeRobot keeps what it was given: float32 metres, or 16-bit millimetres, as TIFF."""
    lerobot_dataset(root, libero_episodes(EPISODES, STEPS), "v3.0", images=True)
    describe(root)
    kept = np.rint(1000 * metres).astype(np.uint16) if unit == "millimetres" else metres.astype(np.float32)
    path = root / "data/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    rows = [{"bytes": tiff(frame), "path": "0.tiff"} for frame in kept]
    place = table.schema.get_field_index(CAMERA)
    pq.write_table(table.set_column(place, CAMERA, [rows]), path)
    assert np.abs(stored(read(**AS_DEPTH))[..., 0] - expected(metres)).max() <= 0.5 + 0.1


def tiff(picture: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "TIFF", compression="raw")
    return buffer.getvalue()


def test_one_channel_is_read_as_depth_where_the_refusal_says_so(root, read, metres):
    video(root, metres)
    with pytest.raises(ConfigError, match=r"one channel .* ingest\.lerobot\.depth\.agentview: \[0\.1, 2\.0\]"):
        read()
    assert len(read(depth={"agentview": (0.1, 2.0)})) == EPISODES


def test_a_scale_that_is_not_stated_is_not_guessed(root, read, metres):
    """LeRobot reads with its defaults then, whatever was recorded with."""
    video(root, metres)
    describe(root, **SCALE | {"video.depth_max": None})
    with pytest.raises(DataError, match=r"video\.depth_max.*LeRobot's defaults: 0\.01, 10\.0, 3\.5, true"):
        read(**AS_DEPTH)
    describe(root, **SCALE)
    assert len(read(**AS_DEPTH)) == EPISODES


def test_colours_are_no_depth(root, read):
    lerobot_dataset(root, libero_episodes(EPISODES, STEPS), "v3.0")
    with pytest.raises(ConfigError, match=r"records colours; leave the view out of ingest\.lerobot\.depth"):
        read(**AS_DEPTH)
    assert len(read()) == EPISODES
    describe(root, **SCALE)
    with pytest.raises(DataError, match=r"frames are gbrp where .* gray12le; .* out of ingest\.lerobot\.depth"):
        read(**AS_DEPTH)
    with pytest.raises(ConfigError, match=r"'front' is none of data\.views \(agentview, wrist\)"):
        read(depth={"front": (0.5, 2.0)})


@pytest.mark.parametrize("bounds", [(2.0, 0.5), (1.0, 1.0), (-0.1, 1.0), (0.1, math.nan), (0.1,)])
def test_bounds_are_near_and_far(bounds):
    with pytest.raises(ValueError, match="depth"):
        LeRobotOptions(depth={"agentview": bounds})
