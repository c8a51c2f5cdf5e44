"""The cells of the planning study: one setting each, everything else as in the workspace."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from wav.config import PlannerSettings, Settings
from wav.planning.scores import SCORES

MODES = ("none", "future", "value", "both")
#: The base and what decides most, then the paper's Fig. 4, 6 and 7 (K, M, N), one shot against iterations, its Fig. 5.
AXES = ("base", "execute_steps", "coupling", "steps", "score", "passes", "act_on", "phi", "gate")
AXES = (*AXES, "K", "M", "N", "budget", "alpha", "beta", "K1", "K2", "score_steps")
EXECUTED = (1, 2, 3, 5, 8)


@dataclass(frozen=True)
class Cell:
    """``planner`` whole, noise levels of the video passes, actions executed of a plan, and what was trained.

    Trained are the mode of coupling and the steps of the joint stage (0: as many as in the workspace).
    """

    axis: str
    value: str
    planner: PlannerSettings
    schedule: tuple[float, ...]
    execute_steps: int
    mode: str
    steps: int = 0

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.axis}={self.value}"

    @property
    def setting(self) -> tuple[Any, ...]:
        """What is equal in cells of equal results."""
        return self.planner, self.schedule, self.execute_steps, self.mode, self.steps

    @property
    def work(self) -> float:
        """What a step costs, roughly: passes of the video model and of the value flow."""
        planner, passes = self.planner, len(self.schedule)
        searched = planner.iterations * planner.video_samples * (passes + planner.value_samples)
        return (passes + 1 + searched) / self.execute_steps


def planner_with(planner: PlannerSettings, change: Mapping[str, Any]) -> PlannerSettings:
    """``planner`` with a change; of other numbers of candidates the same share are elites, at least one."""
    old, new = planner.model_dump(), planner.model_dump() | dict(change)
    for elites, of in (("video_elites", ("video_samples",)), ("value_elites", ("video_samples", "value_samples"))):
        before, now = (math.prod(found[name] for name in of) for found in (old, new))
        new[elites] = max(1, round(new[elites] * now / before))
    return PlannerSettings.model_validate(new)


def sweeps(base: PlannerSettings) -> dict[str, dict[Any, dict[str, Any]]]:
    """Axis -> value -> what changes in section ``planner``."""
    budget, most = base.iterations * base.video_samples, base.video_samples * base.value_samples

    def field(name: str, values: Iterable[Any]) -> dict[Any, dict[str, Any]]:
        return {value: {name: value} for value in values}

    return {
        "base": {"base": {}},
        "score": field("score", SCORES),
        "act_on": field("act_on", ("sample", "winner")),
        "phi": field("phi", ("max", "mean")),
        "gate": field("gate", (0.0, 0.02, 0.05, 0.1)),
        "K": field("iterations", (1, 2, 3, 5)),
        "M": field("video_samples", (2, 4, 8, 16)),
        "N": field("value_samples", (1, 2, 4, 8)),
        "budget": {f"{k}x{budget // k}": {"iterations": k, "video_samples": budget // k} for k in (1, 2, 4)},
        "alpha": field("alpha", (0.1, 0.5, 0.7, 1.0)),
        "beta": field("beta", (0.1, 0.2, 0.5, 1.0)),
        "K1": field("video_elites", sorted({1, base.video_elites, base.video_samples // 2, base.video_samples})),
        "K2": field("value_elites", sorted({1, base.value_elites, most // 2, most})),
        "score_steps": field("score_steps", (n for n in (2, 5) if n < base.denoise_steps)),
    }


def build_cells(settings: Settings, axes: Iterable[str]) -> list[Cell]:
    """The cells of ``axes`` around a workspace's planner and what its model was trained with, the base first."""
    base, coupling, execute_steps = settings.planner, settings.coupling, settings.eval_libero.execute_steps
    mode, schedule = coupling.mode, coupling.video_schedule
    last = schedule[-1] if schedule[-1] < 1 else sum(coupling.future_levels) / 2
    passes: dict[str, tuple[float, ...]] = {"1": (1.0,), "2": (1.0, last), "3": (1.0, (1 + last) / 2, last)}
    trained = {other: passes["1" if other in ("none", "value") else "2"] for other in MODES} | {mode: schedule}
    levels = {
        "coupling": [(other, trained[other], other) for other in MODES],
        "passes": [(n, found, mode) for n, found in passes.items() if coupling.future or n == "1"],
    }
    cells = []
    for axis in ("base", *(axis for axis in axes if axis != "base")):
        if axis in levels:
            cells += [Cell(axis, value, base, found, execute_steps, own) for value, found, own in levels[axis]]
        elif axis == "execute_steps":
            executed = [n for n in EXECUTED if n <= settings.data.action_chunk]
            cells += [Cell(axis, str(n), base, schedule, n, mode) for n in executed]
        elif axis == "steps":
            whole = settings.train_joint.steps
            cells += [Cell(axis, str(n), base, schedule, execute_steps, mode, n) for n in (whole // 4, whole // 2)]
            cells.append(Cell(axis, str(whole), base, schedule, execute_steps, mode))
        else:
            changes = sweeps(base)[axis].items()
            cells += [Cell(axis, str(v), planner_with(base, new), schedule, execute_steps, mode) for v, new in changes]
    return cells
