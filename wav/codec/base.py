"""What every codec is: frames to latents and back, with a digest that names its weights.

Images are uint8 RGB; latents are float32 of roughly unit variance per channel. A *clip* has 1 + temporal*k frames and
becomes 1 + k latent frames: its first frame stands alone, then each group of ``temporal`` frames becomes one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from wav.errors import DataError

Images = NDArray[np.uint8]
Latents = NDArray[np.float32]

CODEC_FILE = "codec.json"


class Codec(ABC):
    """Frames <-> latents. N is any batch size, h = H / spatial, w = W / spatial, C = channels."""

    channels: int
    """Latent channels C, position channels included."""
    spatial: int
    """Pixels per latent cell along height and width."""
    temporal: int
    """Frames per latent frame inside a clip."""

    @property
    @abstractmethod
    def digest(self) -> str:
        """SHA-256 of everything that decides the latents."""

    @abstractmethod
    def save(self, folder: str | Path, reference: bool = False) -> None:
        """Write the codec so that :func:`wav.codec.load_codec` reads it back.

        With ``reference``, weights that came from the hub are named (id and digest) instead of copied.
        """

    def encode_frames(self, images: Images) -> Latents:
        """Images (N, H, W, 3) uint8, each on its own, to latents (N, C, h, w)."""
        check_images(images, 4, self.spatial, "images")
        return self._encode(images[:, None])[:, :, 0]

    def encode_clips(self, clips: Images) -> Latents:
        """Clips (N, 1 + temporal*k, H, W, 3) uint8 to latents (N, C, 1 + k, h, w)."""
        check_images(clips, 5, self.spatial, "clips")
        check_clip_length(clips.shape[1], self.temporal)
        return self._encode(clips)

    def decode_frames(self, latents: Latents) -> Images:
        """Latents (N, C, h, w) to images (N, H, W, 3) uint8."""
        check_latents(latents, 4, self.channels)
        return self._decode(latents[:, :, None])[:, 0]

    def decode_clips(self, latents: Latents) -> Images:
        """Latents (N, C, 1 + k, h, w) to clips (N, 1 + temporal*k, H, W, 3) uint8."""
        check_latents(latents, 5, self.channels)
        return self._decode(latents)

    @abstractmethod
    def _encode(self, clips: Images) -> Latents:
        """:meth:`encode_clips` of what was checked."""

    @abstractmethod
    def _decode(self, latents: Latents) -> Images:
        """:meth:`decode_clips` of what was checked."""


def check_images(images: NDArray, dims: int, spatial: int, what: str) -> None:
    """Raise DataError unless ``images`` is uint8 (..., H, W, 3) of ``dims`` axes, H and W multiples of ``spatial``."""
    if images.dtype != np.uint8 or images.ndim != dims or images.shape[-1] != 3:
        raise DataError(
            f"{what}: expected uint8 with {dims} axes ending in (H, W, 3), found {images.dtype} {images.shape}; "
            "pass RGB images as uint8"
        )
    height, width = images.shape[-3:-1]
    if height % spatial or width % spatial or 0 in (height, width):
        raise DataError(
            f"{what}: image size {height}x{width} is not a multiple of the codec's {spatial} pixels per cell; "
            "change data.image_height and data.image_width"
        )


def check_clip_length(frames: int, temporal: int) -> int:
    """Number k of a clip of ``frames`` = 1 + temporal*k frames; raises DataError for any other length."""
    if frames < 1 or (frames - 1) % temporal:
        raise DataError(
            f"clips: {frames} frames are not 1 + k * {temporal}; set data.future_frames to 1 + k * encode.temporal"
        )
    return (frames - 1) // temporal


def check_latents(latents: NDArray, dims: int, channels: int) -> None:
    """Raise DataError unless ``latents`` is floating with ``dims`` axes and ``channels`` on axis 1."""
    if latents.ndim != dims or latents.shape[1] != channels or not np.issubdtype(latents.dtype, np.floating):
        raise DataError(
            f"latents: expected float (N, {channels}, ...) with {dims} axes, found {latents.dtype} {latents.shape}; "
            "use the codec that encoded them"
        )


def psnr(images: NDArray, reference: NDArray) -> float:
    """Peak signal-to-noise ratio in dB of uint8 ``images`` against ``reference`` of the same shape; inf if equal.

    Raises:
        DataError: the shapes differ.
    """
    if images.shape != reference.shape:
        raise DataError(f"psnr: shapes {images.shape} and {reference.shape} differ; compare images of equal size")
    total, count = 0.0, 0
    for one, two in zip(images, reference, strict=True):  # row by row: flat memory on long stacks
        error = one.astype(np.float64) - two.astype(np.float64)
        total, count = total + float((error * error).sum()), count + error.size
    mse = total / max(count, 1)
    return float("inf") if mse == 0 else float(10 * np.log10(255.0**2 / mse))
