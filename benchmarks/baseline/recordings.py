"""Demonstrations as mp4 files, and training samples decoded from them: the loader of a trainer that keeps no latents.

What the baseline schedule of ``benchmarks/train.py`` reads in every step, as the reference does: every sample opens a
file of each camera and takes its frames. The loader that the reference builds on runs an ffmpeg process for each file
and sample; where a choice had to be made here it is the one that is cheaper for the baseline schedule: libraries in
this process, H.264 instead of LeRobot's AV1, a key frame every other frame, pictures that hardly move, one read for a
clip, one converter of colours for a file's frames. Needs PyAV.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

EPISODES = 8
FPS = 20
HORIZON = 60  #: frames back that memories are drawn from
STRIDE = 3  #: frames between a clip's frames


@dataclass(frozen=True)
class Samples:
    """Which frames B samples are made of, counted within an episode."""

    episode: NDArray[np.int64]  #: (B,)
    memory: NDArray[np.int64]  #: (B, Fm) ascending, the current frame last
    clip: NDArray[np.int64]  #: (B, Fr) after the current frame


class Recordings:
    """Episodes of ``views`` cameras, a file for each.

    Args:
        views: cameras.
        size: height and width in pixels.
        memory: memory frames of a sample.
        clip: future frames of a sample.
    """

    def __init__(self, views: int, size: tuple[int, int], memory: int, clip: int, seed: int = 0) -> None:
        self.views, self.memory, self.clip = views, memory, clip
        self.frames = HORIZON + 30 + STRIDE * clip
        rng = np.random.default_rng(seed)
        self._folder = tempfile.TemporaryDirectory()  # removed with this object
        root = Path(self._folder.name)
        self._files = [[root / f"{episode}-{view}.mp4" for view in range(views)] for episode in range(EPISODES)]
        for file in (file for files in self._files for file in files):
            _write(file, _moving(rng, size, self.frames))

    def draw(self, size: int, rng: np.random.Generator) -> Samples:
        """Random samples; memories from the last :data:`HORIZON` frames, sorted."""
        now = rng.integers(HORIZON, self.frames - STRIDE * self.clip, size)
        earlier = [np.sort(rng.choice(HORIZON, self.memory - 1, replace=False)) - HORIZON + step for step in now]
        memory = np.concatenate([np.array(earlier).reshape(size, -1), now[:, None]], axis=1)
        clip = now[:, None] + STRIDE * np.arange(1, self.clip + 1)
        return Samples(rng.integers(0, EPISODES, size), memory, clip)

    def read(self, samples: Samples) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Memory (B, V, Fm, H, W, 3) and clip (B, V, Fr, H, W, 3) of samples, decoded now."""
        memories, clips = [], []
        for episode, memory, clip in zip(samples.episode, samples.memory, samples.clip, strict=True):
            groups = [[row] for row in memory] + [list(clip)]
            views = [np.concatenate(_decoded(file, groups)) for file in self._files[episode]]
            memories.append(np.stack([view[: self.memory] for view in views]))
            clips.append(np.stack([view[self.memory :] for view in views]))
        return np.stack(memories), np.stack(clips)


def _moving(rng: np.random.Generator, size: tuple[int, int], frames: int) -> NDArray[np.uint8]:
    """Pictures (frames, H, W, 3) of a coarse pattern with a square that moves one pixel a frame."""
    height, width = size
    pattern = rng.integers(0, 256, (height // 8, width // 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    pictures = np.repeat(pattern[None], frames, 0)
    side, top = height // 4, int(rng.integers(0, height - height // 4))
    for index, picture in enumerate(pictures):
        left = index % (width - side)
        picture[top : top + side, left : left + side] = 255
    return pictures


def _write(file: Path, pictures: NDArray[np.uint8]) -> None:
    with av.open(str(file), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"crf": "23", "g": "2", "threads": "1"})
        stream.height, stream.width, stream.pix_fmt = *pictures.shape[1:3], "yuv420p"
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def _decoded(file: Path, groups: list[list[int]]) -> list[NDArray[np.uint8]]:
    """Frames (n, H, W, 3) of each group of ascending rows, which is sought once."""
    result, converter = [], VideoReformatter()
    with av.open(str(file)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        for rows in groups:
            found = {}
            container.seek(int(rows[0] / FPS / stream.time_base), stream=stream)
            for frame in container.decode(stream):
                number = round(float(frame.pts * stream.time_base) * FPS)
                if number in rows:
                    found[number] = converter.reformat(frame, format="rgb24").to_ndarray()
                if number >= rows[-1]:
                    break
            result.append(np.stack([found[row] for row in rows]))
    return result
