"""Backend ``torch``: the transformer's own calls behind the planner's protocol, the oracle of the other backends.

What does not change between candidates, samples or steps is computed once: the instruction's keys and values per
observation, a candidate's video keys and values for all its value samples and steps, the action's for all its steps.

Shapes: B observations, M candidates, N value samples, V views, C channels, Fm memory and Ff future latent frames,
h x w latent cells, A action chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from wav.errors import ConfigError
from wav.flow_matching import euler_step, frame_timesteps, inference_sigmas, join_frames
from wav.planning.types import NoiseShapes

if TYPE_CHECKING:
    from wav.model.transformer import WAVTransformer

ALIGNMENT = 64  #: bytes; where torch's own CPU allocations start
NOISE_LEVEL = 1000.0  #: timestep of pure noise, at which the experts are trained to read features


@dataclass(frozen=True)
class Context:
    """Conditioning of B observations."""

    memory: Tensor  #: clean latents (B, V, C, Fm, h, w)
    text: Any  #: the instructions, as the backend's video pass reads them
    history: Tensor | None  #: (B, 1, Ca): [zeros | normalised state]


@dataclass(frozen=True)
class Features:
    """What the experts read of B * M candidates, rows b * M + m."""

    keys: tuple[Any, ...]  #: per layer what the value expert attends to; empty without a value expert
    layers: tuple[Tensor, ...] | None  #: video features (B, V * F * h * w, D) per layer; kept of one candidate alone


class TorchPlannerModel:
    """A WAVTransformer behind :class:`wav.planning.types.PlannerModel`.

    Latents and tokens come and go in float32; the model computes in its own dtype. A faster backend inherits the Euler
    loops and replaces what they call: :meth:`begin` and the methods below :meth:`denoise_action`.
    """

    independent_rows: bool = False  #: whether each row's numbers depend on that row alone, bit for bit
    compiled: bool = False  #: whether compiled code computes, which rounds otherwise

    def __init__(self, model: WAVTransformer, shapes: NoiseShapes) -> None:
        self.model, self.shapes = aligned(model), shapes
        weight = next(model.parameters())
        self.device, self.dtype = weight.device, weight.dtype

    @property
    def width(self) -> int:
        """Width of a token in the video expert."""
        return int(self.model.config.num_attention_heads * self.model.config.attention_head_dim)

    @torch.no_grad()
    def begin(self, memory: Tensor, text: Tensor, text_mask: Tensor | None, history: Tensor | None) -> Any:
        """Handle of B observations.

        ``memory``: clean latents (B, V, C, Fm, h, w), the current frame last. ``text``: instruction embeddings
        (B, L, Ct), whose ``text_mask`` (B, L) is 1 for a token, or None where every token counts. ``history``:
        (B, 1, Ca) = [zeros(action) | normalised state], or None.
        """
        mask = None if text_mask is None else text_mask.to(self.device)
        states = self.model.video.encode_text(self._in(text), mask, cache=True)
        return Context(self._in(memory), states, None if history is None else self._in(history))

    @torch.no_grad()
    def video_features(self, context: Any, noise: Tensor, levels: tuple[float, ...]) -> Features:
        """Features of future noises (B, M, V, C, Ff, h, w), denoised along ``levels`` and read at the last.

        A single level of 1 is one pass on pure noise.
        """
        future = self._denoise(context, self._in(noise).flatten(0, 1), levels)
        return self._features(context, future, levels[-1] * NOISE_LEVEL, keep=noise.shape[1] == 1)

    @torch.no_grad()
    def denoise_video(self, context: Any, noise: Tensor, steps: int) -> Tensor:
        """Future latents (B, V, C, Ff, h, w), float32, of their noise, fully denoised."""
        return self._denoise(context, self._in(noise), inference_sigmas(steps).tolist()).float()

    @torch.no_grad()
    def denoise_value(self, features: Features, noise: Tensor, steps: int) -> Tensor:
        """Normalised values (B, M, N, A, Cv) of noises of that shape, all N on their candidate's keys and values."""
        values = self._in(noise).flatten(0, 1)  # (B M, N, A, Cv)
        for sigma, after in pairwise(inference_sigmas(steps).tolist()):
            velocity, _ = self._value(features.keys, values, sigma * NOISE_LEVEL)
            values = euler_step(values, velocity, sigma, after)
        return values.view(noise.shape).float()

    @torch.no_grad()
    def denoise_action(
        self,
        context: Any,
        features: Features,
        value: Tensor | None,
        noise: Tensor,
        steps: int,
        value_level: float = 1.0,
    ) -> Tensor:
        """Normalised actions (B, A, Ca) of noise of that shape.

        The action expert reads the value expert's features of the tokens ``value`` (B, A, Cv), which are told to be at
        the noise level ``value_level``: pure noise at 1. ``features`` must be of one candidate, else ConfigError.
        """
        if features.layers is None:
            raise ConfigError("features of several candidates: actions are decoded from one; pass that one's features")
        reads = None
        if value is not None:
            _, reads = self._value(features.keys, self._in(value), value_level * NOISE_LEVEL, keep=True)
        cache, actions = self._action_cache(features.layers, reads), self._in(noise)
        for sigma, after in pairwise(inference_sigmas(steps).tolist()):
            actions = euler_step(actions, self._action(cache, actions, sigma * NOISE_LEVEL, context), sigma, after)
        return actions.float()

    def _denoise(self, context: Any, future: Tensor, sigmas: Sequence[float]) -> Tensor:
        """Euler steps of future frames (rows, V, C, Ff, h, w) along ``sigmas``."""
        for sigma, after in pairwise(sigmas):
            future = euler_step(future, self._velocity(context, future, sigma * NOISE_LEVEL), sigma, after)
        return future

    def _in(self, tensor: Tensor) -> Tensor:
        """``tensor`` where and in what the model computes, in memory that torch aligned (see :func:`aligned`)."""
        return tensor.to(self.device, self.dtype, copy=True)

    def _video(self, context: Context, future: Tensor, timestep: float, head: bool) -> Any:
        """One pass of the video DiT on ``future`` (B * M, V, C, Ff, h, w) behind its observation's memory."""
        memory = context.memory.repeat_interleave(len(future) // len(context.memory), 0)
        level = torch.full((len(future),), timestep, device=self.device)
        levels = frame_timesteps(memory.shape[3], future.shape[3], level)
        first = memory.shape[3] if head else 0  # of the velocity only future frames are wanted
        return self.model.video(join_frames(memory, future), levels, context.text, need_head=head, first_frame=first)

    def _velocity(self, context: Any, future: Tensor, timestep: float) -> Tensor:
        """Velocity of the future frames (B * M, V, C, Ff, h, w)."""
        return self._video(context, future, timestep, head=True).velocity  # type: ignore[no-any-return]

    def _features(self, context: Any, future: Tensor, timestep: float, keep: bool) -> Features:
        """Features of rows b * M + m; ``keep`` those that the action expert reads."""
        layers = self._video(context, future, timestep, head=False).features
        keys = self.model.value.cache(layers) if self.model.has_value else ()
        return Features(tuple(keys), tuple(layers) if keep else None)

    def _value(
        self, keys: Sequence[Any], tokens: Tensor, timestep: float, keep: bool = False
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """Velocity of value tokens (rows, A, Cv) or (rows, N, A, Cv), and their features per layer where ``keep``."""
        level = torch.full((len(tokens),), timestep, device=self.device)
        output = self.model.value(tokens, level, keys)
        return output.velocity, output.features if keep else ()

    def _action_cache(self, layers: Sequence[Tensor], value: Sequence[Tensor] | None) -> Any:
        """What the action expert attends to in every step."""
        return self.model.action.cache(layers, value)

    def _action(self, cache: Any, tokens: Tensor, timestep: float, context: Any) -> Tensor:
        """Velocity of action tokens (B, A, Ca)."""
        level = torch.full((len(tokens),), timestep, device=self.device)
        velocity: Tensor = self.model.action(tokens, level, cache, history=context.history)
        return velocity


def aligned(model: WAVTransformer) -> WAVTransformer:
    """The model, with CPU parameters moved to memory that torch aligned.

    Weights mapped from a file start anywhere, and the last bits of a matrix product on a CPU depend on where its
    operands start: without this, the same weights would act differently once saved and loaded.
    """
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and parameter.data_ptr() % ALIGNMENT:
            parameter.data = parameter.data.clone()
    return model
