"""Videos of datasets: the frames of one episode at a time, decoded in the order they lie in, each file opened once.

A file stays open from one episode to the next (:mod:`wav.data.sources.open_files`), and an episode that begins where
the last one ended is decoded on from there; any other is sought. Frames are turned and mirrored as the container says
that they are shown. Colours follow the stream's tags, BT.601 where there are none; PyAV does so since 17, not before.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

from wav.data.sources.damage import unreadable
from wav.data.sources.depth import Depth
from wav.data.sources.frames import Images, Preparation, check_frame
from wav.data.sources.open_files import close_files, stays_open
from wav.errors import DataError

MAX_OFFSET = 0.25
"""Share of a frame's time by which a video's time stamps may miss the metadata's: at a half, which frame is a guess."""


Orientation = tuple[bool, bool, bool]
"""Whether rows and columns change places, then whether rows and whether columns are reversed."""
UPRIGHT: Orientation = (False, False, False)


@dataclass(frozen=True)
class Clip:
    """An episode's part of a video."""

    path: Path
    start: float
    """Time (s) of its first frame."""
    count: int
    """Frames."""
    fps: float
    size: tuple[int, int] | None
    """(H, W) that the frames must have; None: any."""
    alone: bool
    """The file should hold these frames and no others; otherwise those around them are other episodes', or nobody's."""
    depth: Depth | None = None
    """Of a depth camera: how its frames become pictures."""

    def place(self, seconds: float) -> float:
        """Where a frame of that time lies, counted in frames from the first."""
        return (seconds - self.start) * self.fps

    def index(self, seconds: float) -> int:
        """The same as a whole number; DataError for a frame inside the clip that lies between two places."""
        place = self.place(seconds)
        index = round(place)
        if abs(place - index) > MAX_OFFSET and -1 < place < self.count:
            raise DataError(
                f"{self.path}: frame at {seconds:.3f} s lies between two frames of an episode that begins at "
                f"{self.start:.3f} s with fps = {self.fps:g}; correct from_timestamp or fps in the metadata"
            )
        return index


class VideoFile:
    """An open video; remembers the frame it stopped at."""

    def __init__(self, path: Path) -> None:
        self.path, self._converter = path, VideoReformatter()
        self._open()

    def _open(self) -> None:
        self._container = av.open(str(self.path))
        if not self._container.streams.video:
            raise DataError(f"{self.path}: holds no video stream; download the file again")
        self._stream = self._container.streams.video[0]
        self._frames: Iterator[av.VideoFrame] = self._container.decode(self._stream)
        self._next: av.VideoFrame | None = None
        self._begun = False
        self._orientation: Orientation | None = None
        self.ended = False
        """All frames were read."""

    def frames(self, clip: Clip) -> Iterator[tuple[float, av.VideoFrame]]:
        """(time in s, frame) from at or before the clip's first frame on; the one stopped at comes again next time."""
        waiting = self._next is not None and abs(clip.place(self._next.time)) <= MAX_OFFSET
        first = [self._next] if waiting else self._sought(clip)
        self._begun = True
        for frame in chain(first, self._frames):
            if frame.time is not None:
                self._next = frame
                yield float(frame.time), frame
        self._next, self.ended = None, True

    def pixels(self, frame: av.VideoFrame, depth: Depth | None) -> Images:
        """(H, W, 3) RGB, through one converter for all frames: making one costs more than a small frame's decoding."""
        if depth is None:
            picture = np.asarray(self._converter.reformat(frame, format="rgb24").to_ndarray(), np.uint8)
        else:
            picture = depth.frame(frame, self.path)
        if self._orientation is None:  # side data costs time as well, and a stream has one matrix
            self._orientation = orientation(frame, self.path)
        turned, rows, columns = self._orientation
        picture = picture.swapaxes(0, 1) if turned else picture
        return picture[:: -1 if rows else 1, :: -1 if columns else 1]

    def _sought(self, clip: Clip) -> list[av.VideoFrame]:
        """The first frame after a seek, which is at or before the clip's.

        A key frame may come before frames that are shown earlier (open GOP, and B-frames without an edit list), so a
        seek may land behind the frame it was for: then again, further back.
        """
        back = 0.0
        while True:
            start = max(0.0, clip.start - back)
            self._seek(start)
            self._begun = True
            frame = next((frame for frame in self._frames if frame.time is not None), None)
            if start == 0.0 or frame is None or clip.place(frame.time) <= MAX_OFFSET:
                return [] if frame is None else [frame]
            back = 2 * back or 1.0

    def _seek(self, start: float) -> None:
        """To a key frame at or before ``start`` (s); the beginning is read from a file opened anew, as any other is."""
        if self._begun and (start <= 0 or self.ended):
            self._open()
        if start > 0 and self._stream.time_base is not None:
            self._container.seek(int(start / self._stream.time_base), stream=self._stream, backward=True)
            self._frames = self._container.decode(self._stream)


def orientation(frame: av.VideoFrame, path: Path) -> Orientation:
    """How the container says that a frame is shown; DataError where by more than quarter turns and mirroring.

    The display matrix tells; ``frame.rotation`` would not: it is -180 for a picture mirrored left to right.
    """
    found = frame.side_data.get("DISPLAYMATRIX")
    if found is None:
        return UPRIGHT
    a, b, _, c, d = np.sign(np.frombuffer(bytes(found), np.int32)[:5]).tolist()  # (x, y) is shown at (ax+cy, bx+dy)
    if a and d and not b and not c:
        return False, d < 0, a < 0
    if b and c and not a and not d:
        return True, b < 0, c < 0
    raise DataError(
        f"{path}: its display matrix turns the picture by other than quarter turns; re-encode it as it is shown"
    )


open_video = stays_open(VideoFile)


def decode_video(clip: Clip, prepare: Preparation) -> Images:
    """The clip's frames, prepared, (count, height, width, 3) uint8; DataError where they are not all there.

    Frames are placed by their time stamps, so a missing one is noticed; decoded frames are held one by one.
    """
    try:
        result, seen, found = _decode(open_video(clip.path), clip, prepare)
    except DataError:
        close_files()
        raise
    except (av.error.FFmpegError, OSError) as error:
        close_files()
        raise unreadable(clip.path, "video", error) from None
    if not seen.all():
        lost = int(np.flatnonzero(~seen)[0])
        raise DataError(
            f"{clip.path}: truncated, frame {lost} of {clip.count} (at {clip.start + lost / clip.fps:.3f} s) is "
            "missing; download the file again"
        )
    if clip.alone and found > clip.count:
        raise DataError(
            f"{clip.path}: holds {found} frames where the episode's table has {clip.count} rows, so which frame "
            "belongs to which row is unknown; drop the episode, or download its video and table again"
        )
    return result


def _decode(video: VideoFile, clip: Clip, prepare: Preparation) -> tuple[Images, NDArray[np.bool_], int]:
    """The clip's frames, which of them are there, and how many frames were read."""
    result = np.empty((clip.count, prepare.height, prepare.width, 3), np.uint8)
    seen, found = np.zeros(clip.count, bool), 0
    for seconds, frame in video.frames(clip):
        found += 1
        index = clip.index(seconds)
        if index >= clip.count and not clip.alone:
            break
        if 0 <= index < clip.count:
            pixels = video.pixels(frame, clip.depth)
            check_frame(pixels, clip.size, f"{clip.path}: frame at {seconds:.3f} s")
            result[index], seen[index] = prepare(pixels), True
    return result, seen, found
