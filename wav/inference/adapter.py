"""The planner's view of a :class:`~wav.model.transformer.WAVTransformer`: keys and values once, Euler loops around.

Everything that does not change between candidates, samples or steps is computed once: the instruction's K/V and the
memory frames' first projections per observation, a candidate's video K/V per layer for all its value samples and
steps, the action loop's K/V for all its steps, AdaLN rows per noise level (:mod:`wav.inference.fused`). Nothing
is tiled
and no features are kept of candidates that only scoring reads: their K/V are projected as the video pass goes.

Shapes: B observations, M candidates, N value samples, V views, C channels, F = Fm memory + Ff future latent frames,
A action chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from wav.errors import ConfigError
from wav.flow_matching import euler_step, inference_sigmas
from wav.inference.fused import Expert, Prepared
from wav.planning.types import NoiseShapes

if TYPE_CHECKING:
    from wav.model.transformer import WAVTransformer

ALIGNMENT = 64  #: bytes; where torch's own CPU allocations start
NOISE_LEVEL = 1000.0  #: timestep of pure noise, at which the experts are trained to read features


@dataclass(frozen=True)
class Context:
    """Conditioning of B observations."""

    memory: tuple[Tensor, Tensor, Tensor]  #: what the clean memory frames are for every candidate
    text: list[Tensor]  #: per layer keys and values (B, L, 2, D)
    bias: Tensor | None  #: (B, 1, 1, L), added to the logits; None where every token counts
    history: Tensor | None  #: (B, 1, Ca): [zeros | normalised state]

    def rows(self, part: slice) -> Context:
        """Conditioning of some of the observations, in the same memory."""
        first, pair, value = self.memory
        bias, history = (None if x is None else x[part] for x in (self.bias, self.history))
        return Context((first[part], pair[part], value[part]), [x[part] for x in self.text], bias, history)


@dataclass(frozen=True)
class Features:
    """What the experts read of B * M candidates, rows b * M + m."""

    keys: tuple[Tensor, ...]  #: value expert's keys and values per layer (B * M, V F h w, 2, d)
    layers: tuple[Tensor, ...] | None  #: video features per layer (B * M, V F h w, D); kept of one candidate alone


class WAVPlannerModel:
    """A WAVTransformer behind :class:`wav.planning.types.PlannerModel`.

    Args:
        model: the transformer, in evaluation mode.
        shapes: noise shapes (:func:`noise_shapes`).

    Latents and tokens come and go in float32; the model computes in its own dtype.
    """

    prepared_kind: ClassVar[type[Prepared]] = Prepared

    def __init__(self, model: WAVTransformer, shapes: NoiseShapes) -> None:
        self.model, self._shapes = aligned(model), shapes
        self._prepared: Prepared | None = None

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

    @property
    def independent_rows(self) -> bool:
        """Whether each row's numbers depend on that row alone, bit for bit: the compiled kernels compute.

        True of features read at one step; a video is denoised through a head that is the library's product.
        """
        return self.prepared.proj_in.native

    @property
    def prepared(self) -> Prepared:
        """The model as inference computes it, made again after its weights have changed."""
        if self._prepared is None or not self._prepared.current:
            with torch.inference_mode(False), torch.no_grad():
                self._prepared = self.prepared_kind(self.model)
        return self._prepared

    @torch.no_grad()
    def begin(self, memory: Tensor, text: Tensor, text_mask: Tensor | None, history: Tensor | None) -> Context:
        """Handle of B observations.

        Args:
            memory: clean latents (B, V, C, Fm, h, w), oldest first, the current frame last.
            text: instruction embeddings (B, L, Ct).
            text_mask: (B, L), 1 for a token.
            history: (B, 1, Ca) = [zeros(action) | normalised state], or None.
        """
        prepared = self.prepared
        if text_mask is not None:
            text_mask = None if text_mask.device.type == "cpu" and bool(text_mask.all()) else text_mask.to(self.device)
        states = self.model.video.encode_text(self._in(text), text_mask)
        return Context(
            prepared.memory(self._in(memory)),
            prepared.text(states.states),
            states.bias,
            None if history is None else self._in(history),
        )

    @torch.no_grad()
    def video_features(self, context: Context, noise: Tensor, steps: int) -> Features:
        """Features of future noises (B, M, V, C, Ff, h, w): one pass at t = 1000 for ``steps`` 1.

        For ``steps`` > 1 the future is denoised and the features are those of the last pass, at sigma_(steps - 1).
        """
        future, prepared = self._in(noise).flatten(0, 1), self._weights()
        sigmas = inference_sigmas(steps).tolist()
        for sigma, after in pairwise(sigmas[:-1]):
            future = self._denoise(context, future, sigma, after)
        keys: list[Tensor] = []
        layers: list[Tensor] = []
        value = prepared.experts.get("value")

        def read(index: int, features: Tensor) -> None:
            if value is not None:
                keys.append(value.layers[index].cross.keys_values(features))
            if noise.shape[1] == 1:
                layers.append(features)

        level = sigmas[-2] * NOISE_LEVEL
        prepared.video(context.memory, future, level, context.text, context.bias, read, head=False)
        return Features(tuple(keys), tuple(layers) if layers else None)

    @torch.no_grad()
    def denoise_video(self, context: Context, noise: Tensor, steps: int) -> Tensor:
        """Future latents (B, V, C, Ff, h, w), float32, of their noise, fully denoised."""
        future = self._in(noise)
        for sigma, after in pairwise(inference_sigmas(steps).tolist()):
            future = self._denoise(context, future, sigma, after)
        return future.float()

    @torch.no_grad()
    def denoise_value(self, features: Features, noise: Tensor, steps: int) -> Tensor:
        """Normalised values (B, M, N, A, Cv) of noises of that shape, all N on their candidate's K/V."""
        values, expert = self._in(noise).flatten(0, 2), self._expert("value")  # (B M N, A, Cv)
        for sigma, after in pairwise(inference_sigmas(steps).tolist()):
            velocity, _ = expert(values, sigma * NOISE_LEVEL, features.keys)
            values = euler_step(values, velocity, sigma, after)
        return values.reshape(noise.shape).float()

    @torch.no_grad()
    def denoise_action(
        self, context: Context, features: Features, value: Tensor | None, noise: Tensor, steps: int
    ) -> Tensor:
        """Normalised actions (B, A, Ca) of noise of that shape.

        The action expert reads the value expert's features of ``value`` (B, A, Cv) as pure noise at t = 1000: the
        condition that the joint stage trains.

        Raises:
            ConfigError: ``features`` are of several candidates; actions are decoded from one.
        """
        if features.layers is None:
            raise ConfigError("features of several candidates: actions are decoded from one; pass that one's features")
        expert, conditions = self._expert("action"), None
        if value is not None:
            read = [layer.third for layer in expert.layers]
            pairs = zip(read, self._value_layers(features, value), strict=True)
            conditions = [third.keys_values(layer) for third, layer in pairs if third is not None]
        keys = [layer.cross.keys_values(video) for layer, video in zip(expert.layers, features.layers, strict=True)]
        actions = self._in(noise)
        for sigma, after in pairwise(inference_sigmas(steps).tolist()):
            velocity, _ = expert(actions, sigma * NOISE_LEVEL, keys, conditions, context.history)
            actions = euler_step(actions, velocity, sigma, after)
        return actions.float()

    def _value_layers(self, features: Features, noise: Tensor) -> tuple[Tensor, ...]:
        """Value expert's features of pure noise (B, A, Cv) at t = 1000, per layer (B, A, d)."""
        return self._expert("value")(self._in(noise), NOISE_LEVEL, features.keys, keep=True)[1]

    def _weights(self) -> Prepared:
        """What :meth:`begin` prepared; weights are looked at once per observation."""
        return self.prepared if self._prepared is None else self._prepared

    def _expert(self, name: str) -> Expert:
        """One expert; raises ConfigError where the model has none."""
        self.model.expert(name)
        return self._weights().experts[name]

    def _in(self, tensor: Tensor) -> Tensor:
        """``tensor`` where and in what the model computes, in memory that torch aligned (see :func:`aligned`)."""
        return tensor.to(self.device, self.dtype, copy=True)

    def _denoise(self, context: Context, future: Tensor, sigma: float, after: float) -> Tensor:
        """One Euler step of the future frames."""
        velocity = self._weights().video(
            context.memory, future, sigma * NOISE_LEVEL, context.text, context.bias, lambda *_: None, head=True
        )
        assert velocity is not None
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
