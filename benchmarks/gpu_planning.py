"""Planning on a GPU, parts of ``benchmarks/gpu.py``: speed, the first call, the matrix peak, and what rounding changes.

Random weights, at the published form's K=3, and on coupled experts as params.yaml and presets/realtime.yaml plan, and
with twice the iterations of params.yaml.
Latents in, actions on the host out; instructions count as encoded already, on all sides.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from baseline.planner import BaselinePlannerModel
from projection import accounted
from sizes import SIZES, Sizes
from torch import Tensor

from wav import accounting
from wav.inference.backends import noise_shapes
from wav.inference.compiled import CompiledPlannerModel
from wav.inference.torch import TorchPlannerModel
from wav.model import WAVTransformer, build_model
from wav.planning.planner import Planner
from wav.planning.types import PUBLISHED, Levels, Plan, RowKey, SeededNoise

if TYPE_CHECKING:
    from gpu import Report

SCHEDULES: dict[str, Any] = {
    "baseline": BaselinePlannerModel,
    "torch": TorchPlannerModel,
    "compiled": CompiledPlannerModel,
}
BASELINE_CALLS = 4  #: that are timed: it is slow, and hardly varies
#: At which levels params.yaml plans, and what presets/realtime.yaml changes of the planner; a test compares.
COUPLED = Levels((1.0, 0.85), 0.5)
REALTIME: dict[str, Any] = {"score_steps": 2}
SEEDS = 6  #: plans that are compared over precisions


def device_of(arguments: argparse.Namespace) -> torch.device:
    """Where a part computes."""
    return torch.device("cpu" if arguments.trial else "cuda:0")


def chosen_sizes(arguments: argparse.Namespace) -> Sizes:
    """Sizes of a part."""
    return SIZES["tiny" if arguments.trial else "full"]


def asked_for(arguments: argparse.Namespace, row: str) -> bool:
    """Whether a row of this name is measured: it is, unless others were asked for."""
    return not arguments.row or any(text in row for text in arguments.row)


def seconds_of(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds of a call, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def kernels(run: Callable[[], Any], device: torch.device, top: int = 14) -> dict[str, Any]:
    """Milliseconds that kernels were busy in a call, and the longest of them; nothing on a CPU."""
    if device.type != "cuda":
        return {}
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        run()
        torch.cuda.synchronize(device)
    rows = [(e.self_device_time_total / 1e3, e.count, e.key[:90]) for e in profiled.key_averages()]
    rows = sorted((row for row in rows if row[0] > 0), reverse=True)
    busy = sum(ms for ms, _, _ in rows)
    return {
        "busy_ms": round(busy, 2),
        "launches": sum(count for _, count, _ in rows),
        "longest": [{"ms": round(ms, 2), "count": count, "kernel": name} for ms, count, name in rows[:top]],
    }


def matrix_rate(device: torch.device, dtype: torch.dtype, size: int, seconds: float = 2.0) -> float:
    """Best measured operations per second of a square product."""
    one, two = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best, end = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < end:
        best = min(best, seconds_of(lambda: one @ two, device))
    return 2 * size**3 / best


def peak(arguments: argparse.Namespace, report: Report) -> None:
    """Matrix products of every precision, in TFLOP/s."""
    device = device_of(arguments)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        rate = matrix_rate(device, dtype, 256 if arguments.trial else 8192, 0.05 if arguments.trial else 2.0)
        report(f"{str(dtype).removeprefix('torch.')}_tflops", round(rate / 1e12, 3))


class Robot:
    """Latents to actions for one robot, on one schedule."""

    def __init__(self, name: str, model: WAVTransformer, sizes: Sizes, levels: Levels) -> None:
        self.name, self.sizes, self.levels, self.device = name, sizes, levels, next(model.parameters()).device
        self.adapter = SCHEDULES[name](model, noise_shapes(model, sizes.views, sizes.grid, sizes.future, sizes.chunk))
        self.means: tuple[Tensor, Tensor] | None = None  #: of the plan before, for a warm start
        self.seen = observed(sizes, 0, 1)

    def act(self, index: int) -> Tensor:
        """Actions (1, A, C) on the CPU."""
        found = plan_once(self.adapter, self.sizes, self.device, index, self.seen, self.levels, self.means)
        self.means = found.means
        return found.actions.cpu()


def observed(sizes: Sizes, seed: int, rows: int) -> list[Tensor]:
    """Memory latents, instruction and state of ``rows`` robots; what row 0 sees depends on ``seed`` alone."""
    shapes = (
        (sizes.views, sizes.latent, sizes.memory, *sizes.grid),
        (sizes.text_tokens, sizes.caption),
        (1, sizes.action_channels),
    )
    inputs = []
    for row in range(rows):
        generator = torch.Generator().manual_seed(1000 * seed + row)
        inputs.append([torch.randn(shape, generator=generator) for shape in shapes])
    return [torch.stack(part) for part in zip(*inputs, strict=True)]


def plan_once(
    adapter: Any, sizes: Sizes, device: torch.device, seed: int, seen: list[Tensor], levels: Levels, warm: Any = None
) -> Plan:
    """A plan for the robots that see ``seen``; what row 0 draws depends on ``seed`` alone."""
    memory, text, history = seen
    context = adapter.begin(memory, text, None, history)
    noise = SeededNoise([RowKey(0, f"gpu-{row}", seed) for row in range(len(memory))], device)
    settings: Any = sizes.planner
    return Planner(adapter, settings, lambda values: values[..., -1], levels).plan(context, noise, warm=warm)


def runs(sizes: Sizes) -> dict[str, tuple[Sizes, Levels]]:
    """Name -> sizes with a planner, and its levels."""
    default = SIZES["tiny" if sizes.name == "tiny" else "default"].planner
    return {
        "K=3": (replace(sizes, planner=replace(sizes.planner, iterations=3)), PUBLISHED),
        "default": (replace(sizes, planner=default), COUPLED),
        "K=2": (replace(sizes, planner=replace(default, iterations=2)), COUPLED),
        "realtime": (replace(sizes, planner=replace(default, **REALTIME)), COUPLED),
    }


def built(arguments: argparse.Namespace) -> WAVTransformer:
    """A model with random weights, on the device, in bfloat16 on a GPU."""
    sizes, device = chosen_sizes(arguments), device_of(arguments)
    with device:
        model = build_model(sizes.model, sizes, sizes.latent, sizes.caption, sizes.value_channels)  # type: ignore[arg-type]
    return model.to(device, torch.float32 if arguments.trial else torch.bfloat16).eval()


def prepared(arguments: argparse.Namespace) -> None:
    """A trial does not generate code, which takes minutes on a CPU; it runs what would be."""
    if arguments.trial:
        import wav.inference.compiled

        wav.inference.compiled.BACKEND = "eager"


def plan(arguments: argparse.Namespace, report: Report) -> None:
    """p50, p95 and the first call of every schedule, peak memory, share of the matrix peak, and where the time goes."""
    prepared(arguments)
    device, model = device_of(arguments), built(arguments)
    top = matrix_rate(device, next(model.parameters()).dtype, 256 if arguments.trial else 8192, 0.5)
    report("measured_peak_tflops", round(top / 1e12, 2))
    for name, (sizes, levels) in runs(chosen_sizes(arguments)).items():
        settings: Any = sizes.planner
        operations = accounting.plan_cost(accounted(sizes), settings, levels).total
        rows: dict[str, Any] = {"tflop": operations / 1e12, "planner": asdict(sizes.planner)}
        actions = {}
        for schedule in SCHEDULES:
            if (schedule == "baseline" and name != "K=3") or not asked_for(arguments, f"{name}, {schedule}"):
                continue
            robot = Robot(schedule, model, sizes, levels)
            calls = arguments.calls if schedule != "baseline" else min(BASELINE_CALLS, arguments.calls)
            rows[schedule], actions[schedule] = timed(robot, calls, operations, top)
            report(name, rows)
            del robot
        if "torch" in actions:
            for schedule, first in actions.items():
                rows[schedule]["max_abs_diff"] = float((first - actions["torch"]).abs().max())
            report(name, rows)


def timed(robot: Robot, calls: int, operations: float, top: float) -> tuple[dict[str, Any], Tensor]:
    """Figures of one schedule, and the actions of the first call."""
    if robot.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(robot.device)
    taken, first = [], torch.empty(0)
    with torch.inference_mode():
        for index in range(calls + 1):
            start = time.perf_counter()
            actions = robot.act(index)  # on the CPU, so the device is done
            taken.append(time.perf_counter() - start)
            first = actions if index == 0 else first
        busy = kernels(lambda: robot.act(calls + 1), robot.device)
    p50, p95 = (float(np.quantile(taken[1:], q)) for q in (0.5, 0.95))  # the first call prepares
    memory = torch.cuda.max_memory_allocated(robot.device) / 2**30 if robot.device.type == "cuda" else 0.0
    row = {"p50": p50, "p95": p95, "first": taken[0], "calls": calls, "peak_gib": round(memory, 2)}
    if robot.name != "baseline":  # which does other operations
        row["share_of_measured_peak"] = operations / p50 / top
    return row | busy, first


def plan_warm(arguments: argparse.Namespace, report: Report) -> None:
    """Seconds of the first and second compiled call where part ``plan`` left its code on disk."""
    prepared(arguments)
    model = built(arguments)
    for name, (sizes, levels) in runs(chosen_sizes(arguments)).items():
        if not asked_for(arguments, f"{name}, compiled"):
            continue
        robot = Robot("compiled", model, sizes, levels)
        with torch.inference_mode():
            first, second = (seconds_of(partial(robot.act, index), robot.device) for index in (0, 1))
        report(name, {"first": round(first, 2), "second": round(second, 3)})


def exact(arguments: argparse.Namespace, report: Report) -> None:
    """What companions in a batch, and another precision, change in a plan of coupled experts at d = 512."""
    device = device_of(arguments)
    sizes = SIZES["tiny" if arguments.trial else "medium"]
    sizes = replace(sizes, planner=replace(sizes.planner, iterations=2))
    wanted: list[Plan] = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        adapter = planted(sizes, device, dtype)
        with torch.inference_mode():
            alone = [
                plan_once(adapter, sizes, device, seed, observed(sizes, seed, 1), COUPLED) for seed in range(SEEDS)
            ]
            beside = plan_once(adapter, sizes, device, 0, observed(sizes, 0, 3), COUPLED)
        wanted = wanted or alone
        report(
            str(dtype).removeprefix("torch."),
            {
                "companions_change_actions_by": off(alone[0], beside),
                "companions_leave_elites": same_elites(alone[0], beside),
                "actions_differ_from_float32_by": max(off(a, b) for a, b in zip(wanted, alone, strict=True)),
                "plans_with_the_elites_of_float32": sum(map(same_elites, wanted, alone)),
                "plans": SEEDS,
                "mean_action": float(alone[0].actions.float().abs().mean()),
            },
        )


def planted(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> TorchPlannerModel:
    """The planner's view of weights that are scaled by their fan-in and none of them zero, equal in every precision."""
    model = build_model(sizes.model, sizes, sizes.latent, sizes.caption, sizes.value_channels)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            drawn = torch.randn(weight.shape, generator=generator)
            weight.copy_(drawn / weight.shape[-1] ** 0.5 if weight.ndim > 1 else 0.05 * drawn + float("norm" in name))
    model = model.to(device, dtype).eval()
    return TorchPlannerModel(model, noise_shapes(model, sizes.views, sizes.grid, sizes.future, sizes.chunk))


def off(one: Plan, two: Plan) -> float:
    """Largest difference of row 0's actions."""
    return float((one.actions[0].float() - two.actions[0].float()).abs().max())


def same_elites(one: Plan, two: Plan) -> bool:
    """Whether row 0 has the same elites in every iteration, in any order."""
    return all(
        torch.equal(getattr(a, name)[0].sort(-1).values, getattr(b, name)[0].sort(-1).values)
        for a, b in zip(one.history, two.history, strict=True)
        for name in ("video_elites", "value_elites")
    )
