"""One planning call on the CPU kernels, on torch's operations, and on what torch.compile makes of these, in turns.

Same weights, same noise, one CPU thread. ``--sizes plan`` are those of benchmarks/plan.py::

    python benchmarks/compiled.py --json benchmarks/results/compiled-cpu.json
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections import defaultdict
from pathlib import Path
from typing import Any
from unittest import mock

import plan as small
import torch
from counting import machine, write_result
from sizes import SIZES

from wav.config import DataSettings
from wav.inference import native
from wav.inference.adapter import WAVPlannerModel, noise_shapes
from wav.inference.compiled import CompiledPlannerModel
from wav.model import build_model
from wav.planning.planner import Planner
from wav.planning.types import Plan, RowKey, SeededNoise

NAMES = ("kernels", "torch", "compiled")


def without_kernels(name: str) -> contextlib.AbstractContextManager[Any]:
    """The CPU kernels are there for ``kernels`` alone."""
    if name == "kernels":
        return contextlib.nullcontext()
    return mock.patch.object(native, "available", return_value=False)


def prepared(name: str, sizes: str) -> tuple[WAVPlannerModel, Any]:
    """A model of those sizes, and a planning call on it by seed."""
    kind = CompiledPlannerModel if name == "compiled" else WAVPlannerModel
    torch.manual_seed(0)
    if sizes == "plan":
        made = build_model(small.MODEL, DataSettings(action_chunk=small.CHUNK), small.LATENT, small.CAPTION).eval()
        return kind(made, noise_shapes(made, small.VIEWS, small.GRID, small.FUTURE, small.CHUNK)), small.call
    s: Any = SIZES[sizes]
    made = build_model(s.model, s, s.latent, s.caption, s.value_channels).eval()

    def call(model: Any, seed: int) -> Plan:
        generator = torch.Generator().manual_seed(seed)
        shapes = ((1, s.views, s.latent, s.memory, *s.grid), (1, s.text_tokens, s.caption), (1, 1, s.action_channels))
        memory, text, history = (torch.randn(shape, generator=generator) for shape in shapes)
        context = model.begin(memory, text, None, history)
        planner = Planner(model, s.planner, lambda values: values[..., -1])
        return planner.plan(context, SeededNoise([RowKey(seed, "benchmark", 0)]))

    return kind(made, noise_shapes(made, s.views, s.grid, s.future, s.chunk)), call


@torch.inference_mode()
def measure(sizes: str, turns: int) -> dict[str, Any]:
    """The first call of each way, then ``turns`` more of each in turns."""
    rows: dict[str, Any] = {}
    calls, plans = {}, {}
    for name in NAMES:
        with without_kernels(name):
            model, call = prepared(name, sizes)
            calls[name] = (model, call)
            start = time.perf_counter()
            call(model, 0)
            rows[name] = {"first_seconds": time.perf_counter() - start}
    seconds: defaultdict[str, list[float]] = defaultdict(list)
    processor: defaultdict[str, list[float]] = defaultdict(list)
    largest: defaultdict[str, float] = defaultdict(float)
    same = True
    for turn in range(1, turns + 1):
        for name, (model, call) in calls.items():
            with without_kernels(name):
                start, used = time.perf_counter(), time.process_time()
                plans[name] = call(model, turn)
            seconds[name].append(time.perf_counter() - start)
            processor[name].append(time.process_time() - used)
        for name in NAMES[1:]:
            off, equal = small.difference(plans["kernels"], plans[name])
            largest[name], same = max(largest[name], off), same and equal
    for name in NAMES:
        rows[name] |= {"seconds": small.spread(seconds[name]), "processor_seconds": small.spread(processor[name])}
    return {"ways": rows, "max_abs_diff": dict(largest), "same_elites": same, "turns": turns}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--sizes", nargs="+", choices=("plan", *SIZES), default=["default", "plan"])
    parser.add_argument("--turns", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {"machine": machine(), "kernels": native.description(), "threads": 1, "sizes": {}}
    for sizes in arguments.sizes:
        found = result["sizes"][sizes] = measure(sizes, arguments.turns)
        for name, row in found["ways"].items():
            print(
                f"{sizes:8} {name:9} first {row['first_seconds']:6.1f} s, then {row['seconds']['median']:.3f} s "
                f"({row['processor_seconds']['median']:.3f} s of processor time)"
            )
        print(f"{sizes:8} largest difference {found['max_abs_diff']}, same elites: {found['same_elites']}")
    result["load_after"] = machine()["load"]
    write_result(arguments.json, result)


if __name__ == "__main__":
    main()
