"""The planner's view of a :class:`~wav.model.transformer.WAVTransformer`: keys and values once, Euler loops around.

Everything that does not change between candidates, samples or steps is projected once: the instruction's K/V per
observation, a candidate's video K/V per layer for all its value samples and steps, the action loop's K/V for all its
steps. Nothing is tiled: candidates ride as rows b * M + m, value samples as a second axis of those rows.

Shapes: B observations, M candidates, N value samples, V views, C channels, F = Fm memory + Ff future latent frames,
A action chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from wav.flow_matching import euler_step, frame_timesteps, inference_sigmas, join_frames
from wav.planner import NoiseShapes

if TYPE_CHECKING:
    from wav.model.transformer import WAVTransformer

ALIGNMENT = 64  #: bytes; where torch's own CPU allocations start
NOISE_LEVEL = 1000.0  #: timestep of pure noise, at which the experts are trained to read features


@dataclass(frozen=True)
class Context:
    """Conditioning of B observations."""

    memory: Tensor  #: (B, V, C, Fm, h, w), clean
    text: Any  #: TextContext of B rows with its K/V
    history: Tensor | None  #: (B, 1, Ca): [zeros | normalised state]


class Features:
    """Per-layer video features of B * M candidates, and their keys and values for the value expert (made once)."""

    def __init__(self, model: WAVTransformer, layers: tuple[Tensor, ...], candidates: int) -> None:
        self.model, self.layers, self.candidates = model, layers, candidates

    @cached_property
    def value_keys(self) -> Any:
        """Value expert's cross-attention K/V per layer, rows b * M + m."""
        return self.model.value_cache(self.layers)


class WAVPlannerModel:
    """A WAVTransformer behind :class:`wav.planner.PlannerModel`.

    Args:
        model: the transformer, in evaluation mode.
        shapes: noise shapes (:func:`noise_shapes`).

    Latents and tokens come and go in float32; the model computes in its own dtype.
    """

    def __init__(self, model: WAVTransformer, shapes: NoiseShapes) -> None:
        self.model, self._shapes = aligned(model), shapes

    @property
    def shapes(self) -> NoiseShapes:
        """Shapes of the noises; ``value`` is None without a value expert."""
        return self._shapes

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        device: torch.device = next(self.model.parameters()).device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in."""
        dtype: torch.dtype = next(self.model.parameters()).dtype
        return dtype

    @torch.no_grad()
    def begin(self, memory: Tensor, text: Tensor, text_mask: Tensor | None, history: Tensor | None) -> Context:
        """Handle of B observations.

        Args:
            memory: clean latents (B, V, C, Fm, h, w), oldest first, the current frame last.
            text: instruction embeddings (B, L, Ct).
            text_mask: (B, L), 1 for a token.
            history: (B, 1, Ca) = [zeros(action) | normalised state], or None.
        """
        mask = None if text_mask is None else text_mask.to(self.device)
        return Context(
            self._in(memory),
            self.model.encode_text(self._in(text), mask, cache=True),
            None if history is None else self._in(history),
        )

    @torch.no_grad()
    def video_features(self, context: Context, noise: Tensor, steps: int) -> Features:
        """Features of future noises (B, M, V, C, Ff, h, w): one pass at t = 1000 for ``steps`` 1.

        For ``steps`` > 1 the future is denoised and the features are those of the last pass, at sigma_(steps - 1).
        """
        future, M = self._in(noise).flatten(0, 1), noise.shape[1]
        sigmas = inference_sigmas(steps).tolist()
        for sigma, after in pairwise(sigmas[:-1]):
            future = self._denoise(context, future, M, sigma, after)
        layers = self._video(context, future, M, sigmas[-2], need_head=False).features
        return Features(self.model, layers, M)

    @torch.no_grad()
    def denoise_video(self, context: Context, noise: Tensor, steps: int) -> Tensor:
        """Future latents (B, V, C, Ff, h, w), float32, of their noise, fully denoised."""
        future = self._in(noise)
        for sigma, after in pairwise(inference_sigmas(steps).tolist()):
            future = self._denoise(context, future, 1, sigma, after)
        return future.float()

    @torch.no_grad()
    def denoise_value(self, features: Features, noise: Tensor, steps: int) -> Tensor:
        """Normalised values (B, M, N, A, Cv) of noises of that shape, all N on their candidate's K/V."""
        values = self._in(noise).flatten(0, 1)  # (B M, N, A, Cv)
        for sigma, after, timestep in self._steps(steps, values.shape[:2]):
            velocity = self.model.value(values, timestep, features.value_keys).velocity
            values = euler_step(values, velocity, sigma, after)
        return values.reshape(noise.shape).float()

    @torch.no_grad()
    def denoise_action(
        self, context: Context, features: Features, value: Tensor | None, noise: Tensor, steps: int
    ) -> Tensor:
        """Normalised actions (B, A, Ca) of noise of that shape.

        The action expert reads the value expert's features of ``value`` (B, A, Cv) as pure noise at t = 1000: the
        condition that the joint stage trains.
        """
        value_layers = None if value is None else self._value_layers(features, value)
        keys = self.model.action_cache(features.layers, value_layers)
        actions = self._in(noise)
        for sigma, after, timestep in self._steps(steps, actions.shape[:1]):
            velocity = self.model.action(actions, timestep, keys, history=context.history)
            actions = euler_step(actions, velocity, sigma, after)
        return actions.float()

    def _value_layers(self, features: Features, noise: Tensor) -> tuple[Tensor, ...]:
        """Value expert's features of pure noise (B, A, Cv) at t = 1000, per layer (B, A, d)."""
        level = torch.full(noise.shape[:1], NOISE_LEVEL, device=self.device)
        layers: tuple[Tensor, ...] = self.model.value(self._in(noise), level, features.value_keys).features
        return layers

    def _in(self, tensor: Tensor) -> Tensor:
        """``tensor`` where and in what the model computes, in memory that torch aligned (see :func:`aligned`)."""
        return tensor.to(self.device, self.dtype, copy=True)

    def _steps(self, steps: int, rows: torch.Size) -> Iterator[tuple[float, float, Tensor]]:
        """(sigma, next sigma, timesteps of shape ``rows``) of each Euler step."""
        for sigma, after in pairwise(inference_sigmas(steps).tolist()):
            yield sigma, after, torch.full(rows, sigma * NOISE_LEVEL, device=self.device)

    def _video(self, context: Context, future: Tensor, M: int, sigma: float, need_head: bool) -> Any:
        """One video pass of rows b * M + m at noise level sigma."""
        memory = context.memory.repeat_interleave(M, 0)
        level = torch.full((len(future),), sigma * NOISE_LEVEL, device=self.device)
        timestep = frame_timesteps(memory.shape[3], future.shape[3], level)
        return self.model.video(join_frames(memory, future), timestep, context.text, need_head=need_head)

    def _denoise(self, context: Context, future: Tensor, M: int, sigma: float, after: float) -> Tensor:
        """One Euler step of the future frames."""
        velocity = self._video(context, future, M, sigma, need_head=True).velocity
        return euler_step(future, velocity[:, :, :, -future.shape[3] :], sigma, after)


def aligned(model: WAVTransformer) -> WAVTransformer:
    """The model, with CPU parameters moved to memory that torch aligned.

    Weights mapped from a file start anywhere, and the last bits of a matrix product on a CPU depend on where its
    operands start: without this, the same weights would act differently once saved and loaded.
    """
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and parameter.data_ptr() % ALIGNMENT:
            parameter.data = parameter.data.clone()
    return model


def noise_shapes(
    model: WAVTransformer, views: int, grid: tuple[int, int], future_latents: int, action_chunk: int
) -> NoiseShapes:
    """Noise shapes of a model for V views, latent grid (h, w), Ff future latent frames and A actions."""
    config = model.config
    return NoiseShapes(
        video=(views, config.in_channels, future_latents, *grid),
        value=(action_chunk, config.value_in_channels) if model.has_value else None,
        action=(action_chunk, config.action_in_channels),
    )
