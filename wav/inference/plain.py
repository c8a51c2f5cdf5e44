"""The plain schedule of planning: what the reference computes, redundancy included, with this library's kernels.

It is the yardstick of ``benchmarks/plan.py`` and of the numerical tests; nothing acts with it. Per call: instruction
projected and its K/V computed for every candidate and layer, one AdaLN row per token, the video head always computed,
features copied into buffers and tiled for every value sample, the experts' K/V projected again for every sample and
denoising step. Draws, attribution and update are the planner's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor

from wav.flow_matching import euler_step, frame_timesteps, inference_sigmas, join_frames
from wav.inference.reference import ReferencePlannerModel
from wav.model.layers import modulated_head
from wav.model.rope import video_rope
from wav.model.transformer import ExpertOutput, VideoOutput
from wav.model.video import VideoBlock, pack, unpack


@dataclass(frozen=True)
class PlainContext:
    """Conditioning of B observations, nothing projected yet."""

    memory: Tensor  #: (B, V, C, Fm, h, w), clean
    text: Tensor  #: (B, L, Ct)
    mask: Tensor | None  #: (B, L)
    history: Tensor | None  #: (B, 1, Ca)


@dataclass(frozen=True)
class PlainFeatures:
    """Buffers of B * M candidates: per layer (B * M, V * F * h * w, D)."""

    layers: tuple[Tensor, ...]


class PlainPlannerModel(ReferencePlannerModel):
    """A WAVTransformer behind :class:`wav.planning.planner.PlannerModel`, on the reference's schedule."""

    @torch.no_grad()
    def begin(  # type: ignore[override]
        self, memory: Tensor, text: Tensor, text_mask: Tensor | None, history: Tensor | None
    ) -> PlainContext:
        """Handle of B observations; shapes as in :meth:`wav.inference.adapter.WAVPlannerModel.begin`."""
        mask = None if text_mask is None else text_mask.to(self.device)
        return PlainContext(self._in(memory), self._in(text), mask, None if history is None else self._in(history))

    @torch.no_grad()
    def video_features(self, context: PlainContext, noise: Tensor, steps: int) -> PlainFeatures:  # type: ignore[override]
        """Features of future noises (B, M, V, C, Ff, h, w), copied into buffers."""
        future = self._in(noise).flatten(0, 1)
        sigmas = inference_sigmas(steps).tolist()
        for sigma, after in pairwise(sigmas[:-1]):
            future = self._denoise(cast(Any, context), future, sigma, after)
        layers = self._video(context, future, sigmas[-2]).features
        return PlainFeatures(tuple(layer.clone() for layer in layers))

    @torch.no_grad()
    def denoise_value(self, features: PlainFeatures, noise: Tensor, steps: int) -> Tensor:  # type: ignore[override]
        """Normalised values (B, M, N, A, Cv): features tiled N times, K/V of every row projected at every step."""
        values = self._in(noise).flatten(0, 2)
        buffers = [layer.repeat_interleave(noise.shape[2], 0) for layer in features.layers]
        for sigma, after, timestep in self._steps(steps, values.shape[:1]):
            velocity = self._tokens("value", values, timestep, buffers, None, None).velocity
            values = euler_step(values, velocity, sigma, after)
        return values.reshape(noise.shape).float()

    @torch.no_grad()
    def denoise_action(  # type: ignore[override]
        self, context: PlainContext, features: PlainFeatures, value: Tensor | None, noise: Tensor, steps: int
    ) -> Tensor:
        """Normalised actions (B, A, Ca), K/V projected at every step."""
        value_layers = None if value is None else self._value_layers(cast(Any, features), value)
        actions = self._in(noise)
        for sigma, after, timestep in self._steps(steps, actions.shape[:1]):
            output = self._tokens("action", actions, timestep, features.layers, value_layers, context.history)
            actions = euler_step(actions, output.velocity, sigma, after)
        return actions.float()

    def _value_layers(self, features: Any, noise: Tensor) -> tuple[Tensor, ...]:
        """Value expert's features of pure noise (B, A, Cv) at t = 1000, per layer (B, A, d)."""
        level = torch.full(noise.shape[:1], 1000.0, device=self.device)
        return self._tokens("value", self._in(noise), level, features.layers, None, None).features

    def _video(self, context: Any, future: Tensor, sigma: float) -> VideoOutput:
        """One video pass of rows b * M + m: text per candidate, an AdaLN row per token, the head always."""
        model, M = self.model, future.shape[0] // context.memory.shape[0]
        latents = join_frames(context.memory.repeat_interleave(M, 0), future)
        n, v, _, f, height, width = latents.shape
        mask = None if context.mask is None else context.mask.repeat_interleave(M, 0)
        text = model.encode_text(context.text.repeat_interleave(M, 0), mask)
        level = torch.full((n,), sigma * 1000.0, device=self.device)
        timestep = frame_timesteps(context.memory.shape[3], future.shape[3], level)
        tokens = timestep.repeat_interleave(height * width, 1)[:, None].expand(-1, v, -1)  # (n, v, f * s)
        h = model.proj_in(pack(latents)).view(n, v, f * height * width, 1, -1)
        temb, e = model._time(tokens, v)
        scale = tuple(model.config.rope_interpolation_scale)
        rope = video_rope(h.shape[-1], f, height, width, scale, h.device)
        features = []
        for block in cast("list[VideoBlock]", list(model.transformer_blocks)):
            h = block(h, temb, rope, text.states, text.bias)
            features.append(h.flatten(1, 3))
        velocity = model.proj_out(modulated_head(h, model.scale_shift_table, e.unsqueeze(3)))
        return VideoOutput(unpack(velocity.view(n, v, f, height * width, -1), height, width), tuple(features))

    def _denoise(self, context: Any, future: Tensor, sigma: float, after: float) -> Tensor:
        """One Euler step of the future frames."""
        velocity = self._video(context, future, sigma).velocity
        assert velocity is not None
        return euler_step(future, velocity[:, :, :, -future.shape[3] :], sigma, after)

    def _tokens(
        self,
        name: str,
        tokens: Tensor,
        timestep: Tensor,
        video: Sequence[Tensor],
        value: Sequence[Tensor] | None,
        history: Tensor | None,
    ) -> ExpertOutput:
        """Tokens (n, A, C) through an expert, an AdaLN row per token, K/V projected from the buffers."""
        parts, chunk = self.model._expert(name), tokens.shape[1]
        levels = timestep[:, None].expand(-1, chunk)
        h = parts.proj_in(tokens)
        if history is not None:
            h = torch.cat([parts.proj_in(history), h], dim=1)
            levels = torch.cat([levels.new_zeros(len(h), 1), levels], dim=1)
        temb, e = parts.time_embed(levels)
        temb, rope, features = temb.unflatten(-1, (6, -1)), parts.rope(h), []
        for index, block in enumerate(parts.layers):
            h = block(h, temb, rope, video[index], None if value is None else value[index])
            features.append(h[:, -chunk:].clone())
        return ExpertOutput(parts.head(h[:, -chunk:], e[:, -chunk:]), tuple(features))
