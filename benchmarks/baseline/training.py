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
from typing import Any, cast

import torch
from torch import Tensor

from wav.model import WAVTransformer, kernels
from wav.model.experts import ExpertParts
from wav.model.layers import modulated_head
from wav.model.rope import video_rope
from wav.model.transformer import ExpertOutput, VideoOutput
from wav.model.video import TextContext, pack, unpack


class BaselineTransformer(WAVTransformer):
    """A WAVTransformer on the reference's schedule; make one of a model with :func:`baseline`."""

    def video(
        self,
        latents: Tensor,
        timestep: Tensor,
        text: Tensor | TextContext,
        text_mask: Tensor | None = None,
        need_head: bool = True,
        first_frame: int = 0,
    ) -> VideoOutput:
        """One pass of the video DiT: an AdaLN row per token, the head always, features copied into buffers."""
        _, views, _, frames, height, width = latents.shape
        assert isinstance(text, Tensor)
        context = self.encode_text(text, text_mask)
        cells = height * width
        h = self.proj_in(pack(latents)).flatten(2, 3).unsqueeze(3)  # (N, V, F S, 1, D): every token its own frame
        tokens = timestep.repeat_interleave(cells, 1)[:, None].expand(-1, views, -1)
        temb, e = self._time(tokens.contiguous(), views)
        scale = tuple(self.config.rope_interpolation_scale)
        rope = video_rope(h.shape[-1], frames, height, width, scale, h.device)
        features = []
        for block in self.transformer_blocks.children():
            h = self._block(len(features), block, h, temb, rope, context.states, context.bias)
            features.append(h.flatten(1, 3).clone())
        velocity = self.proj_out(modulated_head(h, self.scale_shift_table, e.unsqueeze(3)))
        velocity = unpack(velocity.view(*velocity.shape[:2], frames, cells, -1), height, width)
        return VideoOutput(velocity[:, :, :, first_frame:], tuple(features))

    def _run_expert(
        self,
        parts: ExpertParts,
        tokens: Tensor,
        timestep: Tensor,
        video: Sequence[Any],
        value: Sequence[Any] | None,
        history: Tensor | None,
    ) -> ExpertOutput:
        """Tokens through an expert: features tiled for every draw, an AdaLN row per token."""
        shape, chunk = tokens.shape, tokens.shape[-2]
        if len(shape) == 4:
            timestep, tokens = timestep.reshape(-1), tokens.flatten(0, 1)
            video = [layer.repeat_interleave(shape[1], 0) for layer in video]
            value = None if value is None else [layer.repeat_interleave(shape[1], 0) for layer in value]
            history = None if history is None else history.repeat_interleave(shape[1], 0)
        levels = timestep[:, None].expand(-1, chunk)
        h = parts.proj_in(tokens)
        if history is not None:
            h = torch.cat([parts.proj_in(history), h], dim=1)
            levels = torch.cat([levels.new_zeros(len(h), 1), levels], dim=1)
        temb, e = parts.time_embed(levels.contiguous())
        temb, rope, features = temb.unflatten(-1, (6, -1)), parts.rope(h), []
        for index, block in enumerate(parts.blocks.children()):
            h = self._block(index, block, h, temb, rope, video[index], None if value is None else value[index])
            features.append(h[:, -chunk:].clone().reshape(*shape[:-1], -1))
        velocity = parts.proj_out(modulated_head(h[:, -chunk:], parts.scale_shift_table, e[:, -chunk:]))
        return ExpertOutput(velocity.view(shape), tuple(features))


def baseline(model: WAVTransformer, checkpointing: bool = True) -> BaselineTransformer:
    """The same weights (not copies) on the baseline schedule; ``checkpointing``: every block is recomputed."""
    model.__class__ = BaselineTransformer
    if checkpointing:
        model.enable_gradient_checkpointing()
    return cast(BaselineTransformer, model)


def _never(x: Tensor) -> bool:
    """Whether a compiled kernel computes on ``x``: none does."""
    return False


def _norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Diffusers' RMSNorm: variance in float32, cast back before the weight."""
    y = x * torch.rsqrt(x.to(torch.float32).pow(2).mean(-1, keepdim=True) + eps)
    return y if weight is None else y.to(weight.dtype) * weight


def _rotate(x: Tensor, table: Tensor) -> Tensor:
    """Diffusers' LTX rotation: pairs swapped and negated by stacking, in float32."""
    real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
    swapped = torch.stack([-imaginary, real], dim=-1).flatten(-2)
    turn = torch.view_as_real(table)
    cos, sin = (turn[..., i].repeat_interleave(2, -1) for i in (0, 1))
    return (x.float() * cos + swapped.float() * sin).to(x.dtype)


@contextmanager
def diffusers_operations() -> Any:
    """Within the block no compiled kernel runs, and norms and rotations of training are diffusers' operations."""
    kept = kernels.native, kernels.rotate, kernels.rms_norm
    kernels.native, kernels.rotate, kernels.rms_norm = _never, _rotate, _norm
    try:
        yield
    finally:
        kernels.native, kernels.rotate, kernels.rms_norm = kept
