"""Training steps on the baseline schedule (what the reference's trainer does) and on ours, in turns in one process.

Same weights, same windows, same draws, in the three stages; what the baseline does stands in :mod:`baseline.training`.
A step is draws, losses, gradients, clipping, AdamW and the average; the baseline's also decodes its samples' frames
from mp4 files (:mod:`baseline.recordings`) and runs VAE and text encoder. ``step_ratio`` is against a baseline step
that is given latents and embeddings, so that it holds the transformer's work alone. Prints a table; ``--json FILE``
writes it:

    python benchmarks/train.py --sizes default --json benchmarks/results/train-default-cpu.json
    python benchmarks/train.py --sizes medium --json benchmarks/results/train-medium-cpu.json

On a CPU seconds are those of CPU time (one thread), because neighbours on a shared machine stretch the clock's, which
are recorded as ``clock_seconds``. Both schedules take one (level, noise) draw per video pass for the ratio. Ours may
take several per pass: ``effective`` counts the expert draws that are trained per second with four, against the
baseline's one.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from baseline.training import baseline, diffusers_operations
from counting import Counted, machine, matrix_peak, write_result
from sizes import SIZES, Sizes, Train
from torch import Tensor
from training_data import ENCODERS, Encoders, Pictures, make_encoders, windows

from wav.data.windows import WindowBatch
from wav.model import WAVTransformer, build_model
from wav.training.draws import SeededRandom
from wav.training.ema import Ema
from wav.training.objectives import build_objective

STAGES = ("pretrain_video", "train_value", "train_joint")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
POOL = 4  #: batches that are trained on in turn
DRAWS = 4  #: of ours per video pass, for the effective rate
DROPOUT = {"pretrain_video": 0.06, "train_value": 0.0, "train_joint": 0.0}
#: What the baseline does that ours does not.
BASELINE = ("videos", "encoders", "tokens", "checkpointing", "operations", "optimiser")
FROM_LATENTS = "baseline, from latents"  #: the baseline without its first two parts


class Run:
    """A model in training on one schedule."""

    def __init__(
        self, model: WAVTransformer, train: Train, sizes: Sizes, encoders: Encoders, parts: tuple[str, ...]
    ) -> None:
        self.train, self.encoders, self.parts = train, encoders, parts
        self.device = next(model.parameters()).device
        if "tokens" in parts:
            baseline(model, checkpointing=False)
        if "checkpointing" in parts or train.gradient_checkpointing == "on":
            model.enable_gradient_checkpointing()
        self.model = model.train()
        settings: Any = train
        self.objective = build_objective(settings, model, sizes.memory, sizes.action_dim)
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            trained,
            lr=train.learning_rate,
            betas=(train.beta1, train.beta2),
            weight_decay=train.weight_decay,
            fused=None if "optimiser" in parts else True,
        )
        self.ema = Ema(self.objective, 0.995, 0, 1)

    def operations(self) -> Any:
        """Context in which the schedule's own norms and rotations run."""
        return diffusers_operations() if "operations" in self.parts else nullcontext()

    def loss(self, batch: WindowBatch, pictures: Pictures, index: int) -> Tensor:
        """One forward pass."""
        if "videos" in self.parts:
            pictures = self.encoders.decode(pictures)
        if "encoders" in self.parts:
            batch = self.encoders.encode(batch, pictures)
        inputs = self.objective.draw(batch.to("cpu"), self.encoders, SeededRandom(0, index), index)
        loss, _ = self.objective(inputs.to(self.device))
        return loss  # type: ignore[no-any-return]

    def step(self, batch: WindowBatch, pictures: Pictures, index: int) -> float:
        """One optimiser step; its loss."""
        with self.operations():
            loss = self.loss(batch, pictures, index)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.train.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update(index + 1)
        return float(loss.detach())

    def gradients(self, batch: WindowBatch, pictures: Pictures) -> tuple[float, dict[str, Tensor]]:
        """Loss and gradients of one batch; nothing is updated."""
        with self.operations():
            loss = self.loss(batch, pictures, 0)
            loss.backward()
        found = {n: p.grad.detach().clone() for n, p in self.model.named_parameters() if p.grad is not None}
        self.optimizer.zero_grad()
        return float(loss.detach()), found


def difference(one: Run, two: Run, batch: WindowBatch, pictures: Pictures) -> dict[str, float]:
    """Largest difference of the loss, and of any gradient relative to the largest entry of its tensor."""
    (loss, first), (other, second) = (run.gradients(batch, pictures) for run in (one, two))
    worst = 0.0
    for name, gradient in second.items():
        scale = max(float(gradient.abs().max()), 1e-12)
        worst = max(worst, float((first[name].to(gradient) - gradient).abs().max()) / scale if name in first else 1.0)
    return {"loss": abs(loss - other), "gradient": worst}


@contextmanager
def peak_memory(device: torch.device) -> Iterator[dict[str, float]]:
    """Peak GPU memory of the block in GiB, under ``peak``; 0 on a CPU."""
    found = {"peak": 0.0}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    yield found
    if device.type == "cuda":
        found["peak"] = torch.cuda.max_memory_allocated(device) / 2**30


def timed(run: Run, batch: WindowBatch, pictures: Pictures, index: int) -> tuple[float, float, float]:
    """Seconds of one step, the device's work included; by the clock, and of CPU time on a CPU; and its loss."""
    if run.device.type == "cuda":
        torch.cuda.synchronize(run.device)
    start, cpu = time.perf_counter(), time.process_time()
    loss = run.step(batch, pictures, index)
    if run.device.type == "cuda":
        torch.cuda.synchronize(run.device)
    clock = time.perf_counter() - start
    return (clock, clock, loss) if run.device.type == "cuda" else (clock, time.process_time() - cpu, loss)


def runs_of(
    names: dict[str, tuple[tuple[str, ...], Train]], sizes: Sizes, encoders: Encoders, dtype: torch.dtype
) -> dict[str, Run]:
    """Runs of equal weights on their schedules."""
    model = build_model(sizes.model, sizes, sizes.latent, sizes.caption, sizes.value_channels)  # type: ignore[arg-type]
    model = model.to(dtype)
    copies = {name: copy.deepcopy(model).to(encoders.device) for name in names}
    return {name: Run(copies[name], train, sizes, encoders, parts) for name, (parts, train) in names.items()}


def stage_result(
    train: Train, sizes: Sizes, encoders: Encoders, pool: list[tuple[WindowBatch, Pictures]], dtype: torch.dtype,
    steps: int, budget: float, factors: bool,
) -> dict[str, Any]:  # fmt: skip
    """Compare, count and time the schedules of one stage within ``budget`` seconds."""
    begun = time.perf_counter()
    names = {"baseline": (BASELINE, train), FROM_LATENTS: (BASELINE[2:], train), "ours": ((), train)}
    if train.stage != "pretrain_video":
        names["ours, more draws"] = ((), replace(train, value_draws=DRAWS, action_draws=DRAWS))
    if factors:
        names |= {f"baseline but {part}": (tuple(p for p in BASELINE if p != part), train) for part in BASELINE}
    runs = runs_of(names, sizes, encoders, dtype)
    result: dict[str, Any] = {"difference": difference(runs["baseline"], runs["ours"], *pool[0])}
    rows: dict[str, dict[str, Any]] = {}
    for name, run in runs.items():
        with peak_memory(encoders.device) as memory, Counted() as counted:
            run.gradients(*pool[0])
        rows[name] = {"gflop": counted.flops / 1e9, "gbyte": counted.moved / 1e9, "peak_gib": memory["peak"]}
    clock: dict[str, list[float]] = {name: [] for name in runs}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    curves: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(steps):
        start = time.perf_counter()
        for name, run in runs.items():
            wall, taken, loss = timed(run, *pool[index % POOL], index)
            clock[name].append(wall)
            seconds[name].append(taken)
            curves[name].append(loss)
        if time.perf_counter() - begun + 1.3 * (time.perf_counter() - start) > budget:
            break
    for name, row in rows.items():
        kept = seconds[name][1:] or seconds[name]  # the first step allocates
        median = statistics.median(kept)
        row |= {"seconds": median, "min": min(kept), "max": max(kept), "samples_per_second": train.batch_size / median}
        row |= {"clock_seconds": statistics.median(clock[name][1:] or clock[name])}
    result |= {
        "ratio": _ratio(seconds["baseline"], seconds["ours"]),
        "step_ratio": _ratio(seconds[FROM_LATENTS], seconds["ours"]),
        "curve": {name: curves[name] for name in ("baseline", "ours")},
        "curve_difference": max(abs(a - b) for a, b in zip(curves["baseline"], curves["ours"], strict=True)),
        "schedules": rows,
    }
    if "ours, more draws" in rows:
        result["effective_ratio"] = DRAWS * rows["baseline"]["seconds"] / rows["ours, more draws"]["seconds"]
    return result


def _ratio(baseline: list[float], ours: list[float]) -> float:
    """Median ratio of steps taken in turns; the first allocates."""
    pairs = list(zip(baseline, ours, strict=True))
    return statistics.median(a / b for a, b in pairs[1:] or pairs)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """All stages."""
    device, dtype = torch.device(arguments.device), DTYPES[arguments.dtype]
    sizes = SIZES[arguments.sizes]
    sizes = replace(sizes, batch=arguments.batch or sizes.batch)
    encoders = make_encoders(arguments.encoders, sizes, device, dtype)
    pool = [windows(sizes, encoders, sizes.batch, seed) for seed in range(POOL)]
    stages = {}
    for stage in arguments.stage or STAGES:
        again = "on" if arguments.checkpointing else "off"
        train = Train(stage, sizes.batch, DROPOUT[stage], gradient_checkpointing=again)
        stages[stage] = stage_result(
            train, sizes, encoders, pool, dtype, arguments.steps, arguments.budget, arguments.factors
        )
    return summary(stages, sizes) | {"videos": encoders.recordings is not None}


def summary(stages: dict[str, Any], sizes: Sizes) -> dict[str, Any]:
    """The whole result: the smallest ratio and the largest difference of the stages stand for all."""
    return {
        "ratio": min(stage["ratio"] for stage in stages.values()),
        "step_ratio": min(stage["step_ratio"] for stage in stages.values()),
        "max_abs_diff": max(stage["difference"]["loss"] for stage in stages.values()),
        "max_gradient_diff": max(stage["difference"]["gradient"] for stage in stages.values()),
        "baseline_seconds": sum(stage["schedules"]["baseline"]["seconds"] for stage in stages.values()),
        "ours_seconds": sum(stage["schedules"]["ours"]["seconds"] for stage in stages.values()),
        "stages": stages,
        "sizes": asdict(sizes),
    }


def show(result: dict[str, Any]) -> None:
    """Print the table."""
    print(
        "{:15}{:30}{:>9}{:>11}{:>9}{:>9}{:>8}".format("stage", "schedule", "s/step", "samples/s", "GFLOP", "GB", "peak")
    )
    for stage, found in result["stages"].items():
        for name, row in found["schedules"].items():
            share = row["gflop"] / row["seconds"] / result["peak_gflops"]
            numbers = f"{row['seconds']:9.3f}{row['samples_per_second']:11.1f}{row['gflop']:9.1f}{row['gbyte']:9.2f}"
            print(f"{stage:15}{name:30}{numbers}{share:8.0%}")
        effective = f", {found['effective_ratio']:.2f} in draws" if "effective_ratio" in found else ""
        print(
            f"{stage:15}ratio {found['ratio']:.2f}, from latents {found['step_ratio']:.2f}{effective}; "
            f"loss differs by {found['difference']['loss']:.1e}, "
            f"gradients by {found['difference']['gradient']:.1e} of their largest entry, "
            f"{len(found['curve']['ours'])} steps' losses by {found['curve_difference']:.1e}"
        )


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--sizes", choices=SIZES, default="default")
    parser.add_argument("--stage", choices=STAGES, action="append", help="default: all three")
    parser.add_argument("--encoders", choices=ENCODERS, default="pca", help="what the baseline runs in the step")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--batch", type=int, default=0, help="samples of a step (default: the sizes')")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing in ours too")
    parser.add_argument("--factors", action="store_true", help="also the baseline without each of its parts")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=30, help="steps of a curve at most")
    parser.add_argument("--budget", type=float, default=30.0, help="seconds a stage may take")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    before = machine()
    result = measure(arguments)
    result |= {"peak_gflops": matrix_peak() / 1e9, "encoders": arguments.encoders, "device": arguments.device}
    result |= {"dtype": arguments.dtype, "threads": arguments.threads, "machine": before}
    result["load_after"] = machine()["load"]
    show(result)
    write_result(arguments.json, result)


if __name__ == "__main__":
    main()
