"""Layers that the video DiT and both experts share: attention with qk-norm, AdaLN helpers, feed-forward, embeddings.

Parameter names follow LTX-Video's in diffusers, so that its weights load by name.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wav.model.kernels import Linear, RmsNorm, attend


class KeyValue(NamedTuple):
    """Keys and values of one attention layer, each (rows, heads, length, head_dim); keys are normalised already."""

    key: Tensor
    value: Tensor


class Attention(nn.Module):
    """Multi-head attention; RMS norm of q and k (eps 1e-5) and RoPE over the whole inner width, before the head split.

    Args:
        dim: width of queries and of the output.
        heads: number of heads; the inner width is ``dim``.
        context_dim: width of what keys and values are read from; ``dim`` for self-attention.
        bias: bias of the q, k and v projections.
        out_bias: bias of the output projection.
    """

    def __init__(
        self, dim: int, heads: int, context_dim: int | None = None, bias: bool = True, out_bias: bool = True
    ) -> None:
        super().__init__()
        self.heads = heads
        self.norm_q = RmsNorm(dim, eps=1e-5)
        self.norm_k = RmsNorm(dim, eps=1e-5)
        self.to_q = Linear(dim, dim, bias=bias)
        self.to_k = Linear(context_dim or dim, dim, bias=bias)
        self.to_v = Linear(context_dim or dim, dim, bias=bias)
        self.to_out = nn.ModuleList([Linear(dim, dim, bias=out_bias)])

    def _split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], self.heads, -1).transpose(1, 2)

    def keys_values(self, context: Tensor) -> KeyValue:
        """Keys and values of ``context`` (rows, L, context_dim), computed once and attended to any number of times."""
        return KeyValue(self._split(self.norm_k(self.to_k(context))), self._split(self.to_v(context)))

    def forward(
        self, x: Tensor, memory: KeyValue | Tensor, bias: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """Cross-attention of ``x`` (rows * n, L, dim) on ``memory`` of ``rows`` rows, shared by n consecutive rows.

        ``residual`` (like ``x``) is added to it.

        Without a causal mask, queries of rows that share keys are just more queries: they are folded into the length
        axis instead of tiling the keys. ``bias`` (rows, 1, 1, Lk) is added to the logits.
        """
        key, value = memory if isinstance(memory, tuple) else self.keys_values(memory)
        query = self._split(self.norm_q(self.to_q(x)).view(key.shape[0], -1, x.shape[-1]))
        return self.to_out[0](attend(query, key, value, bias).view(x.shape), residual)  # type: ignore[no-any-return]

    def attend_self(self, x: Tensor, rope: Tensor, rows: int, first: int = 0) -> Tensor:
        """Self-attention of ``x`` (..., L, dim), rotated by ``rope`` (L, dim / 2), within each of ``rows`` groups.

        ``first``: tokens before it are only attended to; the result is of those from there on.
        """
        shape = (rows, -1, x.shape[-1])
        later, turns = (x[..., first:, :], rope[first:]) if first else (x, rope)  # a slice costs a pass backwards
        query = self._split(self.norm_q(self.to_q(later), turns).view(shape))
        key = self._split(self.norm_k(self.to_k(x), rope).view(shape))
        value = self._split(self.to_v(x).view(shape))
        return self.to_out[0](attend(query, key, value).view(later.shape))  # type: ignore[no-any-return]


class _Projection(nn.Module):
    """Holds ``proj`` so that the first linear of a feed-forward is named ``net.0.proj``; GELU is the second's."""

    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.proj = Linear(dim, inner)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)  # type: ignore[no-any-return]


class FeedForward(nn.Module):
    """Two linears, four times as wide in between, GELU-tanh."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([_Projection(dim, 4 * dim), nn.Identity(), Linear(4 * dim, dim, gelu=True)])

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) to (..., dim)."""
        return self.net[2](self.net[0](x))  # type: ignore[no-any-return]


class CaptionProjection(nn.Module):
    """Text embeddings to the model's width: linear, GELU-tanh, linear."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.linear_1 = Linear(in_dim, dim)
        self.linear_2 = Linear(dim, dim, gelu=True)

    def forward(self, text: Tensor) -> Tensor:
        """(B, L, in_dim) to (B, L, dim)."""
        return self.linear_2(self.linear_1(text))  # type: ignore[no-any-return]


class _TimestepMlp(nn.Module):
    """Sinusoid of 256 channels (cosines first), linear, SiLU, linear."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear_1 = Linear(256, dim)
        self.linear_2 = Linear(dim, dim)

    def forward(self, timestep: Tensor) -> Tensor:
        waves = timestep_waves(timestep).to(self.linear_1.weight.dtype)
        return self.linear_2(F.silu(self.linear_1(waves)))  # type: ignore[no-any-return]


class _Embedders(nn.Module):
    """Holds ``timestep_embedder`` so that names match diffusers' AdaLayerNormSingle."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.timestep_embedder = _TimestepMlp(dim)

    def forward(self, timestep: Tensor) -> Tensor:
        return self.timestep_embedder(timestep)  # type: ignore[no-any-return]


class TimeEmbedding(nn.Module):
    """Timestep to (temb, e): six AdaLN rows and the embedding that the head uses."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.emb = _Embedders(dim)
        self.linear = Linear(dim, 6 * dim)

    def forward(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """``timestep`` (...) in 0..1000 to temb (..., 6 dim) and e (..., dim)."""
        e = self.emb(timestep)
        return self.linear(F.silu(e)), e


def timestep_waves(timestep: Tensor, channels: int = 256) -> Tensor:
    """Sinusoidal embedding (..., channels) float32, cosines first, frequencies 10000 ** (-i / (channels / 2)).

    Frequencies and angles are rounded to float32 where the reference rounds; exp, cos and sin are taken in float64,
    because at an angle of 1000 rad a library's last bit in exp already moves the result by 6e-5.
    """
    half = channels // 2
    exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=timestep.device) / half
    angle = (timestep.float().unsqueeze(-1) * exponent.double().exp().float()).double()
    return torch.cat([angle.cos(), angle.sin()], dim=-1).float()


def modulated_head(x: Tensor, table: Tensor, e: Tensor) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift with (shift, scale) = table (2, dim) + e, ``e`` broadcasting against ``x``."""
    shift, scale = table[0] + e, table[1] + e
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)


def adaln_table(rows: int, dim: int) -> nn.Parameter:
    """A scale-shift table (rows, dim), N(0, 1 / dim)."""
    return nn.Parameter(torch.randn(rows, dim) / dim**0.5)
