"""Blocks of the video DiT: per-view or joint self-attention, text cross-attention, feed-forward.

Hidden states keep their frame axis, (N, V, F, S, D) with S = h * w cells, so that AdaLN vectors, which differ per frame
and view only, broadcast over the cells instead of being repeated for every token.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from wav.model.kernels import gate, modulate
from wav.model.layers import Attention, FeedForward, KeyValue, adaln_table


class TextContext(NamedTuple):
    """An instruction as the video blocks read it: projected once per sample, shared by its views and candidates.

    ``states`` (B, L, D); ``bias`` (B, 1, 1, L) added to the logits, or None; ``cache``: per layer K/V, or None.
    """

    states: Tensor
    bias: Tensor | None
    cache: tuple[KeyValue, ...] | None

    def layer(self, index: int) -> KeyValue | Tensor:
        """What block ``index`` cross-attends to."""
        return self.states if self.cache is None else self.cache[index]


class VideoBlock(nn.Module):
    """One block. ``joint``: self-attention over all views of a sample; otherwise within each view."""

    def __init__(self, dim: int, heads: int, joint: bool, bias: bool, out_bias: bool, eps: float) -> None:
        super().__init__()
        self.joint, self.eps = joint, eps
        self.attn1 = Attention(dim, heads, bias=bias, out_bias=out_bias)
        self.attn2 = Attention(dim, heads, bias=bias, out_bias=out_bias)
        self.ff = FeedForward(dim)
        self.scale_shift_table = adaln_table(6, dim)

    def forward(
        self, h: Tensor, temb: Tensor, rope: Tensor, text: KeyValue | Tensor, bias: Tensor | None, first: int = 0
    ) -> Tensor:
        """(N, V, F, S, D) to the same, or to (N, V, F - first, S, D).

        Args:
            h: hidden states.
            temb: (N, V, F, 6, D) time (and view) embedding.
            rope: (F * S, D / 2).
            text: K/V or states of B rows, N a multiple of B.
            bias: (B, 1, 1, L) or None.
            first: frames before it are only attended to: their output is not wanted.
        """
        n, v, f, s, d = h.shape
        rows = (self.scale_shift_table + temb).unsqueeze(3)  # (N, V, F, 1, 6, D)
        shift1, scale1, *later = rows.unbind(-2)
        x = modulate(h, shift1, scale1, self.eps).view(n * v, f * s, d)
        read = self.attn1.attend_self(x, rope, n if self.joint else n * v, first * s)
        if first:
            h, later = h[:, :, first:].contiguous(), [row[:, :, first:] for row in later]
        gate1, shift2, scale2, gate2 = later
        h = gate(h, read.view_as(h), gate1)
        flat = h.view(n, -1, d)
        h = self.attn2(flat, text, bias, flat).view_as(h)
        return gate(h, self.ff(modulate(h, shift2, scale2, self.eps)), gate2)


def pack(latents: Tensor) -> Tensor:
    """(N, V, C, F, h, w) to tokens (N, V, F, h * w, C)."""
    return latents.permute(0, 1, 3, 4, 5, 2).flatten(3, 4)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """(N, V, F, h * w, C) to (N, V, C, F, h, w)."""
    return tokens.view(*tokens.shape[:3], height, width, -1).permute(0, 1, 5, 2, 3, 4)
