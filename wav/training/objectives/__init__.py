"""What the training stages minimise, one class each: who trains, which samples play which role, and the loss.

All use flow matching: x_s = (1 - s) x1 + s x0 with data x1 and noise x0, and the target v = x0 - x1. Another stage is
a subclass of :class:`Objective` in :data:`OBJECTIVES`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from wav.errors import ConfigError
from wav.training.objectives.base import Objective
from wav.training.objectives.joint import JointObjective
from wav.training.objectives.value import ValueObjective
from wav.training.objectives.video import VideoObjective

if TYPE_CHECKING:
    from wav.config import TrainSettings
    from wav.model import WAVTransformer

__all__ = ["OBJECTIVES", "JointObjective", "Objective", "ValueObjective", "VideoObjective", "build_objective"]

OBJECTIVES: dict[str, type[Objective]] = {
    objective.stage: objective for objective in (VideoObjective, ValueObjective, JointObjective)
}


def build_objective(settings: TrainSettings, model: WAVTransformer, memory_frames: int, action_dim: int) -> Objective:
    """The objective of the stage that ``settings`` are of, around ``model``.

    Args:
        settings: the stage's section.
        model: in float32 or bfloat16; which of its parameters require a gradient is set here.
        memory_frames: frames of a window that lie before its future.
        action_dim: width of an action.

    Raises:
        ConfigError: no such stage.
    """
    if settings.stage not in OBJECTIVES:
        raise ConfigError(f"training stage {settings.stage!r}: unknown; the stages are {', '.join(OBJECTIVES)}")
    return OBJECTIVES[settings.stage](model, settings, memory_frames, action_dim)
