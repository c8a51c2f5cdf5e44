"""Videos of datasets: too few or too many frames, turned and mirrored ones, colours, and seeks that land behind."""

import struct
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.reformatter import Colorspace

from tests.data.sources.datasets import lerobot_dataset, libero_episodes, write_video
from wav.data.sources.frames import preparation
from wav.data.sources.videos import Clip, decode_video
from wav.data.store import EpisodeStore
from wav.errors import DataError
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


AS_IS = preparation("none", "none", False, 32, 32)
ONE, UNIT = 1 << 16, 1 << 30


def decode(path: Path, count: int = 4, start: float = 0.0) -> np.ndarray:
    return decode_video(Clip(path, start, count, 20, (32, 32), alone=False), AS_IS)


@pytest.mark.parametrize(
    ("matrix", "shown"),
    [
        ((-1, 0, 0, 1), lambda a: a[:, ::-1]),
        ((1, 0, 0, -1), lambda a: a[::-1]),
        ((-1, 0, 0, -1), lambda a: a[::-1, ::-1]),
        ((0, 1, -1, 0), lambda a: np.rot90(a, -1)),
        ((0, -1, 1, 0), lambda a: np.rot90(a)),
        ((1, 1, -1, 1), None),
    ],
)
def test_pictures_are_as_the_container_shows_them(tmp_path, matrix, shown):
    """PyAV's frame.rotation does not tell: it is -180 for a mirrored picture and 0 for one upside down."""
    stored = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
    path = tmp_path / "a.mp4"
    write_video(path, [stored], 20)
    content = bytearray(path.read_bytes())
    place = content.find(b"tkhd") + 44
    a, b, c, d = (ONE * value for value in matrix)
    content[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, UNIT)
    path.write_bytes(content)
    if shown is None:
        with pytest.raises(DataError, match="display matrix turns the picture by other than quarter turns"):
            decode(path)
        return
    np.testing.assert_array_equal(decode(path), [shown(frame) for frame in stored])


def grey(path: Path, codec: str, options: dict[str, str], container: dict[str, str] | None = None) -> None:
    """A video of 64 frames, each of its own grey."""
    with av.open(str(path), "w", options=container or {}) as file:
        stream = file.add_stream(codec, rate=20, options=options)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for number in range(64):
            frame = np.full((32, 32, 3), 20 + 3 * number, np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())


OPEN_GOP = "keyint=16:min-keyint=16:scenecut=0:open-gop=1:bframes=3:b-adapt=0"


@pytest.mark.parametrize(
    ("codec", "options", "container"),
    [
        ("libx264", {"x264-params": OPEN_GOP}, {}),
        ("libx265", {"x265-params": f"{OPEN_GOP}:log-level=none"}, {}),
        ("libx264", {"x264-params": "keyint=16:bframes=3:b-adapt=0"}, {"movflags": "frag_keyframe+empty_moov"}),
    ],
)
def test_seeks_that_land_behind_their_frame_are_made_again(tmp_path, codec, options, container):
    """Key frames that come before frames shown earlier, and B-frames without an edit list."""
    path = tmp_path / "a.mp4"
    grey(path, codec, options, container)
    with av.open(str(path)) as file:
        frames = [(frame.time, frame.to_ndarray(format="rgb24")) for frame in file.decode(video=0)]
    for first in [*range(40, 60), *range(20, 0, -1)]:
        wanted = [picture for _, picture in frames[first : first + 4]]
        np.testing.assert_array_equal(decode(path, 4, frames[first][0]), wanted)


@pytest.mark.parametrize("tagged", [False, True])
def test_colours_follow_the_tags(tmp_path, tagged):
    """BT.601 where the stream says nothing, else what it says; PyAV below 17 does not look."""
    path, colour = tmp_path / "a.mp4", np.full((32, 32, 3), (200, 60, 20), np.uint8)
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=20, options={"crf": "1"})
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        stream.codec_context.colorspace = Colorspace.ITU709 if tagged else 2
        for _ in range(4):
            frame = av.VideoFrame.from_ndarray(colour, format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709 if tagged else Colorspace.ITU601)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    assert np.abs(decode(path).astype(int) - colour).max() <= 4
