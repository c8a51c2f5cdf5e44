"""Pictures of rollouts: mp4 videos, strips of frames, predicted beside real frames. All images are RGB uint8."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from wav.io.files import atomic_file, write_bytes

Picture = NDArray[np.uint8]
_MARGIN = 2


def enlarge(image: Picture, height: int) -> Picture:
    """Repeat pixels by the whole factor that brings (..., H, W, 3) to at least ``height`` pixels."""
    factor = max(1, -(-height // image.shape[-3]))
    return image.repeat(factor, axis=-3).repeat(factor, axis=-2)


def join_views(frame: Mapping[str, Picture], views: Sequence[str] | None = None) -> Picture:
    """The views of one frame side by side, padded at the bottom to one height: (H, sum of W, 3)."""
    images = [frame[view] for view in (views or frame)]
    height = max(image.shape[0] for image in images)
    return np.concatenate([np.pad(i, ((0, height - len(i)), (0, 0), (0, 0))) for i in images], axis=1)


def write_mp4(path: Path, frames: Iterable[Picture], fps: int, height: int = 192) -> None:
    """Write (H, W, 3) frames as a video of at least ``height`` pixels, atomically.

    Raises:
        StorageError: the disk is full.
        ValueError: no frames.
    """
    pictures = [enlarge(np.asarray(frame, dtype=np.uint8), height) for frame in frames]
    if not pictures:
        raise ValueError(f"{path}: a video needs at least one frame")
    rows, columns = (size + size % 2 for size in pictures[0].shape[:2])
    encoder = "libx264" if "libx264" in av.codec.codecs_available else "mpeg4"  # browsers play H.264; FFmpeg has mpeg4
    with atomic_file(path) as temporary:
        path.parent.mkdir(parents=True, exist_ok=True)
        with av.open(str(temporary), "w", format="mp4", options={"movflags": "faststart"}) as container:
            stream = container.add_stream(encoder, rate=Fraction(fps))
            stream.width, stream.height, stream.pix_fmt = columns, rows, "yuv420p"
            for picture in pictures:
                even = np.pad(picture, ((0, rows - picture.shape[0]), (0, columns - picture.shape[1]), (0, 0)))
                container.mux(stream.encode(av.VideoFrame.from_ndarray(even, format="rgb24")))
            container.mux(stream.encode())


def evenly(length: int, count: int) -> list[int]:
    """At most ``count`` places of ``length`` at even distances, first and last included."""
    return [int(i) for i in np.unique(np.linspace(0, length - 1, min(count, length)).round())] if length else []


def strip(frames: Sequence[Picture], count: int = 8) -> Picture:
    """``count`` frames at even distances (first and last included), side by side."""
    return grid([[frames[i] for i in evenly(len(frames), count)]])


def grid(rows: Sequence[Sequence[Picture]]) -> Picture:
    """Pictures of one size in rows, on white, with a thin margin; shorter rows are filled with white."""
    height, width = rows[0][0].shape[:2]
    columns = max(len(row) for row in rows)
    canvas = np.full((len(rows) * (height + _MARGIN), columns * (width + _MARGIN), 3), 255, np.uint8)
    for r, row in enumerate(rows):
        for c, picture in enumerate(row):
            top, left = r * (height + _MARGIN), c * (width + _MARGIN)
            canvas[top : top + height, left : left + width] = picture
    return canvas[:-_MARGIN, :-_MARGIN]


def prediction_grid(real: NDArray[np.uint8], predicted: NDArray[np.uint8]) -> Picture:
    """Two rows per view, real above predicted; both (V, F, H, W, 3)."""
    return grid([list(row) for pair in zip(real, predicted, strict=True) for row in pair])


def write_prediction(path: Path, real: NDArray[np.uint8], predicted: NDArray[np.uint8]) -> None:
    """Write :func:`prediction_grid` as :func:`write_png` does."""
    write_png(path, prediction_grid(real, predicted), 192 * len(real))


def write_png(path: Path, image: Picture, height: int = 0) -> None:
    """Write the picture as PNG of at least ``height`` pixels, atomically, making its folder.

    Raises:
        StorageError: the disk is full.
    """
    buffer = io.BytesIO()
    Image.fromarray(enlarge(image, height) if height else image).save(buffer, format="PNG", optimize=True)
    write_bytes(path, buffer.getvalue())
