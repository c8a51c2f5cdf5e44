"""The reference's trainer: our objectives with its departures from what inference does and from the paper.

Every departure is one override, so that the recorded iterations prove the rest of our objectives:

* one corruption rate of the memory for the whole micro-batch, and the memory mixed with noise again by the video's
  level, so that its rate is r * s;
* a random timestep told beside pure noise: the video's in stage 2, the value's in stage 3;
* levels rounded to the model's type, timesteps cut to integers;
* a dropped caption that keeps its own mask;
* a video loss that sums the error of the future frames and divides it by the count of all frames.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from wav.data.windows import WindowBatch, WindowDataset
from wav.flow_matching import frame_timesteps
from wav.training.draws import Draws, SeededRandom, StepInputs
from wav.training.objectives.base import Objective
from wav.training.objectives.joint import JointObjective
from wav.training.objectives.value import ValueObjective
from wav.training.objectives.video import VideoObjective


@dataclass(frozen=True)
class ReferenceDraws(Draws):
    """Draws, and what the model is told about the levels of the video and of the value tokens that an action reads."""

    video_label: Tensor
    condition_label: Tensor


def reference_timesteps(sigma: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Timesteps of levels rounded to the compute ``dtype``, times 1000, cut to integers."""
    return (sigma.to(dtype) * 1000.0).long()


class Reference(Objective):
    """What all three stages of the reference do otherwise."""

    def draw(self, batch: WindowBatch, captions: WindowDataset | None, random: SeededRandom, index: int) -> StepInputs:
        inputs = super().draw(batch, captions, random, index)
        draws = inputs.draws
        rate = draws.memory_rate[:1].expand_as(draws.memory_rate) * draws.video_level
        labels = self.labels(draws, random)
        changed = ReferenceDraws(**{**vars(draws), "memory_rate": rate}, **labels)
        return replace(inputs, draws=changed, batch=replace(inputs.batch, text_mask=batch.text_mask))

    def labels(self, draws: Draws, random: SeededRandom) -> dict[str, Tensor]:
        return {"video_label": draws.video_level, "condition_label": draws.condition_level}

    def noised_video(self, inputs: StepInputs) -> tuple[Tensor, Tensor]:
        latents, _ = super().noised_video(inputs)
        told = self.timestep(inputs.draws.video_label)  # type: ignore[attr-defined]
        return latents, frame_timesteps(self.memory_frames, latents.shape[3] - self.memory_frames, told)

    def timestep(self, level: Tensor) -> Tensor:
        return reference_timesteps(level, next(self.model.parameters()).dtype).to(level)


class ReferenceVideo(Reference, VideoObjective):
    """Stage 1."""

    def losses(self, inputs: StepInputs) -> dict[str, Tensor]:
        future = inputs.batch.future.shape[3]
        return {"video": super().losses(inputs)["video"] * future / (self.memory_frames + future)}


class ReferenceValue(Reference, ValueObjective):
    """Stage 2."""

    def labels(self, draws: Draws, random: SeededRandom) -> dict[str, Tensor]:
        label = random.levels("video_label", tuple(draws.video_level.shape))
        return {**super().labels(draws, random), "video_label": label}


class ReferenceJoint(Reference, JointObjective):
    """Stage 3."""

    def labels(self, draws: Draws, random: SeededRandom) -> dict[str, Tensor]:
        label = random.levels("condition_label", tuple(draws.condition_level.shape))
        return {**super().labels(draws, random), "condition_label": label}

    def values_shown(self, inputs: StepInputs) -> tuple[Tensor, Tensor]:
        return inputs.draws.condition_noise, self.timestep(inputs.draws.condition_label)  # type: ignore[attr-defined]
