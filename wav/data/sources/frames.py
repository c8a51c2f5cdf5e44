"""Frames of datasets: decoding of PNG and JPEG bytes, rotation and size, one frame or episode at a time.

Sizes are in pixels; images are (H, W, 3) uint8, RGB.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from wav.errors import DataError

if TYPE_CHECKING:
    from wav.config import DataSettings

Images = NDArray[np.uint8]
RESIZE = "lanczos"


@dataclass(frozen=True)
class Preparation:
    """What is done to every frame on the way in, in this order."""

    flip_rows: bool
    flip_columns: bool
    height: int
    width: int

    def __call__(self, frame: Images) -> Images:
        """(H, W, 3) uint8 to (height, width, 3) uint8; untouched where nothing is to be done."""
        frame = frame[:: -1 if self.flip_rows else 1, :: -1 if self.flip_columns else 1]
        if frame.shape[:2] == (self.height, self.width):
            return frame
        picture = Image.fromarray(np.ascontiguousarray(frame))
        return np.asarray(picture.resize((self.width, self.height), Image.Resampling.LANCZOS))

    def stack(self, frames: Iterable[Images], count: int) -> Images:
        """(count, height, width, 3) of ``count`` frames."""
        result = np.empty((count, self.height, self.width, 3), np.uint8)
        for index, frame in enumerate(frames):
            result[index] = self(frame)
        return result


def preparation(stored: str, target: str, mirrored: bool, height: int, width: int) -> Preparation:
    """The way from frames that carry the rotation ``stored`` to the rotation ``target`` ("none" or "180").

    ``mirrored``: the frames are the raw buffer with its rows reversed (robosuite's "opencv" image convention).
    """
    turn = stored != target
    return Preparation(flip_rows=turn and not mirrored, flip_columns=turn, height=height, width=width)


def described(camera: str, size: tuple[int, int], data: DataSettings) -> dict[str, Any]:
    """What happened to a camera's frames of ``size`` (H, W), for the store's ``source.json``."""
    same = size == (data.image_height, data.image_width)
    return {"camera": camera, "height": size[0], "width": size[1], "resized": "no" if same else RESIZE}


def check_frame(frame: NDArray[Any], size: tuple[int, int] | None, where: str) -> None:
    """Refuse what is not (H, W, 3) uint8 of ``size`` (H, W).

    Raises:
        DataError: another type, shape or size; ``where`` names the frame.
    """
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
        raise DataError(f"{where} is {frame.dtype} {frame.shape}; record RGB images as uint8 (H, W, 3)")
    if size is not None and frame.shape[:2] != size:
        raise DataError(f"{where} is {frame.shape[0]}x{frame.shape[1]} where the metadata says {size[0]}x{size[1]}")


def decode_image(
    data: bytes | None,
    size: tuple[int, int] | None,
    where: str,
    pixels: Callable[[Image.Image, str], Images] | None = None,
) -> Images:
    """An encoded image (PNG, JPEG) as (H, W, 3) uint8; DataError for damage, another mode than RGB or another size.

    ``pixels`` makes them of an image of another mode.
    """
    if not data:
        raise DataError(f"{where} is empty; record every frame")
    if not isinstance(data, bytes):
        raise DataError(f"{where} is {type(data).__name__} where an encoded image is expected; store its bytes")
    try:
        with Image.open(io.BytesIO(data)) as picture:
            picture.load()
            if pixels is None and picture.mode != "RGB":
                raise DataError(f"{where} has mode {picture.mode}; record RGB images of 8 bits")
            shown = ImageOps.exif_transpose(picture)
            frame = pixels(shown, where) if pixels else np.asarray(shown)
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{where} is not a readable image ({error}); download the file again") from None
    check_frame(frame, size, where)
    return frame
