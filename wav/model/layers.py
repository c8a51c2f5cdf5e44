"""Layers that the video DiT and both experts share: attention with qk-norm, AdaLN, feed-forward, embeddings.

Parameter names follow LTX-Video's in diffusers, so that its weights load by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wav.model.rope import Rope, rotate


class KeyValue(NamedTuple):
    """Keys and values of one attention layer, each (rows, heads, length, head_dim); keys are normalised already."""

    key: Tensor
    value: Tensor


class Attention(nn.Module):
    """Multi-head attention; RMS norm of q and k (eps 1e-5) and RoPE over the whole inner width, before the head split.

    ``context_dim``: width of what keys and values are read from, ``dim`` for self-attention.
    """

    def __init__(
        self, dim: int, heads: int, context_dim: int | None = None, bias: bool = True, out_bias: bool = True
    ) -> None:
        super().__init__()
        self.heads = heads
        self.norm_q = nn.RMSNorm(dim, eps=1e-5)
        self.norm_k = nn.RMSNorm(dim, eps=1e-5)
        self.to_q = nn.Linear(dim, dim, bias=bias)
        self.to_k = nn.Linear(context_dim or dim, dim, bias=bias)
        self.to_v = nn.Linear(context_dim or dim, dim, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim, bias=out_bias)])

    def _split(self, x: Tensor) -> Tensor:
        """(rows, L, dim) to (rows, heads, L, head_dim)."""
        return x.view(*x.shape[:-1], self.heads, -1).transpose(1, 2)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
        """Attention and output projection, (rows, Lq, dim)."""
        read = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return self.to_out[0](read.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def keys_values(self, context: Tensor) -> KeyValue:
        """Keys and values of ``context`` (rows, L, context_dim), computed once and attended to any number of times."""
        return KeyValue(self._split(self.norm_k(self.to_k(context))), self._split(self.to_v(context)))

    def forward(self, x: Tensor, memory: KeyValue | Tensor, bias: Tensor | None = None) -> Tensor:
        """Cross-attention of ``x`` (rows * n, L, dim) on ``memory`` of ``rows`` rows, shared by n consecutive rows.

        Without a causal mask, queries of rows that share keys are just more queries: they are folded into the length
        axis instead of tiling the keys. ``bias`` (rows, 1, 1, Lk) is added to the logits.
        """
        key, value = memory if isinstance(memory, tuple) else self.keys_values(memory)
        query = self.norm_q(self.to_q(x)).reshape(key.shape[0], -1, x.shape[-1])
        return self._attend(self._split(query), key, value, bias).view(x.shape)

    def attend_self(self, x: Tensor, rope: Rope, rows: int, first: int = 0) -> Tensor:
        """Self-attention of ``x`` (..., L, dim), rotated by ``rope`` of L positions, within each of ``rows`` groups.

        ``first``: tokens before it are only attended to; the result is of those from there on.
        """
        later, turns = (x[..., first:, :], (rope[0][first:], rope[1][first:])) if first else (x, rope)
        query = rotate(self.norm_q(self.to_q(later)), turns).view(rows, -1, x.shape[-1])
        key = rotate(self.norm_k(self.to_k(x)), rope).view(rows, -1, x.shape[-1])
        value = self.to_v(x).view(rows, -1, x.shape[-1])
        return self._attend(self._split(query), self._split(key), self._split(value)).view(later.shape)


def keys_values(blocks: Iterable[nn.Module], attention: str, contexts: Iterable[Tensor]) -> tuple[KeyValue, ...]:
    """What each block's cross-attention (``attn2`` or ``attn3``) reads of its context (B, L, width)."""
    return tuple(getattr(b, attention).keys_values(c) for b, c in zip(blocks, contexts, strict=True))


class _GeluProjection(nn.Module):
    """A linear and GELU-tanh; the linear is called ``proj`` as in LTX-Video."""

    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, inner)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    """Two linears, four times as wide in between, GELU-tanh."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([_GeluProjection(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim)])

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) to (..., dim)."""
        return self.net[2](self.net[0](x))  # type: ignore[no-any-return]


class CaptionProjection(nn.Module):
    """Text embeddings to the model's width: linear, GELU-tanh, linear."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_dim, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, text: Tensor) -> Tensor:
        """(B, L, in_dim) to (B, L, dim)."""
        return self.linear_2(F.gelu(self.linear_1(text), approximate="tanh"))  # type: ignore[no-any-return]


class _TimestepMlp(nn.Module):
    """Sinusoid of 256 channels (cosines first), linear, SiLU, linear."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(256, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, timestep: Tensor) -> Tensor:
        waves = timestep_waves(timestep).to(self.linear_1.weight.dtype)
        return self.linear_2(F.silu(self.linear_1(waves)))  # type: ignore[no-any-return]


class TimeEmbedding(nn.Module):
    """Timestep to (temb, e): six AdaLN rows and the embedding that the head uses."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.emb = nn.ModuleDict({"timestep_embedder": _TimestepMlp(dim)})  # diffusers' AdaLayerNormSingle's names
        self.linear = nn.Linear(dim, 6 * dim)

    def forward(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """``timestep`` (...) in 0..1000 to temb (..., 6 dim) and e (..., dim)."""
        e = self.emb["timestep_embedder"](timestep)
        return self.linear(F.silu(e)), e


def timestep_waves(timestep: Tensor) -> Tensor:
    """Sinusoidal embedding (..., 256) float32, cosines first, frequencies 10000 ** (-i / 128).

    Frequencies and angles are rounded to float32 where the reference rounds; exp, cos and sin are taken in float64,
    because at an angle of 1000 rad a library's last bit in exp already moves the result by 6e-5.
    """
    exponent = -math.log(10000) * torch.arange(128, dtype=torch.float32, device=timestep.device) / 128
    angle = (timestep.float().unsqueeze(-1) * exponent.double().exp().float()).double()
    return torch.cat([angle.cos(), angle.sin()], dim=-1).float()


def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """AdaLN: RMS(x) * (1 + scale) + shift; ``shift`` and ``scale`` (..., 1 or L, dim) for ``x`` (..., L, dim)."""
    return torch.addcmul(shift, F.rms_norm(x, x.shape[-1:], eps=eps), 1 + scale)


def modulated_head(x: Tensor, table: Tensor, e: Tensor) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift with (shift, scale) = table (2, dim) + e, ``e`` broadcasting against ``x``."""
    shift, scale = table[0] + e, table[1] + e
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)


def adaln_table(rows: int, dim: int) -> nn.Parameter:
    """A scale-shift table (rows, dim), N(0, 1 / dim)."""
    return nn.Parameter(torch.randn(rows, dim) / dim**0.5)


class Blocks(nn.ModuleList):
    """Transformer blocks, of which gradient checkpointing computes the first ``recomputed`` again backwards.

    diffusers' ``enable_gradient_checkpointing`` sets ``gradient_checkpointing`` and the function that does it.
    """

    gradient_checkpointing: bool = False
    _gradient_checkpointing_func: Callable[..., Tensor]

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__(blocks)
        self.recomputed = len(blocks)

    def run(self, index: int, *args: Any) -> Tensor:
        """Block ``index`` of ``args``."""
        if self.gradient_checkpointing and index < self.recomputed and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(self[index], *args)
        return self[index](*args)  # type: ignore[no-any-return]
