"""Depth cameras as pictures: what LeRobot recorded of one becomes metres, and metres between two bounds grey levels.

Codec, published weights and reward know pictures of three channels alone; with this the rest of the pipeline needs
nothing of its own. Near is white and far black, and so is what was not measured, which is mostly what lies behind
something near. Formats are LeRobot 0.6.1's: videos of 12-bit codes on a scale that ``meta/info.json`` states, and TIFF
images of metres (float) or millimetres (16 bits).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from wav.data.sources.frames import Images
from wav.errors import DataError

CODES = 4096
PIXELS = "gray12le"
#: of a video: depths (m) of the first and the last code, what is added before the logarithm, whether there is one
SCALE = ("video.depth_min", "video.depth_max", "video.shift", "video.use_log")


@dataclass(frozen=True)
class Depth:
    """How a depth camera's frames become pictures. Depths are in metres."""

    near: float
    far: float
    scale: tuple[float, float, float, bool] | None
    """Of a video's codes, as :data:`SCALE`; None: of images."""

    def grey(self, metres: NDArray[np.floating]) -> Images:
        """(...) metres to (..., 3) uint8; 0 and NaN are not measured."""
        measured = np.where(metres > 0, metres, np.inf)
        share = np.clip((self.far - measured) / (self.far - self.near), 0, 1)
        return np.repeat(np.rint(255 * share).astype(np.uint8)[..., None], 3, axis=-1)

    def frame(self, frame: av.VideoFrame, path: Path) -> Images:
        """(H, W, 3) of a video's frame; DataError where it holds no codes."""
        if frame.format.name != PIXELS:
            raise DataError(
                f"{path}: its frames are {frame.format.name} where LeRobot's depth is {PIXELS}; record it with "
                "LeRobot's depth encoder, or leave its view out of ingest.lerobot.depth"
            )
        return np.asarray(_table(self)[frame.to_ndarray()])

    def image(self, picture: Image.Image, where: str) -> Images:
        """(H, W, 3) of an image; DataError where it is of another kind."""
        if picture.mode not in ("F", "I;16"):
            raise DataError(f"{where} has mode {picture.mode}; record depth as float32 metres or uint16 millimetres")
        return self.grey(np.asarray(picture, np.float32) / (1000 if picture.mode == "I;16" else 1))


@lru_cache
def _table(depth: Depth) -> Images:
    """(4096, 3): the grey of each code; the first means that nothing was measured, or nothing so near."""
    assert depth.scale is not None
    low, high, shift, logarithmic = depth.scale
    share = np.arange(CODES) / (CODES - 1)
    if logarithmic:
        metres = np.exp(math.log(low + shift) * (1 - share) + math.log(high + shift) * share) - shift
    else:
        metres = low * (1 - share) + high * share
    metres[0] = 0
    return depth.grey(metres)


def code_scale(details: Mapping[str, Any], where: str) -> tuple[float, float, float, bool]:
    """The scale of a video's codes; DataError where the metadata do not state it."""
    values: list[Any] = [details.get(name) for name in SCALE]
    low, high, shift, logarithmic = values
    numbers = all(type(value) in (int, float) and math.isfinite(value) for value in values[:3])
    if not numbers or type(logarithmic) is not bool or not low < high or (logarithmic and low + shift <= 0):
        raise DataError(
            f"{where}: {', '.join(SCALE)} = {values}: do not say which depth a code means; write what it was recorded "
            "with there (LeRobot's defaults: 0.01, 10.0, 3.5, true)"
        )
    return float(low), float(high), float(shift), logarithmic
