"""What evaluation and export share: the policy that the joint stage trained, with the encoders of its latents."""

from __future__ import annotations

from typing import Any

from flows.common import StageRun
from wav.policy.export import Checkpoint, policy_from_stages
from wav.policy.policy import Policy


def parts(run: StageRun) -> tuple[Any, ...]:
    """What :func:`wav.policy.export.policy_from_stages` puts together."""
    return run.path("models/joint"), run.path("data/latents"), run.settings.data, run.settings.planner


def options(run: StageRun, batch_size: int) -> dict[str, Any]:
    """How it does so."""
    return {"batch_size": batch_size, "device": run.runtime.device}


def assemble(run: StageRun, batch_size: int = 8) -> tuple[Policy, Checkpoint]:
    """Policy and checkpoint of the workspace.

    Raises:
        DataError, CheckpointError: a part is missing, or parts do not belong together.
    """
    return policy_from_stages(*parts(run), **options(run, batch_size))
