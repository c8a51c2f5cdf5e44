"""What a policy's call returns: actions, predicted returns and futures, and what the search did."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wav.planning.scores import phi
from wav.planning.types import Iteration, Plan

if TYPE_CHECKING:
    from wav.config import PlannerSettings


@dataclass(frozen=True)
class PlanSummary:
    """What the search did, (n, K) each: best score, root-mean-square sigma and mean of both noises per iteration."""

    candidates: NDArray[np.float32]  #: (n, M) scores of the last iteration's futures
    score: NDArray[np.float32]
    sigma_video: NDArray[np.float32]
    sigma_value: NDArray[np.float32]
    shift_video: NDArray[np.float32]
    shift_value: NDArray[np.float32]


@dataclass(frozen=True)
class PolicyOutput:
    """What the policy decided for n rows."""

    actions: NDArray[np.float32]  #: (n, A, action_dim) in the environment's units
    returns: NDArray[np.float32] | None  #: (n, A) predicted return at each step of the chunk, in reward units
    future: NDArray[np.float32] | None  #: (n, V, C, Ff, h, w) predicted future latents
    plan: PlanSummary

    @property
    def value(self) -> NDArray[np.float32] | None:
        """(n,) predicted return from the current step on."""
        return None if self.returns is None else self.returns[:, 0]


def host(tensor: Tensor, rows: int) -> NDArray[np.float32]:
    """The first ``rows`` rows of (n, ...) as float32 on the host."""
    return tensor[:rows].float().cpu().numpy()


def summary(result: Plan, rows: int, settings: PlannerSettings) -> PlanSummary:
    """The search's progress, without padding; (n, 0) without planning. ``score`` is the best of all M x N values'."""
    if not result.history:
        return PlanSummary(*[np.zeros((rows, 0), np.float32)] * len(fields(PlanSummary)))

    def sizes(part: Callable[[Iteration], Tensor]) -> NDArray[np.float32]:
        """Root mean square per row and iteration (n, K)."""
        return host(torch.stack([part(step).flatten(1).square().mean(1).sqrt() for step in result.history], 1), rows)

    return PlanSummary(
        host(phi(result.history[-1].scores, settings), rows),
        host(torch.stack([step.scores.flatten(1).amax(1) for step in result.history], 1), rows),
        sigma_video=sizes(lambda step: step.video.std),
        sigma_value=sizes(lambda step: step.value.std),
        shift_video=sizes(lambda step: step.video.mean),
        shift_value=sizes(lambda step: step.value.mean),
    )


def concatenate(parts: Sequence[PolicyOutput]) -> PolicyOutput:
    """Outputs of consecutive groups of rows as one."""

    def joined(arrays: Sequence[Any]) -> Any:
        return None if arrays[0] is None else np.concatenate(arrays)

    plan = PlanSummary(*(joined([getattr(part.plan, f.name) for part in parts]) for f in fields(PlanSummary)))
    outputs = {name: joined([getattr(part, name) for part in parts]) for name in ("actions", "returns", "future")}
    return PolicyOutput(plan=plan, **outputs)
