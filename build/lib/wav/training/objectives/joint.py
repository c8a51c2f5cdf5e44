"""Stage 3: all three experts, with explicit weights of their losses."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from wav.flow_matching import mix, velocity_loss
from wav.model import ExpertOutput
from wav.training.draws import Roles, StepInputs, share
from wav.training.objectives.base import Objective, labelled_values


class JointObjective(Objective):
    """One video pass in which every sample plays one role: action, value or video, in this order of rows.

    Action samples read the features of their video and of value tokens at a level of their own; value samples those of
    their video; video samples train the video expert. Draws of one sample share its keys and values.
    """

    def trained(self) -> Iterable[nn.Parameter]:
        """Everything."""
        return self.parameters()

    def roles(self, size: int, index: int) -> Roles:
        """``action_probability`` of the samples are action samples; value and video halve the rest."""
        probability = self.settings.action_probability
        action = share(index, size, probability)
        rest = size - action
        value = min(rest, share(index, size, (1 - probability) / 2)) if self.model.has_value else 0
        return Roles(action, value, rest - value)

    def weight(self, name: str) -> float:
        """Of the settings."""
        return float(getattr(self.settings, f"weight_{name}"))

    def losses(self, inputs: StepInputs) -> dict[str, Tensor]:
        """Velocity errors of action tokens, value tokens and future frames, of the roles that have samples."""
        batch, roles = inputs.batch, inputs.roles
        latents, timestep = self.noised_video(inputs)
        video = self.model.video(latents, timestep, batch.text, batch.text_mask, need_head=roles.video > 0)
        sizes = [roles.action, roles.value, roles.video]
        for_action, for_value, _ = zip(*(layer.split(sizes) for layer in video.features), strict=True)
        losses: dict[str, Tensor] = {}
        if roles.action:
            losses["action"] = self._action(inputs, for_action)
        if roles.value:
            losses["value"] = self._value(inputs, for_value)
        if video.velocity is not None:
            first = roles.action + roles.value
            velocity = video.velocity[first:, :, :, self.memory_frames :]
            losses["video"] = velocity_loss(velocity, batch.future[first:], inputs.draws.video_noise[first:])
        return losses

    def values_read(self, inputs: StepInputs, features: Sequence[Tensor]) -> Sequence[Tensor] | None:
        """Features of the value tokens that the action samples read; None without a value expert."""
        if not self.model.has_value:
            return None
        draws, clean = inputs.draws, labelled_values(inputs.batch)[: inputs.roles.action]
        tokens = mix(clean, draws.condition_noise, draws.condition_level)
        output: ExpertOutput = self.model.value(tokens, self.timestep(draws.condition_level), features)
        return output.features

    def _action(self, inputs: StepInputs, features: Sequence[Tensor]) -> Tensor:
        """The action samples' draws."""
        draws, rows = inputs.draws, inputs.roles.action
        values = self.values_read(inputs, features)
        clean = inputs.batch.actions[:rows].unsqueeze(1)
        tokens = mix(clean, draws.action_noise, draws.action_level)
        state = inputs.batch.state[:rows].unsqueeze(1)
        history = nn.functional.pad(state, (self.action_dim, 0))  # no action goes with the current state
        velocity = self.model.action(tokens, self.timestep(draws.action_level), features, values, history)
        return velocity_loss(velocity, clean, draws.action_noise)

    def _value(self, inputs: StepInputs, features: Sequence[Tensor]) -> Tensor:
        """The value samples' draws."""
        draws, first = inputs.draws, inputs.roles.action
        clean = labelled_values(inputs.batch)[first : first + inputs.roles.value].unsqueeze(1)
        tokens = mix(clean, draws.value_noise, draws.value_level)
        output = self.model.value(tokens, self.timestep(draws.value_level), features)
        return velocity_loss(output.velocity, clean, draws.value_noise)
