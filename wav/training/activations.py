"""Sizes of a model and of what it looks at, and an estimate of the activations that a backward pass keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from wav.model.build import value_channels

if TYPE_CHECKING:
    from wav.config import DataSettings, ModelSettings, Settings, TrainJointSettings, TrainSettings, TrainValueSettings

#: Tensors of a block that autograd keeps for one token (or that live at once when the block is recomputed), in units
#: of the block's width: inputs, AdaLN and norms, q k v, attention, the 4 x wide feed-forward. Measured, see the tests.
SAVED_PER_TOKEN = 34


@dataclass(frozen=True)
class Sizes:
    """Everything that decides what a pass costs; 0 for the width of an expert that the model lacks."""

    layers: int
    width: int
    value_width: int
    action_width: int
    views: int
    memory: int
    future: int
    height: int
    image_width: int
    chunk: int
    text: int
    latent_channels: int
    caption_channels: int
    value_channels: int
    action_channels: int

    @classmethod
    def of(cls, settings: Settings) -> Sizes:
        """Sizes that a parameter file means; the latent grid follows from ``encode.patch`` and ``encode.temporal``."""
        data, encode = settings.data, settings.encode
        grid = (
            1 + (data.future_frames - 1) // encode.temporal,
            data.image_height // encode.patch,
            data.image_width // encode.patch,
        )
        return cls.on(grid, (encode.channels, encode.text_dim, value_channels(data)), settings.model, data)

    @classmethod
    def on(
        cls, grid: tuple[int, int, int], channels: tuple[int, int, int], model: ModelSettings, data: DataSettings
    ) -> Sizes:
        """Sizes on a latent grid (future frames, height, width), with channels of latents, captions and values."""
        return cls(
            layers=model.layers,
            width=model.heads * model.head_dim,
            value_width=model.value_heads * model.value_head_dim if model.value_expert else 0,
            action_width=model.action_heads * model.action_head_dim,
            views=len(data.views),
            memory=data.memory_frames,
            future=grid[0],
            height=grid[1],
            image_width=grid[2],
            chunk=data.action_chunk,
            text=data.text_tokens,
            latent_channels=channels[0],
            caption_channels=channels[1],
            value_channels=channels[2],
            action_channels=data.action_dim + data.state_dim,
        )

    @property
    def frames(self) -> int:
        """Latent frames F, memory and future."""
        return self.memory + self.future

    @property
    def tokens(self) -> int:
        """Video tokens T of a sample, all views."""
        return self.views * self.frames * self.height * self.image_width


def activation_bytes(sizes: Sizes, train: TrainSettings, micro_batch: int) -> float:
    """Estimate of the activations kept for the backward pass of one micro-batch.

    Every block's output is kept (the experts read it). With gradient checkpointing one video block's inner tensors
    are alive on top, otherwise those of all blocks; a frozen video part keeps its outputs alone. ``auto`` counts as on:
    it is what a pass needs at the least.
    """
    number = 2 if train.precision == "bf16" else 4
    video, kept = sizes.tokens * sizes.width, sizes.layers if train.gradient_checkpointing == "off" else 1
    elements: float = sizes.layers * video
    if train.stage != "train_value":
        elements += kept * SAVED_PER_TOKEN * video
    experts = 0.0
    if train.stage == "train_value":
        experts = cast("TrainValueSettings", train).value_draws * sizes.value_width
    elif train.stage == "train_joint":
        joint = cast("TrainJointSettings", train)
        experts = joint.action_draws * sizes.action_width + joint.value_draws * sizes.value_width
    elements += sizes.chunk * experts * (sizes.layers + kept * SAVED_PER_TOKEN)
    if experts:  # one layer's keys and values, or all
        elements += kept * 4 * sizes.tokens * (sizes.value_width + sizes.action_width)
    return number * micro_batch * elements
