"""Stage 3: all three experts, with explicit weights of their losses."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from wav.flow_matching import mix, velocity_loss
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
        read, velocity = self._values(inputs, video.features, for_action, for_value)
        if roles.action:
            losses["action"] = self._action(inputs, for_action, read)
        if velocity is not None:
            clean = self._clean_values(inputs).unsqueeze(1)
            losses["value"] = velocity_loss(velocity, clean, inputs.draws.value_noise)
        if video.velocity is not None:
            first = roles.action + roles.value
            velocity = video.velocity[first:, :, :, self.memory_frames :]
            losses["video"] = velocity_loss(velocity, batch.future[first:], inputs.draws.video_noise[first:])
        return losses

    def _values(
        self, inputs: StepInputs, features: Sequence[Tensor], for_action: Sequence[Tensor], for_value: Sequence[Tensor]
    ) -> tuple[Sequence[Tensor] | None, Tensor | None]:
        """Value features that the action samples read, and velocities (n, Rv, A, Cv) of the value samples' draws.

        With one draw per sample both go through the expert together, which is a fifth fewer operations a step.
        """
        draws, action, value, expert = inputs.draws, inputs.roles.action, inputs.roles.value, self.model.value
        if not self.model.has_value:
            return None, None
        shown, shown_at = self.values_shown(inputs)
        own = mix(self._clean_values(inputs).unsqueeze(1), draws.value_noise, draws.value_level)
        own_at = self.timestep(draws.value_level)
        if action and value and own.shape[1] == 1:
            tokens, timestep = torch.cat([shown, own.squeeze(1)]), torch.cat([shown_at, own_at.squeeze(1)])
            both = expert(tokens, timestep, [layer[: action + value] for layer in features])
            return [layer[:action] for layer in both.features], both.velocity[action:].unsqueeze(1)
        read = expert(shown, shown_at, for_action).features if action else None
        return read, expert(own, own_at, for_value).velocity if value else None

    def values_shown(self, inputs: StepInputs) -> tuple[Tensor, Tensor]:
        """Value tokens (n, A, Cv) that the action samples read, and the timesteps (n,) told with them."""
        draws, true = inputs.draws, labelled_values(inputs.batch)[: inputs.roles.action]
        return mix(true, draws.condition_noise, draws.condition_level), self.timestep(draws.condition_level)

    def _clean_values(self, inputs: StepInputs) -> Tensor:
        """True values (n, A, Cv) of the value samples."""
        first = inputs.roles.action
        return labelled_values(inputs.batch)[first : first + inputs.roles.value]

    def _action(self, inputs: StepInputs, features: Sequence[Tensor], values: Sequence[Tensor] | None) -> Tensor:
        """The action samples' draws."""
        draws, rows = inputs.draws, inputs.roles.action
        clean = inputs.batch.actions[:rows].unsqueeze(1)
        tokens = mix(clean, draws.action_noise, draws.action_level)
        state = inputs.batch.state[:rows].unsqueeze(1)
        history = nn.functional.pad(state, (self.action_dim, 0))  # no action goes with the current state
        velocity = self.model.action(tokens, self.timestep(draws.action_level), features, values, history)
        return velocity_loss(velocity, clean, draws.action_noise)
