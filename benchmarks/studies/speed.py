"""Which of several real futures of one state each score prefers: the scripted expert at full speed, slow and hesitant.

No model takes part: the returns are those of Table 2 along the expert's own episodes, as labels for the value expert,
over the first action chunk. A score that ranks futures rightly prefers the direct one::

    python -m benchmarks.studies.speed benchmarks/results/speed.json
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.counting import machine
from wav.config import Settings, load_settings
from wav.data.episode import Episode
from wav.io.files import write_json
from wav.local import PROJECT
from wav.planning.scores import SCORES
from wav.rewards.label import value_channels
from wav.rewards.terms import episode_rewards
from wav.sim.demonstrations import record_demonstration
from wav.sim.registry import select_tasks, simulator_versions
from wav.sim.workers import map_in_processes

SPEEDS = ("direct", "slow", "hesitant")


def scored(episode: Episode, settings: Settings) -> dict[str, float]:
    """Every score of an episode's real returns over its first chunk; ``ensemble`` of one sample is the mean."""
    data = settings.data
    rewards = settings.label_rewards.model_copy(update={"horizon": 0})  # the chunk, whatever the default sums
    terms = episode_rewards(episode, rewards, data.views)
    returns = value_channels(terms, rewards, data.action_chunk)[: data.action_chunk, -1]
    row = torch.from_numpy(np.ascontiguousarray(returns, np.float32))[None, None, None]
    return {name: score(row, settings.planner).item() for name, score in SCORES.items()} | {"steps": episode.length}


def direct_ahead(rows: Sequence[Mapping[str, Any]], style: str) -> dict[str, float]:
    """Per score, in which share of the states it is higher for the direct expert than in ``style``."""
    one, two = ([row for row in rows if row["style"] == name] for name in ("direct", style))
    return {name: float(np.mean([a[name] > b[name] for a, b in zip(one, two, strict=True)])) for name in SCORES}


def main() -> None:
    """Run the expert, score, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("json", type=Path, help="file to write")
    parser.add_argument("--states", type=int, default=3, help="initial states of each task")
    parser.add_argument("--workers", type=int, default=0, help="simulator processes; 0: the machine's cores")
    chosen = parser.parse_args()
    settings = load_settings(PROJECT / "params.yaml")
    data = settings.data
    tasks = [task.name for task in select_tasks(data.suite, data.tasks)]
    states = [(task, index) for task in tasks for index in range(chosen.states)]
    jobs = [(data.suite, task, index, data, 0.0, 0.0, 0, style) for task, index in states for style in SPEEDS]
    episodes = dict(map_in_processes(record_demonstration, jobs, chosen.workers))
    rows: list[dict[str, Any]] = []
    for number, (_, task, index, *_, style) in enumerate(jobs):
        if isinstance(episodes[number], Exception):
            raise episodes[number]
        rows.append({"task": task, "index": index, "style": style} | scored(episodes[number], settings))
    means = {
        style: {name: float(np.mean([r[name] for r in rows if r["style"] == style])) for name in (*SCORES, "steps")}
        for style in SPEEDS
    }
    result = {
        "command": "python -m benchmarks.studies.speed",
        "machine": machine(),
        "simulator": simulator_versions(data.suite),
        "planner": settings.planner.model_dump(mode="json"),
        "means": means,
        "direct_ahead": {style: direct_ahead(rows, style) for style in SPEEDS[1:]},
        "rows": rows,
    }
    write_json(chosen.json, result)


if __name__ == "__main__":
    main()
