"""Throughput of reward labelling: images a second on one core, for all nine terms (MSE and SSIM of two cameras).

Run ``python -m benchmarks.rewards --out rewards.json``; the aim is 2,000 images a second at 128x128.
"""

from __future__ import annotations

import os

os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"))

import argparse
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from wav.config import LabelRewardsSettings
from wav.data.episode import Episode
from wav.io.files import write_json
from wav.rewards.terms import episode_rewards

VIEWS = ("agentview", "wrist")


def random_episode(size: int, steps: int) -> Episode:
    """An episode of noise: the terms cost the same whatever the pictures show."""
    rng = np.random.default_rng(0)
    images = {view: rng.integers(0, 256, (steps, size, size, 3), np.uint8) for view in VIEWS}
    state, joints, actions = (rng.normal(size=(steps, n)).astype(np.float32) for n in (8, 8, 7))
    return Episode("noise", "noise", "noise", images, state, joints, actions, "benchmark")


def measure(size: int, steps: int, seconds: float) -> dict[str, Any]:
    """Label one episode again and again for about ``seconds``; wall and CPU rates of the run and of its best round."""
    episode, settings = random_episode(size, steps), LabelRewardsSettings()
    images = len(VIEWS) * steps
    episode_rewards(episode, settings)
    rounds: list[tuple[float, float]] = []
    while sum(wall for wall, _ in rounds) < seconds:
        wall, cpu = time.perf_counter(), time.process_time()
        episode_rewards(episode, settings)
        rounds.append((time.perf_counter() - wall, time.process_time() - cpu))
    walls, cpus = (np.array(column) for column in zip(*rounds, strict=True))
    return {
        "size": size,
        "images": images * len(rounds),
        "images_per_second": round(images / float(walls.mean()), 1),
        "images_per_second_best": round(images / float(walls.min()), 1),
        "images_per_cpu_second": round(images / float(cpus.mean()), 1),
        "images_per_cpu_second_best": round(images / float(cpus.min()), 1),
    }


def main() -> int:
    """Measure, print one line a size and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, action="append", help="image size in pixels (default: 64, 128, 256)")
    parser.add_argument("--steps", type=int, default=100, help="steps of the labelled episode")
    parser.add_argument("--seconds", type=float, default=2.0, help="time spent on each size")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    results = [measure(size, arguments.steps, arguments.seconds) for size in arguments.size or (64, 128, 256)]
    for row in results:
        sys.stdout.write(
            f"{row['size']}x{row['size']}: {row['images_per_second']:.0f} images/s by the clock, "
            f"{row['images_per_cpu_second']:.0f} per second of CPU time\n"
        )
    report = {
        "benchmark": "reward labelling, nine terms, one core",
        "results": results,
        "nice": os.nice(0),
        "load_average": round(os.getloadavg()[0], 2),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "versions": {"numpy": np.__version__, "python": platform.python_version()},
    }
    if arguments.out:
        write_json(arguments.out, report)
    else:
        sys.stdout.write(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
