"""The value and the action expert: small transformers over chunk tokens that cross-attend to the video blocks' outputs.

Block i reads the output of video block i (``attn2``); the action expert also reads that of value block i (``attn3``).
Several draws (training) or samples (planning) of one observation ride as consecutive rows and share its keys and
values, which :func:`ExpertBlock.caches` computes once for all Euler steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from wav.model.kernels import gate, modulate
from wav.model.layers import Attention, FeedForward, KeyValue, TimeEmbedding, adaln_table, modulated_head
from wav.model.rope import token_rope


class ExpertBlock(nn.Module):
    """Self-attention (AdaLN, RoPE), cross-attention to video (and value) features, feed-forward (AdaLN)."""

    def __init__(self, dim: int, heads: int, video_dim: int, value_dim: int | None, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.attn1 = Attention(dim, heads)
        self.attn2 = Attention(dim, heads, video_dim)
        self.attn3 = Attention(dim, heads, value_dim) if value_dim else None
        self.ff = FeedForward(dim)
        self.scale_shift_table = adaln_table(6, dim)

    def caches(self, video: Tensor, value: Tensor | None) -> tuple[KeyValue, KeyValue | None]:
        """K/V of this block's features, ``video`` (B, L, D) and ``value`` (B, A, d_value) or None."""
        if value is None or self.attn3 is None:
            return self.attn2.keys_values(video), None
        return self.attn2.keys_values(video), self.attn3.keys_values(value)

    def forward(
        self, h: Tensor, temb: Tensor, rope: Tensor, video: KeyValue | Tensor, value: KeyValue | Tensor | None
    ) -> Tensor:
        """(N, T, d) to the same; ``temb`` (N, 1 or T, 6, d); ``video`` and ``value`` of B rows, N a multiple of B."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.scale_shift_table + temb).unbind(-2)
        x = modulate(h, shift1, scale1, self.eps)
        h = gate(h, self.attn1.attend_self(x, rope, h.shape[0]), gate1)
        if value is None or self.attn3 is None:
            h = self.attn2(h, video, residual=h)
        else:
            h = h + self.attn3(h, value, residual=self.attn2(h, video))
        return gate(h, self.ff(modulate(h, shift2, scale2, self.eps)), gate2)


@dataclass(frozen=True)
class ExpertParts:
    """One expert's modules. They are registered on the transformer itself, whose state-dict names are fixed."""

    proj_in: nn.Linear
    time_embed: TimeEmbedding
    blocks: nn.ModuleList
    scale_shift_table: nn.Parameter
    proj_out: nn.Linear
    rope_base: int

    @property
    def layers(self) -> list[ExpertBlock]:
        """The blocks, typed."""
        return cast("list[ExpertBlock]", list(self.blocks))

    def embed(self, tokens: Tensor, timestep: Tensor, history: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states (N, [1 +] A, d), temb (N, 1 or 1 + A, 6, d) and e (N, 1, d).

        A history token stands in front, at timestep 0 and position 0.
        """
        temb, e = self.time_embed(timestep.unsqueeze(1))
        temb = temb.unflatten(-1, (6, -1))
        h = self.proj_in(tokens)
        if history is not None:
            clean, _ = self.time_embed(timestep.new_zeros(1, 1))
            clean = clean.unflatten(-1, (6, -1)).expand(h.shape[0], -1, -1, -1)
            temb = torch.cat([clean, temb.expand(-1, h.shape[1], -1, -1)], dim=1)
            h = torch.cat([self.proj_in(history), h], dim=1)
        return h, temb, e

    def rope(self, h: Tensor) -> Tensor:
        """Table of the hidden states' positions."""
        return token_rope(h.shape[-1], h.shape[1], self.rope_base, h.device)

    def head(self, h: Tensor, e: Tensor) -> Tensor:
        """Last hidden states (N, A, d) to velocities (N, A, C)."""
        return self.proj_out(modulated_head(h, self.scale_shift_table, e))  # type: ignore[no-any-return]
