"""What the training stages minimise, one class in one file each: who trains, who plays which role, and the loss.

All use flow matching: x_s = (1 - s) x1 + s x0 with data x1 and noise x0, and the target v = x0 - x1. Another stage is
a file with a subclass of :class:`wav.training.objectives.base.Objective`, which its row in :mod:`wav.stages` names.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from wav.stages import TRAINING

if TYPE_CHECKING:
    from wav.config import CouplingSettings, TrainSettings
    from wav.model import WAVTransformer
    from wav.training.objectives.base import Objective


def build_objective(
    settings: TrainSettings,
    model: WAVTransformer,
    memory_frames: int,
    action_dim: int,
    coupling: CouplingSettings | None = None,
) -> Objective:
    """The objective of the stage that ``settings`` are of, around ``model``.

    Without ``coupling`` samples see pure noise alone; the video stage takes no notice.
    """
    module, _, name = TRAINING[settings.stage].objective.partition(":")
    kind: type[Objective] = getattr(import_module(module), name)  # by name: no stage's code depends on another's
    return kind(model, settings, memory_frames, action_dim, coupling)
