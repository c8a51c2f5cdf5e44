"""Rotary position tables of the three token streams (video grid, value tokens, action tokens), in real numbers.

Angles reach 1.6e4 rad, where one float32 ulp is 1e-3 rad, so the tables are built in float32 in the reference's order
of operations, on the CPU whatever the device. A table is a pair (cosines, sines), each (L, dim), for a rotation of
neighbouring channels (x0, x1) -> (x0 c - x1 s, x1 c + x0 s). Its sines carry the sign that they enter with, minus for
the first of each pair, so that a rotation is two products and no negation.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

THETA = 10000.0
BASE_FRAMES, BASE_PIXELS = 20, 2048

Rope = tuple[Tensor, Tensor]
"""Cosines and signed sines, each (L, dim) float32."""


def _frequencies(count: int) -> Tensor:
    """``count`` frequencies theta ** linspace(0, 1) * pi / 2."""
    start, end = math.log(1.0, THETA), math.log(THETA, THETA)
    return THETA ** torch.linspace(start, end, count, dtype=torch.float32, device="cpu") * math.pi / 2.0


def _table(angles: Tensor, dim: int, device: torch.device) -> Rope:
    """The table of (L, n) angles, padded in FRONT with angle 0 (no rotation) to dim / 2 pairs of channels."""
    pad = angles.new_zeros(angles.shape[0], dim // 2 - angles.shape[1])
    angles = torch.cat([pad, angles], dim=1)
    cos, sin = angles.cos(), angles.sin()
    return cos.repeat_interleave(2, -1).to(device), torch.stack([-sin, sin], -1).flatten(1).to(device)


@functools.lru_cache(maxsize=32)
def video_rope(
    dim: int, frames: int, height: int, width: int, scale: tuple[float, float, float], device: torch.device
) -> Rope:
    """Table of a latent grid, L = frames * height * width (LTX-Video's positions).

    pos_f = f * scale[0] / 20, pos_h = h * scale[1] / 2048, pos_w likewise; dim // 6 frequencies per axis, frequency
    major, then (f, h, w). ``scale``: seconds, pixels and pixels of one latent.
    """
    with torch.inference_mode(False):
        axes = [torch.arange(size, dtype=torch.float32, device="cpu") for size in (frames, height, width)]
        grid = torch.stack(torch.meshgrid(*axes, indexing="ij"))
        bases = (BASE_FRAMES, BASE_PIXELS, BASE_PIXELS)
        grid = torch.stack([axis * s / base for axis, s, base in zip(grid, scale, bases, strict=True)])
        position = grid.flatten(1).transpose(0, 1).unsqueeze(-1)  # (L, 3, 1)
        angles = _frequencies(dim // 6) * (position * 2 - 1)
        return _table(angles.transpose(-1, -2).flatten(1), dim, device)


@functools.lru_cache(maxsize=64)
def token_rope(dim: int, length: int, base: int, device: torch.device) -> Rope:
    """Table of ``length`` expert tokens: position index / base, dim // 2 frequencies."""
    with torch.inference_mode(False):
        position = torch.arange(length, dtype=torch.float32, device="cpu") / base
        return _table(_frequencies(dim // 2) * (position.unsqueeze(-1) * 2 - 1), dim, device)


def rotate(x: Tensor, table: Rope) -> Tensor:
    """Rotate neighbouring pairs of the last dimension of ``x`` (..., L, dim) by ``table``, in float32 or better."""
    cos, sin = table
    swapped: Tensor = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return torch.addcmul(x * cos, swapped, sin).to(x.dtype)
