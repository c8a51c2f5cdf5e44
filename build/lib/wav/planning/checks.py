"""What a plan may be asked for, and whether what came out is numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from wav.errors import CheckpointError, ConfigError
from wav.planning import VARIANTS
from wav.planning.types import Iteration, NoiseShapes

if TYPE_CHECKING:
    from wav.config import PlannerSettings


def check_request(shapes: NoiseShapes, settings: PlannerSettings, variant: str, with_value: bool) -> None:
    """Raise ConfigError for what the model or the planner cannot do."""
    if variant not in VARIANTS:
        raise ConfigError(f"variant = {variant!r}: unknown; use one of {', '.join(VARIANTS)}")
    if shapes.value is not None:
        return
    if settings.iterations and variant != "unplanned":
        raise ConfigError(
            f"planner.iterations = {settings.iterations}: the model has no value expert to plan with; "
            "set planner.iterations: 0 or act unplanned"
        )
    if with_value:
        raise ConfigError("with_value = True: the model has no value expert; leave it False")


def check_finite(actions: Tensor, history: Sequence[Iteration]) -> None:
    """One check after the search, so that its loop never waits for the device; raises CheckpointError."""
    finite = torch.stack([*(step.scores.isfinite().all() for step in history), actions.isfinite().all()]).tolist()
    if not all(finite):
        bad = finite.index(False)
        what = f"scores of iteration {bad + 1}" if bad < len(history) else "actions"
        raise CheckpointError(f"planner: the {what} are not finite; check the checkpoint and the value statistics")
