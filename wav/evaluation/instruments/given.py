"""Decode actions on a future and on values that are given: what swap and oracle share.

Given futures and values are noised to the levels at which planning reads them (section ``coupling``), as in training;
what is not given the policy imagines. Shapes as in :mod:`wav.planning.types`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from wav.planning.types import Noise
    from wav.policy.policy import Policy


def imagine(policy: Policy, context: Any, noise: Noise) -> tuple[Tensor, Tensor | None]:
    """A future (B, V, C, Ff, h, w), fully denoised, and the values (B, A, Cv) of it."""
    shapes, steps = policy.model.shapes, policy.planner.denoise_steps
    future = policy.model.denoise_video(context, noise("act.video", shapes.video), steps)
    if shapes.value is None:
        return future, None
    return future, _values(policy, _features(policy, context, noise, future), noise)


def decode_given(
    policy: Policy, context: Any, noise: Noise, future: Tensor | None = None, values: Tensor | None = None
) -> Tensor:
    """Normalised actions (B, A, action_dim) of the policy, unplanned, for a ``context`` of B observations.

    ``future`` are clean latents (B, V, C, Ff, h, w), ``values`` normalised ones (B, A, Cv); without them it imagines.
    """
    model, level = policy.model, policy.levels.value
    features, tokens = _features(policy, context, noise, future), None
    if model.shapes.value is not None:
        tokens = noise("act.value", model.shapes.value)
        if level < 1:
            tokens = torch.lerp(_values(policy, features, noise) if values is None else values, tokens, level)
    z_action = noise("act.action", model.shapes.action)
    actions = model.denoise_action(context, features, tokens, z_action, policy.planner.denoise_steps, level)
    return actions[..., : policy.data.action_dim]


def _features(policy: Policy, context: Any, noise: Noise, future: Tensor | None) -> Any:
    """Features of one future per row at the level that planning reads."""
    levels, tokens = policy.levels.video, noise("act.video", policy.model.shapes.video)
    if future is not None:
        tokens, levels = torch.lerp(future, tokens, levels[-1]), levels[-1:]
    return policy.model.video_features(context, tokens[:, None], levels)


def _values(policy: Policy, features: Any, noise: Noise) -> Tensor:
    """Values (B, A, Cv) denoised on the features of one future per row."""
    draws = noise("act.value", policy.model.shapes.value or ())
    return policy.model.denoise_value(features, draws[:, None, None], policy.planner.denoise_steps)[:, 0, 0]
