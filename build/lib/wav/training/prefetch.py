"""Batches and their random draws, prepared one thread ahead of the training step that uses them.

Another thread, further ahead, opens the shards that batches will need, and so brings those that lie in an object store.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import torch

from wav.data.windows import BatchSampler, WindowDataset
from wav.seeding import numpy_generator
from wav.training.draws import SeededRandom, StepInputs
from wav.training.engine import BatchPlan, World

if TYPE_CHECKING:
    from wav.training.objectives.base import Objective

AHEAD, SHARDS_AHEAD = 2, 100  # steps
VALIDATION_BATCHES = 4


@dataclass(frozen=True)
class Source:
    """Where micro-batches come from: windows, how they are cut, and who asks."""

    dataset: WindowDataset
    sampler: BatchSampler
    objective: Objective
    plan: BatchPlan
    world: World

    def step(self, step: int) -> list[StepInputs]:
        """This rank's micro-batches of one optimiser step: a pure function of (seed, step, rank).

        Draws are named by the micro-batch's place in the global batch, so that a run which goes on with other ranks
        computes the same, up to rounding, where ``micro_batch_size`` stays what it was.
        """
        batch = self.dataset.at(self.sampler, step)
        size, inputs = self.plan.micro, []
        for micro in range(self.plan.accumulation):
            rows = batch.rows(micro * size, (micro + 1) * size)
            index = step * self.plan.accumulation + micro
            place = self.world.rank * self.plan.accumulation + micro
            random = SeededRandom(self.objective.settings.seed, step, place, 0)
            inputs.append(self.objective.draw(rows, self.dataset, random, index))
        return inputs


class Prefetcher:
    """Iterates over the steps [start, stop); ``waited`` counts the seconds spent waiting for data."""

    def __init__(self, source: Source, start: int, stop: int) -> None:
        self.waited = 0.0
        self._source, self._steps = source, range(start, stop)

    def __iter__(self) -> Iterator[list[StepInputs]]:
        device, todo = self._source.world.device, iter(self._steps)
        prepare = (torch.cuda.set_device, (device,)) if device.type == "cuda" else (None, ())  # else it pins on GPU 0
        with ThreadPoolExecutor(1, "shards") as shards, ThreadPoolExecutor(1, "prefetch", *prepare) as pool:
            self._shards = shards
            ahead = deque(pool.submit(self._prepare, step) for step in islice(todo, AHEAD))
            while ahead:
                begin = time.perf_counter()
                inputs = ahead.popleft().result()
                self.waited += time.perf_counter() - begin
                ahead.extend(pool.submit(self._prepare, step) for step in islice(todo, 1))
                yield inputs if device.type == "cpu" else [micro.to(device) for micro in inputs]

    def _prepare(self, step: int) -> list[StepInputs]:
        later = min(step + SHARDS_AHEAD, self._steps[-1])
        self._shards.submit(self._source.dataset.expect, self._source.sampler.indices(later))
        inputs = self._source.step(step)
        return [micro.pin_memory() for micro in inputs] if self._source.world.device.type == "cuda" else inputs


def validation_inputs(
    dataset: WindowDataset, objective: Objective, plan: BatchPlan, device: torch.device
) -> list[StepInputs]:
    """A few fixed micro-batches, evenly spaced over the held-out windows; the same at every call and on every rank."""
    seed, size = objective.settings.seed, min(plan.micro, len(dataset))
    count = min(VALIDATION_BATCHES, len(dataset) // size)
    indices = np.linspace(0, len(dataset) - 1, count * size).round().astype(np.int64)
    inputs = []
    for i in range(count):
        batch = dataset.batch(indices[i::count], numpy_generator(seed, "validation.memory", i))
        inputs.append(objective.draw(batch, None, SeededRandom(seed, "validation", i), i).to(device))
    return inputs
