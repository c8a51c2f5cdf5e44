"""A real policy, tiny and random, in real simulators; ``python -m tests.evaluation.tiny SUITE OUT`` dies midway.

Run as a program it kills itself after :data:`DEATH` finished episodes, as a machine that is taken away would.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.policy.test_policy import CHANNELS, PLANNER, WIDTH, images, make_model
from tests.policy.test_policy import DATA as SHAPES
from wav.codec import PCACodec
from wav.config import DataSettings, EvalLiberoSettings, Settings
from wav.data.conventions import Conventions
from wav.data.statistics import Statistics, compute_statistics
from wav.evaluation.evaluate import evaluate
from wav.evaluation.protocol import EpisodeSpec
from wav.policy.policy import Policy
from wav.sim.registry import select_tasks, task_specs
from wav.sim.workers import SimPool

DEATH = 3
STEPS = 8


def settings(suite: str) -> Settings:
    """Two tasks, two initial states, planned and unplanned, a few steps each."""
    tasks = tuple(list(task_specs(suite))[:2])
    data = DataSettings.model_validate(SHAPES.model_dump() | {"suites": (suite,), "tasks": tasks})
    protocol = EvalLiberoSettings(
        episodes_per_task=2,
        variants=("planned", "unplanned"),
        execute_steps=4,
        batch_size=3,
        swapped_episodes=1,
        videos=0,
    )
    return Settings(data=data, eval_libero=protocol, planner=PLANNER)


def policy(suite: str) -> Policy:
    """The same random policy in every process."""
    data, random = settings(suite).data, np.random.default_rng(3)
    texts = [spec.instruction for spec in select_tasks(suite, data.tasks)]
    prompts = {text: (random.normal(size=(5, WIDTH)).astype(np.float32), np.arange(5) < 4) for text in texts}
    keys = {
        "action": compute_statistics(random.uniform(-1, 1, (500, 7)), "quantile"),
        "state": compute_statistics(random.normal(size=(500, 8)), "quantile"),
        "value": compute_statistics(random.normal(3, 2, (500, 10)), "zscore_symlog"),
    }
    codec = PCACodec.fit(images(40, 0), images(20, 1, (5,)), patch=16, temporal=4, channels=CHANNELS)
    parts = (codec, None, Statistics(keys), Conventions.for_simulator(data), data, PLANNER)
    return Policy(make_model(), *parts, batch_size=3, prompts=prompts)


def run(suite: str, out: Path, pool: Any, **options: Any) -> dict[str, Any]:
    """Evaluate over ``pool``, one torch thread, episodes cut to :data:`STEPS`; metrics."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)

    def short(suite: str, names: tuple[str, ...]) -> tuple[Any, ...]:
        return tuple(dataclasses.replace(spec, max_steps=STEPS) for spec in select_tasks(suite, names))

    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("wav.evaluation.protocol.select_tasks", short)
            return evaluate(settings(suite), policy(suite), out, pool=pool, checkpoint="tiny", **options)
    finally:
        torch.set_num_threads(before)


def open_pool(suite: str, workers: int, slots: int) -> SimPool:
    """Real simulators."""
    return SimPool(suite, settings(suite).data, workers=workers, slots=slots)


def backwards(episodes: tuple[EpisodeSpec, ...]) -> tuple[EpisodeSpec, ...]:
    """The last episode first."""
    return tuple(reversed(episodes))


if __name__ == "__main__":
    name, folder = sys.argv[1:]
    with open_pool(name, 1, 2) as simulators:
        run(
            name,
            Path(folder),
            simulators,
            progress=lambda state: os.kill(os.getpid(), signal.SIGKILL) if state.done == DEATH else None,
        )
