"""Exponential moving average of the weights, in float32, sharded over the ranks like the optimiser's state.

Each rank keeps one flat slice of every trained parameter: of the whole parameter under ZeRO 0-2, its own partition
under ZeRO-3 (both are ``ceil(numel / ranks)`` long, so the two look the same here).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from wav.errors import CheckpointError

CHUNK = 1 << 26  #: elements whose float32 copies lie in memory at a time


class Ema:
    """Average ``e <- d e + (1 - d) w`` of the parameters that require a gradient."""

    def __init__(self, module: nn.Module, decay: float, rank: int, ranks: int) -> None:
        self.decay, self.rank, self.ranks = decay, rank, ranks
        self._parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self.parameters = list(self._parameters.values())  #: in the module's order, which takes long to walk
        self._shapes = {n: getattr(p, "ds_shape", p.shape) for n, p in self._parameters.items()}
        self._shards = {n: self._slice(p).float().clone() for n, p in self._parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after ``step`` (counted from 1); young averages follow faster: d = (1+step)/(10+step)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for averages, current in self._chunks():
            if current[0].dtype != torch.float32:
                wide = [torch.empty_like(average) for average in averages]
                torch._foreach_copy_(wide, current)  # one launch for many, unlike float() of each
                current = wide
            torch._foreach_lerp_(averages, current, 1 - decay)

    def state_dict(self) -> dict[str, Tensor]:
        """This rank's slices."""
        return dict(self._shards)

    def load(self, states: list[dict[str, Tensor]]) -> None:
        """Restore from the slices of all ranks of a run, in their order; this one may have another number of ranks.

        CheckpointError: they are of other parameters.
        """
        for name, shard in self._shards.items():
            numel = self._shapes[name].numel()
            slices = [state.get(name, shard[:0]) for state in states]
            if any(state.keys() != self._shards.keys() for state in states) or sum(map(torch.numel, slices)) < numel:
                raise CheckpointError(
                    "the checkpoint's average is of other parameters; delete the checkpoint to start anew"
                )
            part = torch.cat(slices)[:numel][self.rank * shard.numel() : (self.rank + 1) * shard.numel()]
            shard.zero_()
            shard[: part.numel()].copy_(part)

    def names(self) -> set[str]:
        """Names of the averaged parameters."""
        return set(self._shards)

    def full(self, name: str) -> Tensor:
        """The whole averaged parameter (a collective: every rank must ask for the same name)."""
        return self._gather(self._shards[name], self._shapes[name])

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Inside the block the module holds the averaged weights (for validation)."""
        with torch.no_grad():
            kept = {n: [t.clone() for t in self._places(p)] for n, p in self._parameters.items()}
            for name, parameter in self._parameters.items():
                for place in self._places(parameter):
                    whole = place.shape == self._shapes[name]
                    place.copy_(self.full(name) if whole else self._shards[name])
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in self._parameters.items():
                    for place, old in zip(self._places(parameter), kept[name], strict=True):
                        place.copy_(old)

    def _places(self, parameter: nn.Parameter) -> list[Tensor]:
        """Where a parameter's values are: its data, or its partition and, while it is gathered, its data (ZeRO-3)."""
        if not hasattr(parameter, "ds_tensor"):
            return [parameter.data]
        partition: Tensor = parameter.ds_tensor
        gathered = parameter.data.shape == getattr(parameter, "ds_shape", None)
        return [partition, parameter.data] if gathered else [partition]

    def _chunks(self) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        """This rank's slices of the average and of the weights, of one dtype and some :data:`CHUNK` elements a time."""
        averages: list[Tensor] = []
        current: list[Tensor] = []
        elements = 0
        for average, parameter in zip(self._shards.values(), self._parameters.values(), strict=True):
            shard = self._slice(parameter)
            if current and (shard.dtype != current[0].dtype or elements >= CHUNK):
                yield averages, current
                averages, current, elements = [], [], 0
            averages.append(average)
            current.append(shard)
            elements += average.numel()
        if current:
            yield averages, current

    def _slice(self, parameter: nn.Parameter) -> Tensor:
        """This rank's slice of a parameter as it is now (a view where nothing needs padding)."""
        flat: Tensor = getattr(parameter, "ds_tensor", parameter).detach().view(-1)
        if self.ranks == 1 or hasattr(parameter, "ds_tensor"):
            return flat
        length = -(-flat.numel() // self.ranks)
        part = flat[self.rank * length : (self.rank + 1) * length]
        return nn.functional.pad(part, (0, length - part.numel()))

    def _gather(self, shard: Tensor, shape: torch.Size) -> Tensor:
        if self.ranks == 1:
            return shard[: shape.numel()].view(shape)
        whole = [torch.empty_like(shard) for _ in range(self.ranks)]
        dist.all_gather(whole, shard)
        return torch.cat(whole)[: shape.numel()].view(shape)
