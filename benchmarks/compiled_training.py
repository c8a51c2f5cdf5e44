"""Training steps at the paper's size on one GPU: blocks eager and compiled, layers recomputed and not.

Random weights and windows, bfloat16, plain AdamW without DeepSpeed: what the transformer itself costs. Needs torch,
diffusers, safetensors and numpy alone. The file is written again after every row, so that a time limit loses one::

    python benchmarks/compiled_training.py --json benchmarks/results/compiled-training-gpu.json
    python benchmarks/compiled_training.py --device cpu --sizes tiny --batch 2 --backend eager   # a trial
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without an install
from counting import machine, write_result
from sizes import SIZES, Sizes, Train
from torch import Tensor

from wav.data.windows import WindowBatch
from wav.model import build_model
from wav.model.experts import ExpertBlock
from wav.model.video import VideoBlock
from wav.training.draws import SeededRandom
from wav.training.objectives import build_objective

STAGES = ("pretrain_video", "train_value", "train_joint")
WARM, TIMED = 3, 6


def windows(sizes: Sizes, count: int, device: torch.device) -> WindowBatch:
    """Random windows; noise of a step is drawn on the CPU, as training draws it."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(count, *shape)

    frames = (sizes.views, sizes.latent)
    return WindowBatch(
        memory=normal(*frames, sizes.memory, *sizes.grid),
        future=normal(*frames, sizes.future, *sizes.grid),
        text=normal(sizes.text_tokens, sizes.caption),
        text_mask=torch.ones(count, sizes.text_tokens, dtype=torch.bool),
        state=normal(sizes.state_dim),
        actions=normal(sizes.chunk, sizes.action_channels),
        values=normal(sizes.chunk, sizes.value_channels),
        episode=torch.zeros(count, dtype=torch.int64),
        step=torch.arange(count),
    )


def measure(stage: str, model: Any, sizes: Sizes, arguments: argparse.Namespace) -> dict[str, float]:
    """Samples per second of one stage, of the device's work alone, and the peak memory."""
    device = torch.device(arguments.device)
    settings: Any = Train(stage, arguments.batch)
    objective = build_objective(settings, model, sizes.memory, sizes.action_dim)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=device.type == "cuda")
    batch = windows(sizes, arguments.batch, device)
    inputs = objective.draw(batch, None, SeededRandom(0, 0), 0).to(device)
    seconds, begun = [], time.perf_counter()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for step in range(WARM + TIMED):
        start = time.perf_counter()
        loss, _ = objective(inputs)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()
        if step == 0:
            first = time.perf_counter() - begun
        if step >= WARM:
            seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    return {
        "samples_per_second": round(arguments.batch / statistics.median(seconds), 2),
        "seconds_per_step": round(statistics.median(seconds), 4),
        "first_step_seconds": round(first, 1),
        "peak_gib": round(peak, 1),
        "loss": round(float(loss), 4),
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--sizes", choices=SIZES, default="full")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--no-compile", action="store_true")
    arguments = parser.parse_args()
    sizes, device = SIZES[arguments.sizes], torch.device(arguments.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    result: dict[str, Any] = {"machine": machine(), "sizes": arguments.sizes, "batch": arguments.batch, "rows": []}
    if device.type == "cuda":
        result["gpu"] = torch.cuda.get_device_name()
    with device:
        model = build_model(sizes.model, sizes, sizes.latent, sizes.caption, sizes.value_channels)  # type: ignore[arg-type]
    model = model.to(device, dtype).train()
    plain = (VideoBlock.forward, ExpertBlock.forward)
    for compiled in (False,) if arguments.no_compile else (False, True):
        if compiled:
            torch._dynamo.config.recompile_limit = 64
            VideoBlock.forward, ExpertBlock.forward = (  # type: ignore[method-assign, assignment]
                torch.compile(function, backend=arguments.backend, dynamic=False) for function in plain
            )
        for recompute in (False, True):
            if recompute and compiled:
                continue
            if recompute:
                model.enable_gradient_checkpointing()
            else:
                model.disable_gradient_checkpointing()
            for stage in STAGES:
                row: dict[str, Any] = {"stage": stage, "compiled": compiled, "recomputed": recompute}
                try:
                    row |= measure(stage, model, sizes, arguments)
                except RuntimeError as error:  # too little memory, or a compiler that gives up: the other rows count
                    row["error"] = " ".join(str(error).split())[:300]
                    if device.type == "cuda":
                        torch.cuda.empty_cache()
                print(row, flush=True)
                result["rows"].append(row)
                write_result(arguments.json, result)
    VideoBlock.forward, ExpertBlock.forward = plain  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
