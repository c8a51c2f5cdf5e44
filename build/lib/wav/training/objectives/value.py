"""Stage 2: the value expert on the features of the video expert, which is frozen."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from wav.flow_matching import mix, velocity_loss
from wav.training.draws import Roles, StepInputs
from wav.training.objectives.base import Objective, labelled_values


class ValueObjective(Objective):
    """Several draws of a value trajectory share one video pass, whose input is what planning reads.

    That is pure noise, or the true future at a level of section ``coupling``.
    """

    def trained(self) -> Iterable[nn.Parameter]:
        """The value expert's."""
        return self.model.value.parameters()

    def roles(self, size: int, index: int) -> Roles:
        """All are value samples."""
        return Roles(0, size, 0)

    def losses(self, inputs: StepInputs) -> dict[str, Tensor]:
        """Velocity error of the value tokens."""
        batch, draws = inputs.batch, inputs.draws
        latents, timestep = self.noised_video(inputs)
        with torch.no_grad():
            features = self.model.video(latents, timestep, batch.text, batch.text_mask, need_head=False).features
        clean = labelled_values(batch).unsqueeze(1)
        tokens = mix(clean, draws.value_noise, draws.value_level)
        output = self.model.value(tokens, self.timestep(draws.value_level), features)
        return {"value": velocity_loss(output.velocity, clean, draws.value_noise)}
