"""One planning call on the baseline schedule (what the reference does) and on our backends, in turns in one process.

Same weights, same noise, one CPU thread; text encoder and codec excluded. Prints a table; ``--json FILE`` writes it:

    python benchmarks/plan.py --json benchmarks/results/plan-cpu.json
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from baseline.planner import BaselinePlannerModel
from counting import Counted, machine, matrix_peak, write_result
from torch import Tensor

from wav.config import DataSettings, ModelSettings, PlannerSettings
from wav.inference.backends import Backend, noise_shapes, planner_model
from wav.inference.cpu.kernels import available, description
from wav.inference.fused import FusedPlannerModel
from wav.model import build_model
from wav.planning.planner import Planner
from wav.planning.types import Plan, RowKey, SeededNoise

LATENT, CAPTION, TOKENS, GRID = 32, 256, 32, (4, 4)
VIEWS, MEMORY, FUTURE, CHUNK = 2, 4, 2, 36
MODEL = ModelSettings(
    layers=8, heads=4, head_dim=64, value_heads=4, value_head_dim=16, action_heads=4, action_head_dim=16
)
PLANNER = PlannerSettings(
    iterations=3, video_samples=8, value_samples=5, video_elites=7, value_elites=4, denoise_steps=10
)
PARTS = {"begin": "text", "video_features": "video", "denoise_value": "value", "denoise_action": "action"}


class Timed:
    """A planner model whose parts are timed, in seconds."""

    def __init__(self, model: Any) -> None:
        self.model, self.shapes = model, model.shapes
        self.parts: defaultdict[str, float] = defaultdict(float)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            start = time.perf_counter()
            result = getattr(self.model, name)(*args)
            self.parts[PARTS[name]] += time.perf_counter() - start
            return result

        return timed


def inputs(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Memory latents, text, its mask and history of one observation."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((1, VIEWS, LATENT, MEMORY, *GRID), (1, TOKENS, CAPTION), (1, 1, 15))
    memory, text, history = (torch.randn(shape, generator=generator) for shape in shapes)
    return memory, text, torch.ones(1, TOKENS), history


def call(model: Any, seed: int) -> Plan:
    """One planning call, from latents and text embeddings to normalised actions."""
    context = model.begin(*inputs(seed))
    noise = SeededNoise([RowKey(seed, "benchmark", 0)])
    return Planner(model, PLANNER, lambda values: values[..., -1]).plan(context, noise)


def difference(one: Plan, two: Plan) -> tuple[float, bool]:
    """Largest difference of actions, values, means and deviations, and whether all elites are the same."""
    pairs = [(one.actions, two.actions)]
    same = True
    for a, b in zip(one.history, two.history, strict=True):
        pairs += [(a.values, b.values), (a.video.mean, b.video.mean), (a.value.std, b.value.std)]
        same &= torch.equal(a.video_elites, b.video_elites) and torch.equal(a.value_elites, b.value_elites)
    return max(float((a - b).abs().max()) for a, b in pairs), same


def extent(seconds: list[float]) -> dict[str, Any]:
    """Median, extremes and every run."""
    return {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds), "runs": seconds}


def ratio(one: list[float], two: list[float]) -> float:
    """Median over turns of one way's seconds by another's."""
    return statistics.median(a / b for a, b in zip(one, two, strict=True))


def measure(budget: float, repeats: int, backends: Sequence[Backend]) -> dict[str, Any]:
    """Count one call of each schedule, then time them in turns within ``budget`` seconds."""
    begun = time.perf_counter()
    transformer = build_model(MODEL, DataSettings(action_chunk=CHUNK), LATENT, CAPTION).eval()
    shapes = noise_shapes(transformer, VIEWS, GRID, FUTURE, CHUNK)
    models: dict[str, Any] = {"baseline": BaselinePlannerModel(transformer, shapes)}
    models |= {backend: planner_model(transformer, shapes, backend) for backend in backends}
    counts, plans, built = {}, {}, time.perf_counter() - begun
    for name, model in models.items():
        counted_on = (
            FusedPlannerModel(transformer, shapes) if name in ("cpu", "compiled") else model
        )  # the same products
        with torch.no_grad(), Counted() as counted:
            call(counted_on, 0)
        counts[name] = counted
        plans[name] = call(model, 0)
    off = {name: difference(plans["baseline"], plans[name]) for name in backends}
    peak = matrix_peak()
    seconds: defaultdict[str, list[float]] = defaultdict(list)
    processor: defaultdict[str, list[float]] = defaultdict(list)  # beside wall time: neighbours disturb it less
    parts: defaultdict[str, list[dict[str, float]]] = defaultdict(list)
    for turn in range(1, repeats + 1):
        start = time.perf_counter()
        for name, model in models.items():
            timed, before, used = Timed(model), time.perf_counter(), time.process_time()
            with torch.inference_mode():
                plans[name] = call(timed, turn)
            seconds[name].append(time.perf_counter() - before)
            processor[name].append(time.process_time() - used)
            parts[name].append(dict(timed.parts))
        for name in backends:
            largest, same = difference(plans["baseline"], plans[name])
            off[name] = max(off[name][0], largest), off[name][1] and same
        if time.perf_counter() - begun + 1.3 * (time.perf_counter() - start) > budget:
            break
    rows = {}
    for name in models:
        median = statistics.median(seconds[name])
        rows[name] = {
            "seconds": extent(seconds[name]),
            "processor_seconds": extent(processor[name]),
            "parts": {part: statistics.median(run[part] for run in parts[name]) for part in PARTS.values()},
            "gflop": counts[name].flops / 1e9,
            "gbyte": counts[name].moved / 1e9,
            "copied_gbyte": counts[name].copied / 1e9,
            "share_of_peak": counts[name].flops / median / peak,
        }
        if name != "baseline":
            rows[name]["ratio"] = ratio(seconds["baseline"], seconds[name])
            rows[name]["processor_ratio"] = ratio(processor["baseline"], processor[name])
            rows[name]["max_abs_diff"], rows[name]["same_elites"] = off[name]
    return {"peak_gflops": peak / 1e9, "kernels": description(), "prepare_seconds": built, "schedules": rows}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5, help="turns at most")
    parser.add_argument("--budget", type=float, default=40.0, help="seconds after which no further turn starts")
    default: list[Backend] = ["torch", "cpu"] if available() else ["torch"]
    parser.add_argument("--backends", nargs="+", choices=("torch", "cpu", "compiled"), default=default)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    before = machine()
    result = measure(arguments.budget, arguments.repeats, arguments.backends)
    sizes = {
        "model": MODEL.model_dump(mode="json"),
        "planner": PLANNER.model_dump(mode="json"),
        "latent": {"channels": LATENT, "grid": GRID, "views": VIEWS, "memory": MEMORY, "future": FUTURE},
        "caption": {"width": CAPTION, "tokens": TOKENS},
        "action_chunk": CHUNK,
    }
    result |= {"sizes": sizes, "threads": arguments.threads, "machine": before, "load_after": machine()["load"]}
    header = ("", "seconds", "text", "video", "value", "action", "GFLOP", "GB moved", "GB copied", "of peak")
    print("{:9}{:>9}{:>8}{:>8}{:>8}{:>8}{:>8}{:>10}{:>11}{:>9}".format(*header))
    for name, row in result["schedules"].items():
        parts = "".join(f"{row['parts'][part]:8.3f}" for part in PARTS.values())
        numbers = f"{row['gflop']:8.1f}{row['gbyte']:10.2f}{row['copied_gbyte']:11.2f}{row['share_of_peak']:9.0%}"
        print(f"{name:9}{row['seconds']['median']:9.3f}{parts}{numbers}")
    for name in arguments.backends:
        row = result["schedules"][name]
        print(
            f"{name}: ratio {row['ratio']:.2f} ({row['processor_ratio']:.2f} in processor time), "
            f"largest difference {row['max_abs_diff']:.1e}, same elites: {row['same_elites']}"
        )
    print(f"peak {result['peak_gflops']:.0f} GFLOP/s on {arguments.threads} thread(s), load {before['load'][0]}")
    write_result(arguments.json, result)


if __name__ == "__main__":
    main()
