"""What evaluation and export share: the policy that the joint stage trained, with the encoders of its latents."""

from __future__ import annotations

from flows.common import StageRun
from wav.policy.export import Checkpoint, policy_from_stages
from wav.policy.policy import Policy


def assemble(run: StageRun, batch_size: int = 8) -> tuple[Policy, Checkpoint]:
    """Policy and checkpoint of the workspace.

    Raises:
        DataError, CheckpointError: a part is missing, or parts do not belong together.
    """
    settings = run.settings
    return policy_from_stages(
        run.path("models/joint"),
        run.path("data/latents"),
        settings.data,
        settings.planner,
        batch_size=batch_size,
        device=run.runtime.device,
    )
