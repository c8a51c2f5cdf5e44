"""The three training stages one after another on data that are there, a step or two each."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from wav.config import Settings, parse_settings
from wav.training.spec import TrainPaths, make_spec

INITIAL = {"pretrain_video": None, "train_value": "pretrain_video", "train_joint": "train_value"}


def with_steps(raw: dict[str, Any], steps: int, name: str) -> Settings:
    """Parameters ``raw`` with so many steps of every training stage."""
    for stage in INITIAL:
        raw[stage] |= {"steps": steps, "batch_size": 4, "warmup_steps": 0, "checkpoint_every": steps, "log_every": 1}
    return parse_settings(raw, name)


def train(
    settings: Settings, data: Path, output: Path, start: Callable[..., Any], seconds: float
) -> dict[str, dict[str, Any]]:
    """Train on ``data/episodes``, ``latents`` and ``rewards`` into ``output/STAGE``; every stage's metrics."""
    metrics = {}
    for stage, before in INITIAL.items():
        paths = TrainPaths(
            episodes=data / "episodes",
            latents=data / "latents",
            rewards=None if before is None else data / "rewards",
            init=None if before is None else output / before,
            output=output / stage,
            cache=output / "cache",
        )
        spec = make_spec(stage, settings, paths, store=(output / "store").as_uri(), device="cpu", threads=1)
        run = start(spec)
        run.join(seconds)
        assert run.exitcode == 0, run.log.read_text()
        metrics[stage] = json.loads((output / stage / "metrics.json").read_text())
        assert np.isfinite(metrics[stage]["loss"])
    return metrics
