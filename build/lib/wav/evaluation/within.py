"""How soon is soon: the steps within which success is reported beside success at all.

A policy that dawdles solves a task as often as one that goes straight, and a planner that prefers better futures shows
in the time first. The measure is the direct expert's: the mean length of a task's demonstrations in style ``direct``
(:mod:`wav.sim.styles`), times ``eval_libero.within``. Where no demonstration of a task is known to be direct, as in any
dataset that was not scripted here, ``eval_libero.within_steps`` says the number; without it there is no such metric.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wav.config import EvalLiberoSettings
    from wav.data.store import EpisodeStore

log = logging.getLogger(__name__)


def step_limits(store: EpisodeStore | None, settings: EvalLiberoSettings, tasks: Sequence[str]) -> dict[str, int]:
    """Environment steps by task; empty where they are not known, and the log says why."""
    if settings.within_steps:
        return dict.fromkeys(tasks, settings.within_steps)
    direct = [] if store is None else [info for info in store.episodes if info.style == "direct" and info.success]
    steps = {
        task: [info.length - 1 for info in direct if info.task == task] for task in tasks
    }  # the last frame: no step
    missing = [task for task, found in steps.items() if not found]
    if not settings.within or missing:
        if settings.within:
            log.info("success within a time: no direct demonstration of %s; set eval_libero.within_steps", missing[0])
        return {}
    return {task: math.ceil(settings.within * fmean(found)) for task, found in steps.items()}
