"""The baseline schedule of planning: what the reference computes, redundancy included, with this library's blocks.

It is the yardstick of ``benchmarks/plan.py`` and of the numerical tests. Per call: the instruction is projected and its
keys and values are computed for every candidate and layer, there is one AdaLN row per token, the video head is always
computed, features are copied into buffers and tiled for every value sample, and the experts' keys and values are
projected again for every sample and denoising step. Draws, attribution and update are the planner's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from wav.flow_matching import euler_step, frame_timesteps, inference_sigmas, join_frames
from wav.model import WAVTransformer
from wav.model.experts import ExpertOutput
from wav.model.layers import modulated_head
from wav.model.rope import video_rope
from wav.model.video import VideoOutput, pack, unpack
from wav.planning.types import NoiseShapes

Features = tuple[Tensor, ...]  #: per layer a buffer (B * M, V * F * h * w, D)


@dataclass(frozen=True)
class Context:
    """Conditioning of B observations, nothing projected yet."""

    memory: Tensor  #: (B, V, C, Fm, h, w), clean
    text: Tensor  #: (B, L, Ct)
    mask: Tensor | None  #: (B, L)
    history: Tensor | None  #: (B, 1, Ca)


class BaselinePlannerModel:
    """A WAVTransformer behind :class:`wav.planning.types.PlannerModel`, on the reference's schedule."""

    def __init__(self, model: WAVTransformer, shapes: NoiseShapes) -> None:
        self.model, self.shapes = model, shapes

    def _in(self, tensor: Tensor) -> Tensor:
        """``tensor`` where and in what the model computes."""
        weight = next(self.model.parameters())
        return tensor.to(weight.device, weight.dtype)

    @torch.no_grad()
    def begin(self, memory: Tensor, text: Tensor, text_mask: Tensor | None, history: Tensor | None) -> Context:
        """Handle of B observations; shapes as in :class:`Context`."""
        mask = None if text_mask is None else text_mask.to(next(self.model.parameters()).device)
        return Context(self._in(memory), self._in(text), mask, None if history is None else self._in(history))

    @torch.no_grad()
    def video_features(self, context: Context, noise: Tensor, levels: tuple[float, ...]) -> Features:
        """Features of future noises (B, M, V, C, Ff, h, w), copied into buffers."""
        future = self._denoise(context, self._in(noise).flatten(0, 1), levels)
        return tuple(layer.clone() for layer in self._video(context, future, levels[-1]).features)

    @torch.no_grad()
    def denoise_video(self, context: Context, noise: Tensor, steps: int) -> Tensor:
        """Future latents (B, V, C, Ff, h, w) of their noise, fully denoised."""
        return self._denoise(context, self._in(noise), inference_sigmas(steps).tolist()).float()

    @torch.no_grad()
    def denoise_value(self, features: Features, noise: Tensor, steps: int) -> Tensor:
        """Normalised values (B, M, N, A, Cv): features tiled N times, K/V of every row projected at every step."""
        values = self._in(noise).flatten(0, 2)
        buffers = [layer.repeat_interleave(noise.shape[2], 0) for layer in features]
        for sigma, after in pairwise(inference_sigmas(steps).tolist()):
            velocity = self._tokens("value", values, sigma, buffers, None, None).velocity
            values = euler_step(values, velocity, sigma, after)
        return values.reshape(noise.shape).float()

    @torch.no_grad()
    def denoise_action(
        self,
        context: Context,
        features: Features,
        value: Tensor | None,
        noise: Tensor,
        steps: int,
        value_level: float = 1.0,
    ) -> Tensor:
        """Normalised actions (B, A, Ca), K/V projected at every step."""
        reads, actions = None, self._in(noise)
        if value is not None:
            reads = self._tokens("value", self._in(value), value_level, features, None, None).features
        for sigma, after in pairwise(inference_sigmas(steps).tolist()):
            velocity = self._tokens("action", actions, sigma, features, reads, context.history).velocity
            actions = euler_step(actions, velocity, sigma, after)
        return actions.float()

    def _denoise(self, context: Context, future: Tensor, sigmas: Sequence[float]) -> Tensor:
        """Euler steps of the future frames."""
        for sigma, after in pairwise(sigmas):
            velocity = self._video(context, future, sigma).velocity
            assert velocity is not None
            future = euler_step(future, velocity[:, :, :, -future.shape[3] :], sigma, after)
        return future

    def _video(self, context: Context, future: Tensor, sigma: float) -> VideoOutput:
        """One video pass of rows b * M + m: text per candidate, an AdaLN row per token, the head always."""
        video = self.model.video
        M = future.shape[0] // context.memory.shape[0]
        latents = join_frames(context.memory.repeat_interleave(M, 0), future)
        n, v, _, f, height, width = latents.shape
        mask = None if context.mask is None else context.mask.repeat_interleave(M, 0)
        text = video.encode_text(context.text.repeat_interleave(M, 0), mask)
        level = torch.full((n,), sigma * 1000.0, device=latents.device)
        timestep = frame_timesteps(context.memory.shape[3], future.shape[3], level)
        tokens = timestep.repeat_interleave(height * width, 1)[:, None].expand(-1, v, -1)  # (n, v, f * s)
        h = video.proj_in(pack(latents)).view(n, v, f * height * width, 1, -1)
        temb, e = video.embed_time(tokens, v)
        rope = video_rope(h.shape[-1], f, height, width, video.rope_scale, h.device)
        features = []
        for block in video.transformer_blocks:
            h = block(h, temb, rope, text.states, text.bias)
            features.append(h.flatten(1, 3))
        velocity = video.proj_out(modulated_head(h, video.scale_shift_table, e.unsqueeze(3)))
        return VideoOutput(unpack(velocity.view(n, v, f, height * width, -1), height, width), tuple(features))

    def _tokens(
        self,
        name: str,
        tokens: Tensor,
        sigma: float,
        video: Sequence[Tensor],
        value: Sequence[Tensor] | None,
        history: Tensor | None,
    ) -> ExpertOutput:
        """Tokens (n, A, C) through an expert, an AdaLN row per token, K/V projected from the buffers."""
        expert = self.model.expert(name)
        chunk = tokens.shape[1]
        levels = torch.full((len(tokens), chunk), sigma * 1000.0, device=tokens.device)
        h = expert.proj_in(tokens)
        if history is not None:
            h = torch.cat([expert.proj_in(history), h], dim=1)
            levels = torch.cat([levels.new_zeros(len(h), 1), levels], dim=1)
        temb, e = expert.time_embed(levels)
        temb, rope, features = temb.unflatten(-1, (6, -1)), expert.rope(h), []
        for index, block in enumerate(expert.blocks):
            h = block(h, temb, rope, video[index], None if value is None else value[index])
            features.append(h[:, -chunk:].clone())
        return ExpertOutput(expert.head(h[:, -chunk:], e[:, -chunk:]), tuple(features))
