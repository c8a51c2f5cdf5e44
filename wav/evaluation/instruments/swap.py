"""Swap: does the action follow the future and the values that it is shown, where they are another's.

From one state and its instruction the action is decoded on what the policy imagines for another instruction, or for
another episode's state, and compared with the action of the own plan and with that of the other. A policy whose action
does not read the future stays where it is (0), one that does as it is shown arrives at the other's action (1).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from wav.evaluation.instruments.given import decode_given, imagine
from wav.planning.types import RowKey, SeededNoise

if TYPE_CHECKING:
    from torch import Tensor

    from wav.policy.policy import Policy
    from wav.sim.env import Observation

    History = Sequence[Observation]

DRAWS = 2


def swaps(
    policy: Policy, histories: Sequence[History], others: Mapping[str, str], seed: int = 0
) -> dict[str, dict[str, float]]:
    """Shares of the way from the own action to the other's, by what is swapped. The policy acts unplanned.

    ``histories`` are, per state, what it has seen at its calls, now last; neighbours may be of one episode. ``others``:
    instruction -> another one that makes sense in the same scene.

    Returns:
        ``instruction`` (where some state's instruction has another) and ``episode``: each with shares for ``future``,
        ``values`` (with a value expert) and ``both``.
    """
    told = [seen for seen in histories if seen[-1].instruction in others]
    retold = [[replace(one, instruction=others[one.instruction]) for one in seen] for seen in told]
    half = len(histories) // 2
    found = {"episode": swap(policy, histories, [*histories[half:], *histories[:half]], seed)}
    return {"instruction": swap(policy, told, retold, seed), **found} if told else found


def swap(policy: Policy, own: Sequence[History], other: Sequence[History], seed: int = 0) -> dict[str, float]:
    """Shares of the way from the action of each ``own`` state to that of its ``other`` one, the same draws for both."""
    moved: dict[str, float] = {}
    whole = 0.0
    with torch.inference_mode():
        here, there = policy.context(own), policy.context(other)
        for draw in range(DRAWS):
            noise = SeededNoise([RowKey(seed, f"swap/{i}", draw) for i in range(len(own))], policy.model.device)
            mine, theirs = imagine(policy, here, noise), imagine(policy, there, noise)
            shown = {"future": (theirs[0], mine[1]), "values": (mine[0], theirs[1]), "both": theirs}
            if theirs[1] is None:
                del shown["values"]
            start = decode_given(policy, here, noise, *mine)
            way = decode_given(policy, there, noise, *theirs) - start
            whole += float(way.square().sum())
            for name, given in shown.items():
                step: Tensor = decode_given(policy, here, noise, *given) - start
                moved[name] = moved.get(name, 0.0) + float((step * way).sum())
    return {name: round(along / max(whole, 1e-12), 4) for name, along in moved.items()}
