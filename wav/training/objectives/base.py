"""What the objectives of all stages share: roles of the samples, their draws, and the input of the video expert."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from wav.data.windows import WindowBatch
from wav.errors import ConfigError
from wav.flow_matching import frame_timesteps, join_frames, mix, timesteps
from wav.training.draws import Roles, SeededRandom, StepInputs, draw, drop_captions

if TYPE_CHECKING:
    from wav.config import CouplingSettings, TrainSettings
    from wav.data.windows import WindowDataset
    from wav.model import WAVTransformer
    from wav.training.graphs import PassGraphs


class Objective(nn.Module, ABC):
    """The model with one stage's loss around it.

    The whole pass happens inside one ``forward``, and every part of the model is called as a module, so that
    DeepSpeed's hooks, which gather parameters (ZeRO-3), see it. Exactly the parameters of :meth:`trained` require a
    gradient. ``memory_frames`` of a window lie before its future; ``action_dim`` numbers of an action stand in front of
    the state in an action token; ``coupling`` says what value and action samples are shown of the truth.
    """

    def __init__(
        self,
        model: WAVTransformer,
        settings: TrainSettings,
        memory_frames: int,
        action_dim: int,
        coupling: CouplingSettings | None = None,
    ) -> None:
        super().__init__()
        self.coupling = coupling
        self.graphs: PassGraphs | None = None  #: what computes passes of training, if not :meth:`compute`
        self.model = model
        self.settings: Any = settings  # a subclass reads the fields of its own stage's section
        self.memory_frames, self.action_dim = memory_frames, action_dim
        trained = {id(parameter) for parameter in self.trained()}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in trained)

    @abstractmethod
    def trained(self) -> Iterable[nn.Parameter]:
        """The parameters that this stage trains."""

    @abstractmethod
    def roles(self, size: int, index: int) -> Roles:
        """Roles of the ``size`` samples of micro-batch ``index`` (counted over the run); the same on every rank."""

    @abstractmethod
    def losses(self, inputs: StepInputs) -> dict[str, Tensor]:
        """Loss of every role that has samples: scalars with gradient, float32, named video, value, action."""

    def weight(self, name: str) -> float:
        """Weight of a loss of :meth:`losses` in the sum."""
        return 1.0

    def draw(self, batch: WindowBatch, captions: WindowDataset | None, random: SeededRandom, index: int) -> StepInputs:
        """Draw everything random of one micro-batch, before ``forward`` and on another thread.

        Without ``captions``, which hold the empty instruction, none is dropped. ``index`` counts the micro-batches of
        the run and decides the roles.
        """
        roles = self.roles(len(batch), index)
        draws = draw(batch, roles, self.settings, self.coupling, random, has_value=self.model.has_value)
        if captions is not None and self.settings.caption_dropout > 0:
            drop = random.uniform("caption_dropout", (len(batch),)) < self.settings.caption_dropout
            batch = drop_captions(batch, drop, captions)
        return StepInputs(batch, draws, roles)

    def forward(self, inputs: StepInputs) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss (a scalar with gradient) and its detached parts, named loss_video, loss_value, loss_action."""
        graphs = self.graphs if self.training and torch.is_grad_enabled() else None
        return graphs(inputs) if graphs else self.compute(inputs)

    def compute(self, inputs: StepInputs) -> tuple[Tensor, dict[str, Tensor]]:
        """What :meth:`forward` gives, launched kernel by kernel."""
        losses = self.losses(inputs)
        total = torch.stack([self.weight(name) * loss for name, loss in losses.items()]).sum()
        return total, {f"loss_{name}": loss.detach() for name, loss in losses.items()}

    def noised_video(self, inputs: StepInputs) -> tuple[Tensor, Tensor]:
        """Input of the video expert: latents (B, V, C, F, h, w) and timesteps (B, F).

        Memory frames are corrupted by a small rate and always carry timestep 0; the future is at the sample's level,
        which is pure noise where the level is 1.
        """
        batch, draws = inputs.batch, inputs.draws
        memory = mix(batch.memory, draws.memory_noise, draws.memory_rate)
        future = mix(batch.future, draws.video_noise, draws.video_level)
        told = frame_timesteps(self.memory_frames, future.shape[3], self.timestep(draws.video_level))
        return join_frames(memory, future), told

    def timestep(self, level: Tensor) -> Tensor:
        """What the model is told about a noise level."""
        return timesteps(level)


def labelled_values(batch: WindowBatch) -> Tensor:
    """Values (B, A, Cv) of the windows; ConfigError where they were read without reward labels."""
    if batch.values is None:
        raise ConfigError(
            "the value expert needs reward labels; give the run data/rewards or set model.value_expert=false"
        )
    return batch.values
