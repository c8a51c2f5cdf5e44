"""Everything that is measured on a GPU machine, in one command; it needs torch, diffusers, safetensors and numpy alone.

Planning end to end (the newest camera frames in, actions on the CPU out; random weights) at the published form's K=3
and K=5, and on coupled experts as params.yaml and presets/realtime.yaml plan: p50 and p95, peak memory, share of the
machine's measured matrix peak, the baseline beside ours and ours on compiled code and CUDA graphs (``--no-compile``
leaves that out). Training samples a second of the three stages on one GPU, plain beside ours. Instructions count as
encoded already, on all sides (T5 needs transformers)::

    python benchmarks/gpu.py --json benchmarks/results/gpu.json
    python benchmarks/gpu.py --device cpu --dtype float32 --sizes tiny --calls 3 --steps 2 --encoders none  # a trial
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without an install
from baseline.planner import BaselinePlannerModel
from counting import machine, write_result
from projection import accounted
from sizes import SIZES, Sizes
from torch import Tensor
from train import DTYPES, STAGES, peak_memory
from train import measure as measure_training
from training_data import VaeEncoders, make_encoders

from wav import accounting
from wav.inference.backends import noise_shapes
from wav.inference.compiled import CompiledPlannerModel
from wav.inference.torch import TorchPlannerModel
from wav.model import build_model
from wav.planning.planner import Planner
from wav.planning.types import PAPER, Levels, RowKey, SeededNoise

SCHEDULES: dict[str, Any] = {
    "baseline": BaselinePlannerModel,
    "torch": TorchPlannerModel,
    "compiled": CompiledPlannerModel,
}
#: At which levels params.yaml plans, and what presets/realtime.yaml changes of the planner; a test compares.
COUPLED = Levels((1.0, 0.5), 0.25)
REALTIME: dict[str, Any] = {"score_steps": 2}


def matrix_rate(device: torch.device, dtype: torch.dtype, size: int, seconds: float = 2.0) -> float:
    """Best measured operations per second of a square product."""
    one, two = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best, end = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < end:
        best = min(best, _seconds(lambda: one @ two, device))
    return 2 * size**3 / best


def _seconds(run: Any, device: torch.device) -> float:
    """Seconds of a call, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


class Policy:
    """Frames to actions for one robot, on one schedule: the memory's earlier latents are kept, as a policy does."""

    def __init__(
        self, name: str, model: Any, sizes: Sizes, encoders: Any, device: torch.device, levels: Levels = PAPER
    ) -> None:
        self.name, self.sizes, self.encoders, self.device, self.levels = name, sizes, encoders, device, levels
        shapes = noise_shapes(model, sizes.views, sizes.grid, sizes.future, sizes.chunk)
        self.adapter = SCHEDULES[name](model, shapes)
        generator = torch.Generator().manual_seed(0)
        self.earlier = torch.randn(1, sizes.views, sizes.latent, sizes.memory, *sizes.grid, generator=generator)
        self.earlier = self.earlier.to(device)
        self.text = torch.randn(1, sizes.text_tokens, sizes.caption, generator=generator)
        self.history = torch.randn(1, 1, sizes.action_channels, generator=generator)
        self.means: tuple[Tensor, Tensor] | None = None  #: of the plan before, for a warm start

    def act(self, frames: np.ndarray, index: int) -> Tensor:
        """Actions (1, A, C) on the CPU; ``frames`` (V, H, W, 3) uint8.

        Ours encodes the newest frame of every view; the baseline every memory frame again.
        """
        memory = self.earlier.clone()
        if isinstance(self.encoders, VaeEncoders):
            again = self.sizes.memory if self.name == "baseline" else 1
            for _ in range(again):
                newest = self.encoders._encode(frames[:, None])
            memory[0, :, :, -1] = newest[:, :, 0]
        context = self.adapter.begin(memory, self.text, None, self.history)
        noise = SeededNoise([RowKey(0, "gpu", index)], self.device)
        settings: Any = self.sizes.planner
        planner = Planner(self.adapter, settings, lambda values: values[..., -1], self.levels)
        found = planner.plan(context, noise, warm=self.means)
        self.means = found.means
        return found.actions.cpu()


def planning(sizes: Sizes, policies: dict[str, Policy], peak: float, calls: int) -> dict[str, Any]:
    """Latency of the schedules at the sizes' planner, in turns; differences of actions are to ours."""
    rng, first = np.random.default_rng(0), next(iter(policies.values()))
    height, width = (first.encoders.patch * cells for cells in sizes.grid)
    frames = [rng.integers(0, 256, (sizes.views, height, width, 3), np.uint8) for _ in range(calls + 1)]
    seconds: dict[str, list[float]] = {name: [] for name in policies}
    memory, last = dict.fromkeys(policies, 0.0), {}
    for index, picture in enumerate(frames):
        for name, policy in policies.items():
            with torch.inference_mode(), peak_memory(policy.device) as found:
                start = time.perf_counter()
                last[name] = policy.act(picture, index)  # on the CPU, so the device is done
                seconds[name].append(time.perf_counter() - start)
            memory[name] = max(memory[name], found["peak"])
    settings: Any = sizes.planner
    operations = accounting.plan_cost(accounted(sizes), settings, first.levels).total
    rows = {}
    for name, taken in seconds.items():
        p50, p95 = (float(np.quantile(taken[1:], q)) for q in (0.5, 0.95))  # the first call prepares
        rows[name] = {"p50": p50, "p95": p95, "first": taken[0], "peak_gib": memory[name]}
    for name in rows.keys() - {"baseline"}:
        rows[name]["share_of_measured_peak"] = operations / rows[name]["p50"] / peak
    return {
        "ratios": {name: rows["baseline"]["p50"] / row["p50"] for name, row in rows.items() if name != "baseline"},
        "max_abs_diff": {
            name: float((found - last["torch"]).abs().max()) for name, found in last.items() if name != "torch"
        },
        "tflop": operations / 1e12,
        "schedules": rows,
        "planner": asdict(sizes.planner),
    }


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Planning at every K and in real time, then training."""
    device, dtype = torch.device(arguments.device), DTYPES[arguments.dtype]
    sizes = SIZES[arguments.sizes]
    peak = matrix_rate(device, dtype, 8192 if device.type == "cuda" else 512)
    result: dict[str, Any] = {"measured_peak_tflops": peak / 1e12, "planning": {}}
    encoders = make_encoders(arguments.encoders, sizes, device, dtype)
    with device:
        model = build_model(sizes.model, sizes, sizes.latent, sizes.caption, sizes.value_channels)  # type: ignore[arg-type]
    model = model.to(device, dtype).eval()
    default = SIZES["default"].planner
    runs = {f"K={k}": (replace(sizes.planner, iterations=k), PAPER) for k in arguments.iterations}
    runs |= {"default": (default, COUPLED), "realtime": (replace(default, **REALTIME), COUPLED)}
    for name, (planner, levels) in runs.items():
        chosen = replace(sizes, planner=planner)
        schedules = [s for s in SCHEDULES if not (arguments.no_compile and s == "compiled")]
        policies = {schedule: Policy(schedule, model, chosen, encoders, device, levels) for schedule in schedules}
        result["planning"][name] = planning(chosen, policies, peak, arguments.calls)
        del policies
    del model
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if not arguments.no_training:
        result["training"] = measure_training(arguments)
    return result


def show(result: dict[str, Any]) -> None:
    """Print the tables."""
    print(f"measured matrix peak: {result['measured_peak_tflops']:.1f} TFLOP/s")
    for name, row in result["planning"].items():
        for schedule, found in row["schedules"].items():
            share = found.get("share_of_measured_peak")
            text = "" if share is None else f", {share:.0%} of the measured peak"
            print(
                f"planning {name} {schedule:14} p50 {found['p50']:.3f} s, p95 {found['p95']:.3f} s, "
                f"first {found['first']:.1f} s, peak {found['peak_gib']:.1f} GiB{text}"
            )
        for schedule, ratio in row["ratios"].items():
            print(f"planning {name} baseline / {schedule} {ratio:.2f}")
        off = ", ".join(f"{schedule} {largest:.1e}" for schedule, largest in row["max_abs_diff"].items())
        print(f"planning {name} actions differ from those of torch: {off}")
    for stage, row in result.get("training", {}).get("stages", {}).items():
        rates = ", ".join(f"{n} {r['samples_per_second']:.1f}" for n, r in row["schedules"].items())
        print(f"training {stage}: samples/s {rates}; ratio {row['ratio']:.2f}")


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--sizes", choices=SIZES, default="full")
    parser.add_argument("--encoders", choices=("vae", "none"), default="vae")
    parser.add_argument("--iterations", type=int, nargs="+", default=[3, 5], help="K of the planning calls")
    parser.add_argument("--calls", type=int, default=20, help="planning calls that are timed")
    parser.add_argument("--no-training", action="store_true")
    parser.add_argument("--no-compile", action="store_true", help="leave out the schedule on compiled code")
    parser.add_argument("--stage", choices=STAGES, action="append", help="training stages (default: all three)")
    parser.add_argument("--batch", type=int, default=8, help="training samples of a step")
    parser.add_argument("--steps", type=int, default=8, help="training steps at most")
    parser.add_argument("--budget", type=float, default=90.0, help="seconds a training stage may take")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing in ours too")
    parser.add_argument("--factors", action="store_true", help="also the baseline without each of its parts")
    arguments = parser.parse_args()
    if torch.device(arguments.device).type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device {arguments.device}: this machine has no CUDA device; use --device cpu for a trial")
    result = {"machine": machine(), "device": arguments.device, "dtype": arguments.dtype, "sizes": arguments.sizes}
    if torch.cuda.is_available():
        result["gpu"] = torch.cuda.get_device_name()
    result |= measure(arguments)
    show(result)
    write_result(arguments.json, result)


if __name__ == "__main__":
    main()
