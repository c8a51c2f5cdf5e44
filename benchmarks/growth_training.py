"""How a training step grows: seconds and memory against samples of a batch and against video tokens of a sample.

Exponents of the power laws through the measured points (1 is linear). Memory is what torch keeps for the backward pass,
counted tensor by tensor, so that it is the same on every machine. Prints a table; ``--json FILE`` writes it:

    python benchmarks/growth_training.py --json benchmarks/results/growth-training-cpu.json
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from counting import machine, write_result
from fitting import fit_exponent
from sizes import SIZES, Sizes, Train
from torch import Tensor
from train import DROPOUT, STAGES, Run, runs_of
from training_data import Encoders, windows

BATCHES = (4, 8, 16, 32)
GRIDS = ((2, 2), (2, 4), (4, 4), (4, 8), (8, 8))
GRID_BATCH = 4


def make(stage: str, sizes: Sizes) -> tuple[Run, Any]:
    """Our schedule at these sizes, and a batch."""
    encoders = Encoders(sizes, torch.device("cpu"))
    train = Train(stage, sizes.batch, DROPOUT[stage])
    run = runs_of({"ours": ((), train)}, sizes, encoders, torch.float32)["ours"]
    return run, windows(sizes, encoders, sizes.batch, 0)


def kept_bytes(run: Run, batch: Any) -> int:
    """Bytes of distinct storages that autograd keeps for the backward pass, weights left out."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in run.model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = run.loss(*batch, 0)
    del loss
    return sum(kept.values())


def point(stage: str, sizes: Sizes, seconds: float) -> dict[str, float]:
    """Best seconds of a step within a budget, and the bytes it keeps."""
    run, batch = make(stage, sizes)
    memory = kept_bytes(run, batch)
    run.step(*batch, 0)
    best, end, steps = float("inf"), time.perf_counter() + seconds, 0
    while time.perf_counter() < end or steps < 3:
        start = time.perf_counter()
        run.step(*batch, 0)
        best, steps = min(best, time.perf_counter() - start), steps + 1
    return {"seconds": best, "bytes": memory}


def series(stage: str, many: list[tuple[int, Sizes]], seconds: float) -> dict[str, Any]:
    """Points of growing sizes and the exponents through them."""
    points = [{"x": x, **point(stage, sizes, seconds)} for x, sizes in many]
    x = [p["x"] for p in points]
    found: dict[str, Any] = {"points": points}
    for cost in ("seconds", "bytes"):
        exponent, fit = fit_exponent(x, [p[cost] for p in points])
        found[cost] = {"exponent": exponent, "r2": fit}
    return found


def measure(name: str, seconds: float) -> dict[str, Any]:
    """All stages against batch and tokens."""
    base = SIZES[name]
    batches = [(size, replace(base, batch=size)) for size in BATCHES]
    grids = [replace(base, grid=grid, batch=GRID_BATCH) for grid in GRIDS]
    tokens = [(sizes.tokens, sizes) for sizes in grids]
    return {
        stage: {"batch": series(stage, batches, seconds), "tokens": series(stage, tokens, seconds)} for stage in STAGES
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--sizes", choices=SIZES, default="default")
    parser.add_argument("--seconds", type=float, default=1.0, help="spent on each point at least")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    before = machine()
    stages = measure(arguments.sizes, arguments.seconds)
    header = ("stage", "against", "time", "R2", "memory", "R2", "points (x: seconds, MiB)")
    print("{:15}{:8}{:>10}{:>7}{:>10}{:>7}   {}".format(*header))
    for stage, found in stages.items():
        for against, row in found.items():
            points = ", ".join(f"{p['x']}: {p['seconds']:.3f}, {p['bytes'] / 2**20:.0f}" for p in row["points"])
            time_, memory = row["seconds"], row["bytes"]
            fits = f"{time_['exponent']:10.2f}{time_['r2']:7.3f}{memory['exponent']:10.2f}{memory['r2']:7.3f}"
            print(f"{stage:15}{against:8}{fits}   {points}")
    result = {"stages": stages, "sizes": arguments.sizes, "threads": arguments.threads, "machine": before}
    write_result(arguments.json, result | {"load_after": machine()["load"]})


if __name__ == "__main__":
    main()
