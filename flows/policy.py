"""What evaluation and export share: the policy that the joint stage trained, with the encoders of its latents."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from flows.common import StageRun
from wav.policy.export import policy_from_stages


def assembly(
    run: StageRun, batch_size: int = 8, make: Callable[..., Any] = policy_from_stages
) -> functools.partial[Any]:
    """What puts the workspace's policy together; :func:`wav.policy.export.policy_from_stages` unless told otherwise."""
    parts = run.path("models/joint"), run.path("data/latents"), run.settings.data, run.settings.planner
    return functools.partial(make, *parts, batch_size=batch_size, device=run.runtime.device)
