"""Stage 1: the video expert on the future frames."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from wav.flow_matching import velocity_loss
from wav.training.draws import Roles, StepInputs
from wav.training.objectives.base import Objective


class VideoObjective(Objective):
    """Every sample's future is at its own level; memory frames are read and have no loss."""

    def trained(self) -> Iterable[nn.Parameter]:
        """The video expert's."""
        return self.model.video.parameters()

    def roles(self, size: int, index: int) -> Roles:
        """All are video samples."""
        return Roles(0, 0, size)

    def losses(self, inputs: StepInputs) -> dict[str, Tensor]:
        """Velocity error of the future frames."""
        batch = inputs.batch
        latents, timestep = self.noised_video(inputs)
        output = self.model.video(latents, timestep, batch.text, batch.text_mask, first_frame=self.memory_frames)
        assert output.velocity is not None
        return {"video": velocity_loss(output.velocity, batch.future, inputs.draws.video_noise)}
