"""One robot's planning call on one thread and on several, and what the coupled schedule of params.yaml adds to it.

Threads share the candidates where the model is large enough. ``coupled_ratio`` is a call with a pass for every level of
``coupling.video_schedule`` against one with a single pass, as published, at equal K, M and N. In turns in one
process, by the clock, at the sizes of params.yaml and of ``benchmarks/plan.py``; text encoder and codec excluded. Bits
have to be equal but for the coupled calls. Prints a table; ``--json FILE`` writes it::

    python benchmarks/latency.py --json benchmarks/results/latency-cpu.json
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from counting import machine, write_result
from gpu_planning import COUPLED
from sizes import SIZES, Model, Sizes
from sizes import Planner as PlannerSizes
from torch import Tensor

from wav.inference.backends import noise_shapes, planner_model
from wav.inference.cpu.kernels import description
from wav.inference.threads import on_threads
from wav.model import build_model
from wav.planning.planner import Planner
from wav.planning.types import PUBLISHED, Levels, RowKey, SeededNoise

#: The sizes of ``benchmarks/plan.py``.
PLAN = replace(
    SIZES["default"],
    name="plan",
    model=Model(8, 4, 64, 4, 16, 4, 16),
    planner=PlannerSizes(3, 8, 5, 7, 4),
    latent=32,
    memory=4,
    caption=256,
    text_tokens=32,
    chunk=36,
)


class Robot:
    """A policy's planning call of one observation."""

    def __init__(self, sizes: Sizes) -> None:
        self.planner: Any = sizes.planner
        model: Any = build_model(sizes.model, sizes, sizes.latent, sizes.caption, sizes.value_channels)  # type: ignore[arg-type]
        shapes = noise_shapes(model, sizes.views, sizes.grid, sizes.future, sizes.chunk)
        self.model = planner_model(model.eval(), shapes)
        generator = torch.Generator().manual_seed(0)
        self.inputs = [
            torch.randn(1, *shape, generator=generator)
            for shape in (
                (sizes.views, sizes.latent, sizes.memory, *sizes.grid),
                (sizes.text_tokens, sizes.caption),
                (1, sizes.action_channels),
            )
        ]

    def call(self, threads: int, levels: Levels) -> tuple[float, Tensor]:
        """Seconds of a call, and its actions."""
        memory, text, history = self.inputs
        torch.set_num_threads(threads)
        with torch.inference_mode(), on_threads(self.model) as model:
            start = time.perf_counter()
            context = self.model.begin(memory, text, None, history)
            noise = SeededNoise([RowKey(0, "latency", 0)])
            planner = Planner(model, self.planner, lambda values: values[..., -1], levels)
            found = planner.plan(context, noise)
            return time.perf_counter() - start, found.actions


def measure(sizes: Sizes, threads: int, repeats: int) -> dict[str, Any]:
    """Seconds on one thread, on all, and on all with coupled experts, in turns."""
    robot = Robot(sizes)
    ways = {"one thread": (1, PUBLISHED), "as shipped": (threads, PUBLISHED), "coupled": (threads, COUPLED)}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    wanted = robot.call(1, PUBLISHED)[1]
    worst = 0.0
    for _ in range(repeats):
        for name, way in ways.items():
            taken, actions = robot.call(*way)
            seconds[name].append(taken)
            if name != "coupled":
                worst = max(worst, float((actions - wanted).abs().max()))
    rows = {
        name: {"seconds": statistics.median(runs), "min": min(runs), "runs": runs} for name, runs in seconds.items()
    }
    return {
        "ratio": rows["one thread"]["seconds"] / rows["as shipped"]["seconds"],
        "coupled_ratio": rows["coupled"]["seconds"] / rows["as shipped"]["seconds"],
        "max_abs_diff": worst,
        "ways": rows,
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--repeats", type=int, default=12)
    arguments = parser.parse_args()
    before = machine()
    found = {sizes.name: measure(sizes, arguments.threads, arguments.repeats) for sizes in (SIZES["default"], PLAN)}
    for name, row in found.items():
        ways = ", ".join(f"{way} {numbers['seconds']:.3f} s" for way, numbers in row["ways"].items())
        ratios = f"{row['ratio']:.2f} times faster, coupled calls take {row['coupled_ratio']:.2f}"
        print(f"{name:8} {ways}; {ratios}, actions differ by {row['max_abs_diff']}")
    result = {
        "ratio": min(row["ratio"] for row in found.values()),
        "coupled_ratio": max(row["coupled_ratio"] for row in found.values()),
        "max_abs_diff": max(row["max_abs_diff"] for row in found.values()),
        "plain_seconds": sum(row["ways"]["one thread"]["seconds"] for row in found.values()),
        "ours_seconds": sum(row["ways"]["as shipped"]["seconds"] for row in found.values()),
        "sizes": found,
        "threads": arguments.threads,
        "kernels": description(),
        "machine": before,
        "load_after": machine()["load"],
    }
    write_result(arguments.json, result)


if __name__ == "__main__":
    main()
