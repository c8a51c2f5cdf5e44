"""One optimiser step: learning rate, passes, gradient norm, average of the weights; and means of the losses."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from wav.training.engine import Fetched, clips_here

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

    from wav.config import TrainSettings
    from wav.training.draws import StepInputs
    from wav.training.ema import Ema

Row = dict[str, float]


@dataclass(frozen=True)
class Done:
    """What an optimiser step gave: mean losses, the gradient norm before clipping, and whether it was dropped.

    The norm stays where it was computed: turning it into a number waits for the device.
    """

    losses: Row
    norm: torch.Tensor | float | None
    dropped: bool


def update(engine: DeepSpeedEngine, ema: Ema, settings: TrainSettings, step: int, inputs: list[StepInputs]) -> Done:
    """Optimiser step ``step`` (from 1) over its micro-batches: forward, backward, optimiser, average.

    A step whose gradients are not finite is dropped on every layout. With ZeRO 1 to 3 and bf16 DeepSpeed does so
    itself, in silence (0.19.8: ``skipped_steps`` counts them); with ZeRO 0 in fp32 it would put them into the weights.
    That question is the one time that a step waits for the device; losses arrive by then.
    """
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate(settings, step - 1) * group.get("scale", 1.0)
    passes, skipped = [], engine.skipped_steps
    clipped: torch.Tensor | None = None
    for index, micro in enumerate(inputs):
        loss, parts = engine(micro)
        passes.append(Losses(loss, parts))
        engine.backward(loss)
        if index == len(inputs) - 1 and clips_here(settings):
            clipped = clip_gradients(ema.parameters, settings.clip)
        if clipped is None or torch.isfinite(clipped):
            engine.step()
        else:
            drop_step(engine)
    norm = engine.get_global_grad_norm() if clipped is None else clipped
    ema.update(step)
    return Done(mean_row([losses.row() for losses in passes]), norm, engine.skipped_steps > skipped)


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
    engine.eval()
    with ema.swapped():
        losses = [Losses(*engine(micro)) for micro in inputs]
    engine.train()
    return mean_row([found.row() for found in losses])


def learning_rate(settings: TrainSettings, step: int) -> float:
    """Learning rate of ``step`` (counted from 0): linear warm-up, then constant or a cosine down to zero."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return settings.learning_rate
    length = max(1, settings.steps - settings.warmup_steps)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - settings.warmup_steps) / length))


def clip_gradients(parameters: list[nn.Parameter], most: float) -> torch.Tensor:
    """Clip the gradients to the norm ``most``, between backward and step; the norm that they had."""
    return torch.nn.utils.clip_grad_norm_([p for p in parameters if p.grad is not None], most)


class Losses:
    """A loss and its parts, which come from the device while it goes on."""

    def __init__(self, loss: torch.Tensor, parts: dict[str, torch.Tensor]) -> None:
        self._names = ["loss", *parts]
        self._values = Fetched(torch.stack([loss.detach().float(), *parts.values()]))

    def row(self) -> Row:
        """The losses as floats."""
        return dict(zip(self._names, self._values.numbers(), strict=True))


def mean_row(rows: list[Row]) -> Row:
    """Mean of every name over the rows that have it."""
    names = sorted({name for row in rows for name in row})
    columns = {name: [row[name] for row in rows if name in row] for name in names}
    return {name: math.fsum(values) / len(values) for name, values in columns.items()}
