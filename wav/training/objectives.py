"""The losses of the three training stages (flow matching; x_s = (1-s) x1 + s x0, target v = x0 - x1).

Stage 1 (video): mean squared velocity error on the future frames alone. Stage 2 (value): the video expert is
frozen and sees pure noise at t = 1000, the input of inference. Stage 3 (joint): one forward in which every sample
plays one role: *action* (video and value at t = 1000, action loss), *value* (video at t = 1000, value loss) or
*video* (its own level, video loss).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from wav.data.windows import WindowBatch
from wav.errors import ConfigError
from wav.flow_matching import (
    frame_timesteps,
    join_frames,
    masked_loss,
    mix,
    mix_memory,
    reference_loss,
    reference_timesteps,
    timesteps,
    token_loss,
    velocity_target,
)
from wav.model import WAVTransformer
from wav.model.frozen import FrozenVideo
from wav.training.draws import CLEAN, Compat, StepInputs

if TYPE_CHECKING:
    from wav.config import TrainJointSettings, TrainSettings


def trainable_names(model: WAVTransformer, settings: TrainSettings) -> set[str]:
    """Names of the parameters a stage trains: the video expert, the value expert, or everything."""
    names = [name for name, _ in model.named_parameters()]
    if settings.stage == "train_joint":
        return set(names)
    if settings.stage == "train_value":
        return {name for name in names if name.startswith("value_")}
    if settings.stage == "pretrain_video":
        return {name for name in names if not name.startswith(("value_", "action_"))}
    raise ConfigError(f"training settings {type(settings).__name__}: no stage has these; use one of the three stages'")


class StageModule(nn.Module):
    """The model with one stage's objective around it: ``forward(inputs)`` gives (loss, parts of the loss).

    The whole pass happens inside one ``forward`` and through the model's own ``forward``, so that DeepSpeed's
    parameter-gathering hooks (ZeRO-3) see it.
    """

    def __init__(
        self,
        model: WAVTransformer,
        settings: TrainSettings,
        memory_frames: int,
        action_dim: int,
        compat: Compat = CLEAN,
    ) -> None:
        super().__init__()
        self.model = model
        self.settings = settings
        self.memory_frames = memory_frames
        self.action_dim = action_dim
        self.compat = compat
        self.frozen = FrozenVideo(model)
        chosen = trainable_names(model, settings)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in chosen)

    def forward(self, inputs: StepInputs) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss (a scalar with gradient, float32) and its detached parts, named loss_video, loss_value, loss_action."""
        if self.settings.stage == "train_joint":
            return self._joint(inputs, cast("TrainJointSettings", self.settings))
        if self.settings.stage == "train_value":
            return self._value(inputs)
        return self._video(inputs)

    def _latents(self, inputs: StepInputs) -> tuple[Tensor, Tensor]:
        """Model input (B, V, C, F, h, w): corrupted memory, then the future at its level; and timesteps (B, F).

        Rows that are not video samples hold pure noise at t = 1000.
        """
        batch, draws = inputs.batch, inputs.draws
        memory = mix_memory(batch.memory, draws.memory_noise, draws.memory_rate)
        rows, size = inputs.roles.video, len(batch)
        level = torch.cat([draws.video_label, draws.video_level])
        future = draws.future_noise
        if rows:
            noised = mix(batch.future[size - rows :], future[size - rows :], draws.video_level)
            future = torch.cat([future[: size - rows], noised])
        timestep = frame_timesteps(self.memory_frames, future.shape[3], self._timestep(level))
        return self._cast(join_frames(memory, future)), timestep

    def _video(self, inputs: StepInputs) -> tuple[Tensor, dict[str, Tensor]]:
        latents, timestep = self._latents(inputs)
        batch = inputs.batch
        first = 0 if self.compat.diluted_video_loss else self.memory_frames  # no loss on what is before
        output = self.model(latents, timestep, self._cast(batch.text), batch.text_mask, first_frame=first)
        loss = self._video_loss(output.video, inputs)
        return loss, {"loss_video": loss.detach()}

    def _value(self, inputs: StepInputs) -> tuple[Tensor, dict[str, Tensor]]:
        latents, timestep = self._latents(inputs)
        batch, draws = inputs.batch, inputs.draws
        noised = mix(_values(batch).unsqueeze(1), draws.value_noise, draws.value_level)
        text = self._cast(batch.text)
        features = None
        if self.frozen.usable and not self.compat.random_labels:  # all at t = 1000
            memory, noise = latents.split([self.memory_frames, latents.shape[3] - self.memory_frames], dim=3)
            features = self.frozen.features(memory, noise, text, batch.text_mask)
        output = self.model(
            latents,
            timestep,
            text,
            batch.text_mask,
            need_video=False,
            freeze_video=True,
            features=features,
            value_tokens=self._cast(noised),
            value_timestep=self._timestep(draws.value_level),
        )
        target = velocity_target(_values(batch).unsqueeze(1), draws.value_noise)
        loss = token_loss(output.value, target).mean()
        return loss, {"loss_value": loss.detach()}

    def _joint(self, inputs: StepInputs, settings: TrainJointSettings) -> tuple[Tensor, dict[str, Tensor]]:
        latents, timestep = self._latents(inputs)
        batch, roles = inputs.batch, inputs.roles
        experts: dict[str, Any] = {}
        if roles.value or (roles.action and self.model.has_value):
            experts |= self._value_inputs(inputs)
        if roles.action:
            experts |= self._action_inputs(inputs)
        output = self.model(
            latents, timestep, self._cast(batch.text), batch.text_mask, need_video=roles.video > 0, **experts
        )
        parts: dict[str, Tensor] = {}
        if roles.action:
            clean = batch.actions[: roles.action].unsqueeze(1)
            target = velocity_target(clean, inputs.draws.action_noise)
            parts["loss_action"] = token_loss(output.action, target).mean()
        if roles.value:
            clean = _values(batch)[roles.action : roles.action + roles.value].unsqueeze(1)
            target = velocity_target(clean, inputs.draws.value_noise).flatten(0, 1)
            condition = len(inputs.draws.condition_noise)
            parts["loss_value"] = token_loss(output.value[condition:], target).mean()
        if roles.video:
            parts["loss_video"] = self._video_loss(output.video, inputs)
        weights = {
            "loss_action": settings.weight_action,
            "loss_value": settings.weight_value,
            "loss_video": settings.weight_video,
        }
        loss = torch.stack([weights[name] * part for name, part in parts.items()]).sum()
        return loss, {name: part.detach() for name, part in parts.items()}

    def _value_inputs(self, inputs: StepInputs) -> dict[str, Any]:
        """One value pass: pure noise at t = 1000 for the action rows, then the value rows' draws at their levels."""
        batch, draws, roles = inputs.batch, inputs.draws, inputs.roles
        condition, repeats = len(draws.condition_noise), draws.value_level.shape[1]
        clean = _values(batch)[roles.action : roles.action + roles.value].unsqueeze(1)
        noised = mix(clean, draws.value_noise, draws.value_level).flatten(0, 1)
        level = torch.cat([draws.condition_label, draws.value_level.flatten()])
        index = torch.arange(roles.action, roles.action + roles.value, device=noised.device).repeat_interleave(repeats)
        return {
            "value_tokens": self._cast(torch.cat([draws.condition_noise, noised])),
            "value_timestep": self._timestep(level),
            "value_rows": torch.cat([torch.arange(condition, device=noised.device), index]),
            "value_sources": roles.action + roles.value,
        }

    def _action_inputs(self, inputs: StepInputs) -> dict[str, Tensor | slice | None]:
        """The action rows: their draws at their levels, reading their own video and value features and state."""
        batch, draws, rows = inputs.batch, inputs.draws, inputs.roles.action
        clean = batch.actions[:rows].unsqueeze(1)
        noised = mix(clean, draws.action_noise, draws.action_level)
        state = batch.state[:rows].unsqueeze(1)
        history = torch.cat([state.new_zeros(rows, 1, self.action_dim), state], dim=-1)
        return {
            "action_tokens": self._cast(noised),
            "action_timestep": self._timestep(draws.action_level),
            "action_rows": slice(0, rows),
            "action_value_rows": slice(0, rows) if self.model.has_value else None,
            "history": self._cast(history),
        }

    def _video_loss(self, velocity: Tensor, inputs: StepInputs) -> Tensor:
        """Mean squared error over the video rows' future frames."""
        start = len(inputs.batch) - inputs.roles.video
        target = velocity_target(inputs.batch.future[start:], inputs.draws.future_noise[start:])
        velocity = velocity[start:]
        if self.compat.diluted_video_loss:
            memory = torch.zeros_like(velocity[:, :, :, : self.memory_frames])
            return reference_loss(velocity, join_frames(memory, target), self.memory_frames).mean()
        return masked_loss(velocity[:, :, :, -target.shape[3] :], target, memory_frames=0).mean()

    def _timestep(self, level: Tensor) -> Tensor:
        """What the model is told about a noise level."""
        if self.compat.integer_timesteps:
            return reference_timesteps(level, next(self.model.parameters()).dtype).to(level)
        return timesteps(level)

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor.to(next(self.model.parameters()).dtype)


def _values(batch: WindowBatch) -> Tensor:
    if batch.values is None:
        raise ConfigError(
            "the value expert needs reward labels; give the run data/rewards or set model.value_expert=false"
        )
    return batch.values
