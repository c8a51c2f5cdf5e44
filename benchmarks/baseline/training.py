"""The baseline schedule of training: what the published reference's trainer computes in a step, redundancy included.

The yardstick of ``benchmarks/train.py``. VAE and text encoder run inside the step; an AdaLN row for every token; the
video head computed in every stage; features copied into buffers, tiled for every draw, keys and values projected for
every draw; every block recomputed in the backward pass; norms and rotations as the operations of diffusers that the
reference is built on; AdamW without its fused kernel. The frozen video expert of the value stage has no gradients (the
reference freezes its parameters), so that nothing of it is kept for a backward pass either. Same weights, same draws,
same losses: this model is put into the objectives of :mod:`wav.training.objectives`.
``tests/training/test_schedule.py`` compares losses and gradients of both.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from wav.model import WAVTransformer, experts, layers, video
from wav.model.experts import ActionExpert, Expert, ExpertOutput, ValueExpert
from wav.model.layers import modulated_head
from wav.model.rope import Rope, video_rope
from wav.model.video import TextContext, VideoExpert, VideoOutput, pack, unpack


class BaselineVideo(VideoExpert):
    """The video expert on the reference's schedule: an AdaLN row per token, the head always, features copied."""

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        text: Tensor | TextContext,
        text_mask: Tensor | None = None,
        need_head: bool = True,
        first_frame: int = 0,
    ) -> VideoOutput:
        """One pass over all frames, whatever is wanted of them."""
        _, views, _, frames, height, width = latents.shape
        assert isinstance(text, Tensor)
        context = self.encode_text(text, text_mask)
        cells = height * width
        h = self.proj_in(pack(latents)).flatten(2, 3).unsqueeze(3)  # (N, V, F S, 1, D): every token its own frame
        tokens = timestep.repeat_interleave(cells, 1)[:, None].expand(-1, views, -1)
        temb, e = self.embed_time(tokens.contiguous(), views)
        rope = video_rope(h.shape[-1], frames, height, width, self.rope_scale, h.device)
        features: list[Tensor] = []
        for index in range(len(self.transformer_blocks)):
            h = self.transformer_blocks.run(index, h, temb, rope, context.states, context.bias)
            features.append(h.flatten(1, 3).clone())
        velocity = self.proj_out(modulated_head(h, self.scale_shift_table, e.unsqueeze(3)))
        velocity = unpack(velocity.view(*velocity.shape[:2], frames, cells, -1), height, width)
        return VideoOutput(velocity[:, :, :, first_frame:], tuple(features))


class BaselineExpert(Expert):
    """An expert on the reference's schedule: features tiled for every draw, an AdaLN row per token."""

    def run(
        self, tokens: Tensor, timestep: Tensor, video: Sequence[Any], value: Sequence[Any] | None, history: Any
    ) -> ExpertOutput:
        """Tokens through the blocks."""
        shape, chunk = tokens.shape, tokens.shape[-2]
        if len(shape) == 4:
            timestep, tokens = timestep.reshape(-1), tokens.flatten(0, 1)
            video = [layer.repeat_interleave(shape[1], 0) for layer in video]
            value = None if value is None else [layer.repeat_interleave(shape[1], 0) for layer in value]
            history = None if history is None else history.repeat_interleave(shape[1], 0)
        levels = timestep[:, None].expand(-1, chunk)
        h = self.proj_in(tokens)
        if history is not None:
            h = torch.cat([self.proj_in(history), h], dim=1)
            levels = torch.cat([levels.new_zeros(len(h), 1), levels], dim=1)
        temb, e = self.time_embed(levels.contiguous())
        temb, rope, features = temb.unflatten(-1, (6, -1)), self.rope(h), []
        for index in range(len(self.blocks)):
            h = self.blocks.run(index, h, temb, rope, video[index], None if value is None else value[index])
            features.append(h[:, -chunk:].clone().reshape(*shape[:-1], -1))
        velocity = self.proj_out(modulated_head(h[:, -chunk:], self.scale_shift_table, e[:, -chunk:]))
        return ExpertOutput(velocity.view(shape), tuple(features))


class BaselineValue(BaselineExpert, ValueExpert):
    """The value expert."""


class BaselineAction(BaselineExpert, ActionExpert):
    """The action expert."""


def baseline(model: WAVTransformer, checkpointing: bool = True) -> WAVTransformer:
    """The same weights (not copies) on the baseline schedule; ``checkpointing``: every block is recomputed."""
    kinds = {"video": BaselineVideo, "value": BaselineValue, "action": BaselineAction}
    for name, expert in model.named_children():
        expert.__class__ = kinds[name]
    if checkpointing:
        model.enable_gradient_checkpointing()
    return model


def _norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Diffusers' RMSNorm: variance in float32, cast back before the weight."""
    y = x * torch.rsqrt(x.to(torch.float32).pow(2).mean(-1, keepdim=True) + eps)
    return y if weight is None else y.to(weight.dtype) * weight


def _modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """AdaLN on diffusers' norm."""
    return torch.addcmul(shift, _norm(x, None, eps), 1 + scale)


def _rotate(x: Tensor, table: Rope) -> Tensor:
    """Diffusers' LTX rotation: pairs swapped and negated by stacking, in float32."""
    real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
    swapped = torch.stack([-imaginary, real], dim=-1).flatten(-2)
    cos, sin = table
    sin = sin[:, 1::2].repeat_interleave(2, -1)  # without signs
    return (x.float() * cos + swapped.float() * sin).to(x.dtype)


@contextmanager
def diffusers_operations() -> Any:
    """Within the block norms and rotations of training are diffusers' operations."""
    patches: list[tuple[Any, str, Any]] = [
        (layers, "rotate", _rotate),
        (video, "modulate", _modulate),
        (experts, "modulate", _modulate),
        (nn.RMSNorm, "forward", lambda norm, x: _norm(x, norm.weight, norm.eps)),
    ]
    kept = [getattr(place, name) for place, name, _ in patches]
    for place, name, patch in patches:
        setattr(place, name, patch)
    try:
        yield
    finally:
        for (place, name, _), original in zip(patches, kept, strict=True):
            setattr(place, name, original)
