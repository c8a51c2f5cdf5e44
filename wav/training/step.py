"""One optimiser step: learning rate, passes, gradient norm, average of the weights; and means of the losses."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

    from wav.config import TrainSettings
    from wav.training.draws import StepInputs
    from wav.training.ema import Ema

Row = dict[str, float]


@dataclass(frozen=True)
class Done:
    """What an optimiser step gave: mean losses, the gradient norm before clipping, and whether it was dropped."""

    losses: Row
    norm: float | None
    dropped: bool


def update(engine: DeepSpeedEngine, ema: Ema, settings: TrainSettings, step: int, inputs: list[StepInputs]) -> Done:
    """Optimiser step ``step`` (from 1) over its micro-batches: forward, backward, optimiser, average.

    A step whose gradients are not finite is dropped on every layout. With ZeRO 1 to 3 and bf16 DeepSpeed does so
    itself, in silence (0.19.8: ``skipped_steps`` counts them); with ZeRO 0 in fp32 it would put them into the weights.
    """
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate(settings, step - 1) * group.get("scale", 1.0)
    passes, skipped = LossMean(), engine.skipped_steps
    norm: float | None = None
    for index, micro in enumerate(inputs):
        loss, parts = engine(micro)
        engine.backward(loss)
        if index == len(inputs) - 1:
            norm = gradient_norm(engine)
        if norm is None or math.isfinite(norm):
            engine.step()
        else:
            drop_step(engine)
        passes.add(as_row(loss, parts))
    if norm is None and (kept := engine.get_global_grad_norm()) is not None:
        norm = float(kept)
    ema.update(step)
    return Done(passes.mean(), norm, engine.skipped_steps > skipped)


def drop_step(engine: DeepSpeedEngine) -> None:
    """A step of the engine in which its optimiser does nothing, counted as those that DeepSpeed drops."""
    engine.optimizer.step = lambda *_, **__: None
    try:
        engine.step()
    finally:
        del engine.optimizer.step
    engine.skipped_steps += 1


@torch.no_grad()
def evaluate(engine: DeepSpeedEngine, ema: Ema, inputs: list[StepInputs]) -> Row:
    """Mean losses of the averaged weights on micro-batches that are always the same."""
    losses = LossMean()
    engine.eval()
    with ema.swapped():
        for micro in inputs:
            losses.add(as_row(*engine(micro)))
    engine.train()
    return losses.mean()


def learning_rate(settings: TrainSettings, step: int) -> float:
    """Learning rate of ``step`` (counted from 0): linear warm-up, then constant or a cosine down to zero."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return settings.learning_rate
    length = max(1, settings.steps - settings.warmup_steps)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - settings.warmup_steps) / length))


def gradient_norm(engine: DeepSpeedEngine) -> float | None:
    """Gradient norm before clipping, between backward and step; None where DeepSpeed keeps it (ZeRO 1-3, bf16)."""
    if engine.zero_optimization() or engine.bfloat16_enabled():
        return None
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    return float(torch.nn.utils.get_total_norm(gradients))


def as_row(loss: torch.Tensor, parts: dict[str, torch.Tensor]) -> Row:
    """A loss and its parts as floats, fetched from the device at once."""
    values = torch.stack([loss.detach().float(), *parts.values()]).tolist()
    return dict(zip(["loss", *parts], values, strict=True))


class LossMean:
    """Means of the losses since the last recorded row, kept as floats so that a checkpoint can hold them exactly."""

    def __init__(self) -> None:
        self.steps: list[Row] = []

    def add(self, parts: Row) -> None:
        """Losses of one step."""
        self.steps.append(parts)

    def mean(self) -> Row:
        """Mean of every part over the steps that had it; starts anew."""
        mean, self.steps = mean_row(self.steps), []
        return mean


def mean_row(rows: list[Row]) -> Row:
    """Mean of every name over the rows that have it."""
    names = sorted({name for row in rows for name in row})
    columns = {name: [row[name] for row in rows if name in row] for name in names}
    return {name: math.fsum(values) / len(values) for name, values in columns.items()}
