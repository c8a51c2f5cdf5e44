"""Batches and their random draws, prepared one thread ahead of the training step that uses them."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from wav.data.windows import BatchSampler, WindowDataset
from wav.seeding import numpy_generator
from wav.training.draws import SeededRandom, StepInputs
from wav.training.engine import BatchPlan, World

if TYPE_CHECKING:
    from wav.training.objectives.base import Objective

AHEAD = 2
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
        """This rank's micro-batches of one optimiser step: a pure function of (seed, step, rank)."""
        batch = self.dataset.at(self.sampler, step)
        size, inputs = self.plan.micro, []
        for micro in range(self.plan.accumulation):
            rows = batch.rows(micro * size, (micro + 1) * size)
            index = step * self.plan.accumulation + micro
            random = SeededRandom(self.objective.settings.seed, step, self.world.rank, micro)
            inputs.append(self.objective.draw(rows, self.dataset, random, index))
        return inputs


class Prefetcher:
    """Iterates over the steps [start, stop); ``waited`` counts the seconds spent waiting for data."""

    def __init__(self, source: Source, start: int, stop: int) -> None:
        self.waited = 0.0
        self._source, self._start, self._stop = source, start, stop
        self._ready: queue.Queue[list[StepInputs] | BaseException] = queue.Queue(AHEAD)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True, name="prefetch")
        self._thread.start()

    def _work(self) -> None:
        pinned = self._source.world.device.type == "cuda"
        try:
            for step in range(self._start, self._stop):
                inputs = self._source.step(step)
                if pinned:
                    inputs = [StepInputs(i.batch.pin_memory(), i.draws, i.roles) for i in inputs]
                if not self._put(inputs):
                    return
        except BaseException as error:  # handed to the training thread, which raises it
            self._put(error)

    def _put(self, item: list[StepInputs] | BaseException) -> bool:
        while not self._closed.is_set():
            try:
                self._ready.put(item, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False

    def __iter__(self) -> Iterator[list[StepInputs]]:
        for _ in range(self._start, self._stop):
            begin = time.perf_counter()
            item = self._ready.get()
            self.waited += time.perf_counter() - begin
            if isinstance(item, BaseException):
                raise item
            device = self._source.world.device
            yield item if device.type == "cpu" else [inputs.to(device) for inputs in item]

    def close(self) -> None:
        """Stop preparing."""
        self._closed.set()
        self._thread.join(timeout=10)


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
