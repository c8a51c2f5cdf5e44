"""Training steps on a GPU, parts of ``benchmarks/gpu.py``: without an engine, and through DeepSpeed as training runs.

Random weights and windows. Without an engine a step is forward, backward, clipping, fused AdamW on a float32 master
copy and the average of the weights; with it, what :func:`wav.training.step.update` does. In both the draws are made a
thread ahead, and steps follow one another without a wait, so that what the host does beside the device shows. Passes of
compiled blocks are launched as one graph (:mod:`wav.training.graphs`), or kernel by kernel in the rows that say so.
"""

from __future__ import annotations

import argparse
import gc
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from gpu_planning import asked_for, chosen_sizes, device_of, kernels, seconds_of
from projection import accounted
from sizes import Sizes, Train
from torch import Tensor, nn

from wav.code_cache import prepare_compiler
from wav.data.windows import WindowBatch
from wav.model import build_model
from wav.training.activations import activation_bytes
from wav.training.draws import StepInputs
from wav.training.ema import Ema
from wav.training.engine import World, init_engine, init_world, plan_batch
from wav.training.graphs import RECOMPUTE, PassGraphs
from wav.training.objectives import build_objective
from wav.training.objectives.base import Objective
from wav.training.prefetch import Prefetcher, Source
from wav.training.step import update

if TYPE_CHECKING:
    from gpu import Report

STAGES = ("pretrain_video", "train_value", "train_joint")
WARM, TIMED, PROFILED = 5, 10, 2  #: the joint stage's roles repeat after five steps
DECAY = 0.999
Step = Callable[[int, list[StepInputs]], Any]


class Windows:
    """Random windows in the place of a data set: the same at every step."""

    def __init__(self, sizes: Sizes, count: int) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(count, *shape, generator=generator)

        frames = (sizes.views, sizes.latent)
        self.batch = WindowBatch(
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

    def at(self, sampler: Any, step: int) -> WindowBatch:
        """The windows."""
        return self.batch

    def indices(self, step: int) -> list[int]:
        """As a sampler, which these windows are too: none that lie in a store."""
        return []

    def expect(self, indices: list[int]) -> None:
        """Nothing to bring."""


class MasterCopy:
    """AdamW on float32 copies of the weights, without an engine."""

    def __init__(self, module: nn.Module, settings: Train, fused: bool) -> None:
        self.weights = [p for p in module.parameters() if p.requires_grad]
        self.masters = [p.detach().float().clone() for p in self.weights]
        self.clip = settings.clip
        betas = (settings.beta1, settings.beta2)
        self.optimizer = torch.optim.AdamW(
            self.masters, lr=1e-5, betas=betas, weight_decay=settings.weight_decay, fused=fused
        )

    def step(self) -> None:
        """Clip, update, and let the weights follow."""
        for master, weight in zip(self.masters, self.weights, strict=True):
            if weight.grad is not None:  # no sample may have had its role
                master.grad, weight.grad = weight.grad.float(), None
        torch.nn.utils.clip_grad_norm_(self.masters, self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_copy_(self.weights, self.masters)


def without_engine(objective: Objective, settings: Train, world: World) -> Step:
    """A training step on plain PyTorch."""
    cuda = world.device.type == "cuda"
    objective.to(world.device, torch.bfloat16 if cuda else torch.float32)
    optimizer, ema = MasterCopy(objective, settings, fused=cuda), Ema(objective, DECAY, 0, 1)

    def step(number: int, inputs: list[StepInputs]) -> None:
        loss, _ = objective(inputs[0])
        loss.backward()
        optimizer.step()
        ema.update(number)

    return step


def through_engine(objective: Objective, settings: Train, world: World) -> Step:
    """A training step as :mod:`wav.training.loop` takes it."""
    train: Any = settings
    engine = init_engine(objective, train, plan_batch(train, 1), world)
    ema = Ema(engine.module, DECAY, 0, 1)
    return lambda number, inputs: update(engine, ema, train, number, inputs)


def measured(
    settings: Train,
    arguments: argparse.Namespace,
    world: World,
    make: Callable[..., Step],
    compiled: bool = False,
    recorded: bool = False,
) -> dict[str, Any]:
    """Samples a second, the kernels' busy share, and memory, of one stage stepped by what ``make`` gives."""
    sizes, device = chosen_sizes(arguments), world.device
    train: Any = settings  # has what a section of the parameters has, as far as it is read
    before = give_back(device)
    with device:
        model = build_model(sizes.model, sizes, sizes.latent, sizes.caption, sizes.value_channels)  # type: ignore[arg-type]
    if settings.gradient_checkpointing == "on":
        model.enable_gradient_checkpointing(RECOMPUTE)
    if compiled:
        prepare_compiler()
        model.compile_blocks(backend="eager" if arguments.trial else "inductor")
    objective = build_objective(train, model.train(), sizes.memory, sizes.action_dim)
    if recorded and device.type == "cuda":
        objective.graphs = PassGraphs(objective.compute, objective)
    step = make(objective, settings, world)
    many: Any = Windows(sizes, settings.batch_size)
    source = Source(many, many, objective, plan_batch(train, 1), world)
    batches = iter(Prefetcher(source, 0, WARM + TIMED + PROFILED))
    first = [seconds_of(lambda number=number: step(number, next(batches)), device) for number in range(1, WARM + 1)]
    last = WARM + TIMED + 1
    seconds = seconds_of(lambda: [step(number, next(batches)) for number in range(WARM + 1, last)], device) / TIMED
    cuda = device.type == "cuda"
    memory = torch.cuda.max_memory_allocated(device) / 2**30 if cuda else 0.0
    reserved = torch.cuda.max_memory_reserved(device) / 2**30 if cuda else 0.0  # a graph's memory is counted here alone
    busy = kernels(lambda: [step(last + n, inputs) for n, inputs in enumerate(batches)], device)
    estimated = activation_bytes(accounted(sizes), train, settings.batch_size) / 2**30
    row = {
        "samples_per_second": round(settings.batch_size / seconds, 2),
        "seconds_per_step": round(seconds, 4),
        "first_steps_seconds": [round(each, 1) for each in first],
        "peak_gib": round(memory, 1),
        "reserved_gib": round(reserved, 1),
        "of_it_from_before_gib": round(before, 1),
        "activations_estimated_gib": round(estimated, 1),
    }
    if busy:
        row |= {
            "kernels_busy_share": round(busy["busy_ms"] / PROFILED / 1e3 / seconds, 3),
            "profile_of_two_steps": busy,
        }
    return row


def give_back(device: torch.device) -> float:
    """Give back what earlier rows held; the GiB that still lie there, which should be none."""
    gc.collect()
    if device.type != "cuda":
        return 0.0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device) / 2**30


def row_of(arguments: argparse.Namespace, report: Report, name: str, find: Callable[[], dict[str, Any]]) -> None:
    """Report a row, or why there is none: too little memory, a compiler that gives up; the other rows count."""
    if not asked_for(arguments, name):
        return
    try:
        report(name, find())
    except RuntimeError as error:
        report(name, {"error": " ".join(str(error).split())[:300]})


def settings_of(stage: str, arguments: argparse.Namespace, **changes: Any) -> Train:
    """A stage's section at the batch that is measured."""
    batch = 4 if arguments.trial else arguments.batch
    return replace(Train(stage, batch, precision="fp32" if arguments.trial else "bf16"), **changes)


def train(arguments: argparse.Namespace, report: Report) -> None:
    """Plain steps, not compiled: as they are, and with every layer recomputed."""
    world = World(0, 1, device_of(arguments))
    for name, switch in (("eager", "off"), ("recomputed", "on")):
        for stage in STAGES:
            settings = settings_of(stage, arguments, gradient_checkpointing=switch)
            find = partial(measured, settings, arguments, world, without_engine)
            row_of(arguments, report, f"{stage}, {name}", find)


def engine(arguments: argparse.Namespace, report: Report) -> None:
    """DeepSpeed's steps on ZeRO 2, between two turns of plain ones; all compiled, which takes a minute a stage."""
    if find_spec("deepspeed") is None:
        report("missing", "not run: deepspeed is not installed")
        return
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    world = init_world(str(device_of(arguments)))
    turns: tuple[tuple[str, Callable[..., Step], bool], ...] = (
        ("plain", without_engine, True),
        ("zero 2", through_engine, True),
        ("zero 2, kernel by kernel", through_engine, False),
        ("plain again", without_engine, True),
    )
    for stage in reversed(STAGES):  # the longest first: what is cut off had best be the rest
        for name, make, recorded in turns:
            settings = settings_of(stage, arguments, zero_stage=2)
            find = partial(measured, settings, arguments, world, make, compiled=True, recorded=recorded)
            row_of(arguments, report, f"{stage}, {name}", find)
    torch.distributed.destroy_process_group()
