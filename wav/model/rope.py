"""Rotary position tables of the three token streams (video grid, value tokens, action tokens).

Angles reach 1.6e4 rad, where one float32 ulp is 1e-3 rad, so the tables are built in float32 in the reference's order
of operations, on the CPU whatever the device. They are kept as complex numbers: the pairwise rotation
(x0, x1) -> (x0 c - x1 s, x1 c + x0 s) is then one multiplication. Compiled code (:mod:`wav.inference.compiled`),
which has
no complex arithmetic, reads the same tables as pairs of real numbers.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

THETA = 10000.0
BASE_FRAMES, BASE_PIXELS = 20, 2048


def _frequencies(count: int) -> Tensor:
    """``count`` frequencies theta ** linspace(0, 1) * pi / 2."""
    start, end = math.log(1.0, THETA), math.log(THETA, THETA)
    return THETA ** torch.linspace(start, end, count, dtype=torch.float32) * math.pi / 2.0


def _turns(angles: Tensor, dim: int) -> Tensor:
    """(L, n) angles to (L, dim / 2) unit complex numbers, padded in FRONT with 1 (no rotation)."""
    pad = angles.new_zeros(angles.shape[0], dim // 2 - angles.shape[1])
    angles = torch.cat([pad, angles], dim=1)
    return torch.complex(angles.cos(), angles.sin())


@functools.lru_cache(maxsize=32)
def video_rope(
    dim: int, frames: int, height: int, width: int, scale: tuple[float, float, float], device: torch.device
) -> Tensor:
    """Table of a latent grid, (frames * height * width, dim / 2) complex64 (LTX-Video's positions).

    pos_f = f * scale[0] / 20, pos_h = h * scale[1] / 2048, pos_w likewise; dim // 6 frequencies per axis, frequency
    major, then (f, h, w). ``scale``: seconds, pixels and pixels of one latent.
    """
    with torch.inference_mode(False):
        axes = [torch.arange(size, dtype=torch.float32) for size in (frames, height, width)]
        grid = torch.stack(torch.meshgrid(*axes, indexing="ij"))
        bases = (BASE_FRAMES, BASE_PIXELS, BASE_PIXELS)
        grid = torch.stack([axis * s / base for axis, s, base in zip(grid, scale, bases, strict=True)])
        position = grid.flatten(1).transpose(0, 1).unsqueeze(-1)  # (L, 3, 1)
        angles = _frequencies(dim // 6) * (position * 2 - 1)
        return _turns(angles.transpose(-1, -2).flatten(1), dim).to(device)


@functools.lru_cache(maxsize=64)
def token_rope(dim: int, length: int, base: int, device: torch.device) -> Tensor:
    """Table of ``length`` expert tokens, (length, dim / 2) complex64: position index / base, dim // 2 frequencies."""
    with torch.inference_mode(False):
        position = torch.arange(length, dtype=torch.float32) / base
        return _turns(_frequencies(dim // 2) * (position.unsqueeze(-1) * 2 - 1), dim).to(device)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotate neighbouring pairs of the last dimension of ``x`` (..., L, dim) by ``table``, in float32.

    ``table``: (L, dim / 2) complex, or its ``torch.view_as_real`` (L, dim / 2, 2).
    """
    pairs = x.float().unflatten(-1, (-1, 2))
    if table.is_complex():
        return torch.view_as_real(torch.view_as_complex(pairs) * table).flatten(-2).to(x.dtype)
    (first, second), (cosine, sine) = pairs.unbind(-1), table.unbind(-1)
    turned = torch.stack([first * cosine - second * sine, second * cosine + first * sine], -1)
    return turned.flatten(-2).to(x.dtype)
