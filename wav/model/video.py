"""The video expert: LTX-Video's DiT over several camera views (section 4.2 of the paper).

Each block: self-attention, joint over all views in every third block and per view otherwise; cross-attention to the
instruction; feed-forward. The output of every block is what the value and the action expert read.

Hidden states keep their frame axis, (N, V, F, S, D) with S = h * w cells, so that AdaLN vectors, which differ per frame
and view only, broadcast over the cells instead of being repeated for every token. Candidates of one sample (planning)
are consecutive rows and share its instruction.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from wav.errors import ConfigError
from wav.model.layers import (
    Attention,
    Blocks,
    CaptionProjection,
    FeedForward,
    KeyValue,
    TimeEmbedding,
    adaln_table,
    keys_values,
    modulate,
    modulated_head,
)
from wav.model.rope import Rope, video_rope

JOINT_EVERY = 3  # layers 0, 3, 6, ... attend across views


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


class VideoOutput(NamedTuple):
    """``velocity`` (N, V, C, F, h, w) or None; ``features``: output of every block, (N, V * F * h * w, D)."""

    velocity: Tensor | None
    features: tuple[Tensor, ...]


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
        self, h: Tensor, temb: Tensor, rope: Rope, text: KeyValue | Tensor, bias: Tensor | None, first: int = 0
    ) -> Tensor:
        """Hidden states (N, V, F, S, D) to the same, or to (N, V, F - first, S, D).

        ``temb``: time (and view) embedding (N, V, F, 6, D). ``rope``: of F * S positions. ``text``: K/V or states of B
        rows, N a multiple of B, with ``bias`` (B, 1, 1, L) or None. Frames before ``first`` are only attended to.
        """
        n, v, f, s, d = h.shape
        rows = (self.scale_shift_table + temb).unsqueeze(3)  # (N, V, F, 1, 6, D)
        shift1, scale1, *later = rows.unbind(-2)
        x = modulate(h, shift1, scale1, self.eps).view(n * v, f * s, d)
        read = self.attn1.attend_self(x, rope, n if self.joint else n * v, first * s)
        if first:
            h, later = h[:, :, first:].contiguous(), [row[:, :, first:] for row in later]
        gate1, shift2, scale2, gate2 = later
        h = torch.addcmul(h, read.view(h.shape), gate1)
        h = h + self.attn2(h.view(n, -1, d), text, bias).view(h.shape)
        return torch.addcmul(h, self.ff(modulate(h, shift2, scale2, self.eps)), gate2)


class VideoExpert(nn.Module):
    """The video DiT: noisy future frames behind clean memory frames, given an instruction.

    Sizes are those of the model's configuration (:class:`wav.model.transformer.WAVTransformer`).
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        heads, dim = config.num_attention_heads, config.num_attention_heads * config.attention_head_dim
        self.views = config.max_view if config.use_view_embed else 0  #: so many have an embedding
        seconds, height, width = config.rope_interpolation_scale
        self.rope_scale = seconds, height, width
        self.scale_shift_table = adaln_table(2, dim)
        self.proj_in = nn.Linear(config.in_channels, dim)
        self.time_embed = TimeEmbedding(dim)
        if self.views:
            self.view_embed = nn.Parameter(torch.randn(self.views, dim) / dim**0.5)
            self.view_ada = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.caption_projection = CaptionProjection(config.caption_channels, dim)
        options = config.attention_bias, config.attention_out_bias, config.norm_eps
        layers = range(config.num_layers)
        self.transformer_blocks = Blocks([VideoBlock(dim, heads, i % JOINT_EVERY == 0, *options) for i in layers])
        self.proj_out = nn.Linear(dim, config.out_channels)

    def encode_text(self, text: Tensor, text_mask: Tensor | None = None, cache: bool = False) -> TextContext:
        """Project instruction embeddings ``text`` (B, L, C) once; ``text_mask`` (B, L) is 1 for tokens that count.

        ``cache``: compute every layer's K/V too, for repeated passes without gradients.
        """
        dtype = self.proj_in.weight.dtype
        states = self.caption_projection(text.to(dtype))
        bias = None
        if text_mask is not None:
            bias = ((1 - text_mask.to(dtype)) * -10000.0)[:, None, None, :]
        blocks = self.transformer_blocks
        keys = keys_values(blocks, "attn2", [states] * len(blocks)) if cache else None
        return TextContext(states, bias, keys)

    def embed_time(self, timestep: Tensor, views: int) -> tuple[Tensor, Tensor]:
        """AdaLN rows temb (N, V, 1 or F, 6, D) and e (N, V, 1 or F, D): one per frame and view, never per token.

        ``timestep``: (N,), (N, F) or (N, V, F).
        """
        if timestep.ndim == 1:
            timestep = timestep[:, None, None]
        elif timestep.ndim == 2:
            timestep = timestep[:, None, :]
        temb, e = self.time_embed(timestep)
        if self.views:
            view = self.view_embed[:views]
            temb = temb + self.view_ada(view)[:, None]
            e = e + view[:, None]
        return temb.unflatten(-1, (6, -1)), e

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        text: Tensor | TextContext,
        text_mask: Tensor | None = None,
        need_head: bool = True,
        first_frame: int = 0,
    ) -> VideoOutput:
        """One pass.

        Args:
            latents: (N, V, C, F, h, w), memory frames first.
            timestep: sigma * 1000, (N,), (N, F) or (N, V, F); 0 for memory frames.
            text: (B, L, C) or :meth:`encode_text`'s result; N = B * M, rows b * M + m are candidates of sample b.
            text_mask: (B, L), for a ``text`` tensor.
            need_head: False skips the head where only features are wanted.
            first_frame: where only the velocity from this frame on is wanted: the last block computes no others,
                ``velocity`` is (N, V, C, F - first_frame, h, w), and there are no features.

        Raises:
            ConfigError: more views than the model embeds.
        """
        _, views, _, frames, height, width = latents.shape
        if self.views and views > self.views:
            raise ConfigError(f"views = {views}: the model embeds {self.views}; use fewer or raise model.max_views")
        if not isinstance(text, TextContext):
            text = self.encode_text(text, text_mask)
        h = self.proj_in(pack(latents).to(self.proj_in.weight.dtype))
        temb, e = self.embed_time(timestep, views)
        temb = temb.expand(-1, -1, frames, -1, -1)
        rope = video_rope(h.shape[-1], frames, height, width, self.rope_scale, h.device)
        features = []
        for index in range(len(self.transformer_blocks)):
            first = first_frame if index == len(self.transformer_blocks) - 1 else 0
            h = self.transformer_blocks.run(index, h, temb, rope, text.layer(index), text.bias, first)
            features.append(h.flatten(1, 3))
        velocity = None
        if need_head:
            later = e[:, :, first_frame:] if e.shape[2] > 1 else e
            tokens = self.proj_out(modulated_head(h, self.scale_shift_table, later.unsqueeze(3)))
            velocity = unpack(tokens, height, width)
        return VideoOutput(velocity, () if first_frame else tuple(features))


def pack(latents: Tensor) -> Tensor:
    """(N, V, C, F, h, w) to tokens (N, V, F, h * w, C)."""
    return latents.permute(0, 1, 3, 4, 5, 2).flatten(3, 4)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """(N, V, F, h * w, C) to (N, V, C, F, h, w)."""
    return tokens.view(*tokens.shape[:3], height, width, -1).permute(0, 1, 5, 2, 3, 4)
