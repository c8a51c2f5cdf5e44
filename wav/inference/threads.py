"""A batch planned on worker threads, each of which computes its own rows, or its own candidates of a single row.

Splitting every kernel over the threads would make them meet thousands of times in a call; here they meet when a call of
the model ends. Torch's own operations run on the thread that calls them: its OpenMP threads spin for milliseconds after
each operation, on the cores that the other workers need. No bit depends on it, because it is done only where each row's
numbers depend on that row alone (:attr:`~wav.inference.torch.TorchPlannerModel.independent_rows`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from wav.inference.torch import Features, TorchPlannerModel

WORTH = 1 << 16
"""Numbers that the memory frames' tokens of a share's candidates are, for a share to be worth a thread: with fewer,
Python, of which one thread runs at a time, takes as long as the kernels do (``benchmarks/latency.py``)."""

Part = tuple[slice, slice]  #: rows and candidates


@contextlib.contextmanager
def on_threads(model: TorchPlannerModel) -> Iterator[Any]:
    """The model on as many workers as torch has threads, if its rows are independent; else as it is."""
    threads = torch.get_num_threads()
    if threads == 1 or not model.independent_rows:
        yield model
        return
    torch.set_num_threads(1)  # workers inherit it
    try:
        yield ThreadedPlannerModel(model, threads)
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class SplitFeatures:
    """Features of shares of the rows and candidates."""

    parts: Sequence[Part]
    features: Sequence[Features]


class ThreadedPlannerModel:
    """A :class:`wav.planning.types.PlannerModel` that deals another one's rows and candidates out to threads."""

    def __init__(self, model: TorchPlannerModel, threads: int) -> None:
        self.model, self.shapes, self.threads = model, model.shapes, threads

    def video_features(self, context: Any, noise: Tensor, levels: tuple[float, ...]) -> SplitFeatures:
        """Features of noises (B, M, V, C, Ff, h, w); a row's candidates are dealt out where threads have no row."""
        rows = shares(noise.shape[0], self.threads)
        numbers = context.memory[0, :, 0].numel() * self.model.width  # of the memory's tokens
        worth = min(self.threads // len(rows), noise.shape[1] * numbers // WORTH)
        parts = [(row, part) for row in rows for part in shares(noise.shape[1], worth)]

        def features(part: Part) -> Features:
            found = self.model.video_features(context.rows(part[0]), noise[part], levels)
            return found if noise.shape[1] == 1 else replace(found, layers=None)  # a share of one is still only scored

        return SplitFeatures(parts, self._run(features, parts))

    def denoise_video(self, context: Any, noise: Tensor, steps: int) -> Tensor:
        """Future latents (B, V, C, Ff, h, w) of their noise."""
        rows = shares(len(noise), self.threads)
        return torch.cat(self._run(lambda row: self.model.denoise_video(context.rows(row), noise[row], steps), rows))

    def denoise_value(self, features: SplitFeatures, noise: Tensor, steps: int) -> Tensor:
        """Values of noises (B, M, N, A, Cv), each share on its own features."""
        values = torch.empty_like(noise)

        def fill(share: tuple[Part, Features]) -> None:
            part, found = share
            values[part] = self.model.denoise_value(found, noise[part], steps)

        self._run(fill, list(zip(features.parts, features.features, strict=True)))
        return values

    def denoise_action(
        self,
        context: Any,
        features: SplitFeatures,
        value: Tensor | None,
        noise: Tensor,
        steps: int,
        value_level: float = 1.0,
    ) -> Tensor:
        """Actions (B, A, Ca) of the candidates that are acted on."""

        def actions(share: tuple[Part, Features]) -> Tensor:
            (row, _), found = share
            mine = None if value is None else value[row]
            return self.model.denoise_action(context.rows(row), found, mine, noise[row], steps, value_level)

        return torch.cat(self._run(actions, list(zip(features.parts, features.features, strict=True))))

    def _run(self, work: Callable[[Any], Any], parts: Sequence[Any]) -> list[Any]:
        """``work`` on every part at once; a single one runs in the calling thread."""
        if len(parts) == 1:
            return [work(parts[0])]

        def inference(part: Any) -> Any:
            with torch.inference_mode():
                return work(part)

        with ThreadPoolExecutor(len(parts), "wav-worker") as pool:
            return list(pool.map(inference, parts))


def shares(count: int, threads: int) -> list[slice]:
    """``count`` things in at most ``threads`` consecutive shares, none empty, their sizes at most one apart."""
    threads = max(1, min(threads, count))
    return [slice(count * i // threads, count * (i + 1) // threads) for i in range(threads)]
