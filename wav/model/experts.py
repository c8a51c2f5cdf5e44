"""The value and the action expert: small transformers over chunk tokens that read the video blocks' outputs (4.2).

Block i cross-attends to the output of video block i (``attn2``); the action expert's also to that of value block i
(``attn3``). Several draws (training) or samples (planning) of one observation ride as consecutive rows and share its
keys and values, which ``cache`` computes once for all Euler steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from wav.model.layers import (
    Attention,
    Blocks,
    FeedForward,
    KeyValue,
    TimeEmbedding,
    adaln_table,
    keys_values,
    modulate,
    modulated_head,
)
from wav.model.rope import Rope, token_rope

Memory = Sequence[Tensor] | Sequence[KeyValue]
"""Per layer the features that an expert reads, (B, L, width), or their keys and values."""


class ExpertOutput(NamedTuple):
    """``velocity`` like the tokens; ``features``: output of every block, (B, A, d), or (B, R, A, d) for R draws."""

    velocity: Tensor
    features: tuple[Tensor, ...]


class ActionCache(NamedTuple):
    """Keys and values the action expert reads, per layer; ``value`` is None without value features."""

    video: tuple[KeyValue, ...]
    value: tuple[KeyValue, ...] | None


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

    def forward(
        self, h: Tensor, temb: Tensor, rope: Rope, video: KeyValue | Tensor, value: KeyValue | Tensor | None
    ) -> Tensor:
        """(N, T, d) to the same; ``temb`` (N, 1 or T, 6, d); ``video`` and ``value`` of B rows, N a multiple of B."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.scale_shift_table + temb).unbind(-2)
        x = modulate(h, shift1, scale1, self.eps)
        h = torch.addcmul(h, self.attn1.attend_self(x, rope, h.shape[0]), gate1)
        read = self.attn2(h, video)
        if value is not None and self.attn3 is not None:
            read = read + self.attn3(h, value)
        h = h + read
        return torch.addcmul(h, self.ff(modulate(h, shift2, scale2, self.eps)), gate2)


class Expert(nn.Module):
    """What both experts are: tokens (value or action chunks) to velocities, reading other experts' features.

    Sizes are those of the model's configuration (:class:`wav.model.transformer.WAVTransformer`) that begin with the
    name of the expert, ``value`` or ``action``; it has a block for each of the video expert's.
    """

    name: str

    def __init__(self, config: Any) -> None:
        super().__init__()
        own = f"{self.name}_"
        heads, channels = config[own + "num_attention_heads"], config[own + "in_channels"]
        dim = heads * config[own + "attention_head_dim"]
        video_dim = config.num_attention_heads * config.attention_head_dim
        value_dim = config.value_num_attention_heads * config.value_attention_head_dim
        reads = video_dim, value_dim if self.name == "action" and config.value_expert else None
        self.rope_base = config[own + "rope_base"]
        self.scale_shift_table = adaln_table(2, dim)
        self.proj_in = nn.Linear(channels, dim)
        self.time_embed = TimeEmbedding(dim)
        self.blocks = Blocks([ExpertBlock(dim, heads, *reads, config.norm_eps) for _ in range(config.num_layers)])
        self.proj_out = nn.Linear(dim, config.get(own + "out_channels", channels))

    def embed(self, tokens: Tensor, timestep: Tensor, history: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states (N, [1 +] A, d), temb (N, 1 or 1 + A, 6, d) and e (N, 1, d).

        A history token (N, 1, C) stands in front, at timestep 0 and position 0.
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

    def rope(self, h: Tensor) -> Rope:
        """Table of the hidden states' positions."""
        return token_rope(h.shape[-1], h.shape[1], self.rope_base, h.device)

    def head(self, h: Tensor, e: Tensor) -> Tensor:
        """Last hidden states (N, A, d) to velocities (N, A, C)."""
        return self.proj_out(modulated_head(h, self.scale_shift_table, e))  # type: ignore[no-any-return]

    def run(
        self, tokens: Tensor, timestep: Tensor, video: Memory, value: Memory | None, history: Tensor | None
    ) -> ExpertOutput:
        """Tokens (B, A, C) or (B, R, A, C) through the blocks; see the experts' own ``forward``."""
        shape, chunk = tokens.shape, tokens.shape[-2]
        dtype = self.proj_in.weight.dtype
        if len(shape) == 4:
            timestep = timestep.reshape(shape[0], -1).expand(shape[:2]).reshape(-1)
            history = None if history is None else history.repeat_interleave(shape[1], 0)
            tokens = tokens.flatten(0, 1)
        h, temb, e = self.embed(tokens.to(dtype), timestep, None if history is None else history.to(dtype))
        rope = self.rope(h)
        features = []
        for index in range(len(self.blocks)):
            h = self.blocks.run(index, h, temb, rope, video[index], None if value is None else value[index])
            features.append(h[:, -chunk:].reshape(*shape[:-1], -1))
        return ExpertOutput(self.head(h[:, -chunk:], e).view(shape), tuple(features))


class ValueExpert(Expert):
    """Denoises value trajectories, given what the video expert foresees."""

    name = "value"

    def cache(self, features: Sequence[Tensor]) -> tuple[KeyValue, ...]:
        """K/V of the cross-attentions, from video ``features`` (B, L, D) per layer."""
        return keys_values(self.blocks, "attn2", features)

    def forward(
        self, tokens: Tensor, timestep: Tensor, features: Memory, history: Tensor | None = None
    ) -> ExpertOutput:
        """Velocity of value trajectories given video features.

        ``tokens`` (B, A, C), or (B, R, A, C) for R draws per sample that share its features; ``timestep`` (B,) or
        (B, R), sigma * 1000; per layer ``features`` (B, L, D), or :meth:`cache`'s result; ``history`` (B, 1, C), a
        clean token in front (the reference accepts one and never uses it).
        """
        return self.run(tokens, timestep, features, None, history)


class ActionExpert(Expert):
    """Denoises action chunks, given video and value features and the robot's state."""

    name = "action"

    def cache(self, features: Sequence[Tensor], value_features: Sequence[Tensor] | None = None) -> ActionCache:
        """K/V of the cross-attentions, from video and value features per layer."""
        value = None if value_features is None else keys_values(self.blocks, "attn3", value_features)
        return ActionCache(keys_values(self.blocks, "attn2", features), value)

    def forward(
        self,
        tokens: Tensor,
        timestep: Tensor,
        video_features: Sequence[Tensor] | ActionCache,
        value_features: Sequence[Tensor] | None = None,
        history: Tensor | None = None,
    ) -> Tensor:
        """Velocity of action chunks given video and value features.

        Tokens and timesteps as the value expert's. Per layer ``video_features`` (B, L, D), or :meth:`cache`'s result,
        and ``value_features`` (B, A, d_value), None: attn3 is skipped. ``history`` (B, 1, C) = [zeros | state]: a clean
        token in front, dropped before the head.
        """
        if isinstance(video_features, ActionCache):
            return self.run(tokens, timestep, *video_features, history).velocity
        return self.run(tokens, timestep, video_features, value_features, history).velocity


#: classes of the action expert by the name that ``model.action_kind`` gives
ACTION_EXPERTS: dict[str, type[ActionExpert]] = {"paper": ActionExpert}
