"""CUDA graphs: a call recorded once is launched again as a whole, on other numbers in the same memory."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import fields, is_dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of all captures in a pool: memory that one graph used serves another on the same stream alone."""
    return torch.cuda.Stream(device)


def capture(
    call: Callable[[], Any], device: torch.device, pool: torch.cuda.MemPool, tight: bool = False
) -> tuple[Callable[[], None], Any]:
    """Record a call: what launches it again, and its result, whose memory every launch writes.

    ``tight``: the first, unrecorded call takes its memory from the pool too, and so does not need as much again beside
    it. Only for calls that leave nothing behind, such as a table in a cache: a graph of the pool would overwrite it.
    """
    with torch.cuda.device(device):
        stream = _stream(device) if tight else torch.cuda.Stream()
        if tight:
            torch.cuda.empty_cache()  # what the allocator keeps for others it does not give up for a pool, short or not
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), torch.cuda.use_mem_pool(pool) if tight else nullcontext():
            call()  # compiles, and fills caches from the CPU: neither can be recorded
        torch.cuda.current_stream().wait_stream(stream)
        graph, handle = torch.cuda.CUDAGraph(), cast(Any, pool.id)
        # other threads may prepare the next numbers meanwhile
        with torch.cuda.graph(graph, pool=handle, stream=stream, capture_error_mode="thread_local"):
            result = call()
    return graph.replay, result


def leaves(x: Any) -> Iterator[Tensor | None]:
    """Tensors, and what stands for one that is left out, of nested tuples, lists and dataclasses."""
    if x is None or isinstance(x, Tensor):
        yield x
    else:
        for part in x if isinstance(x, tuple | list) else (getattr(x, field.name) for field in fields(x)):
            yield from leaves(part)


def mapped(x: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """``x`` with every tensor changed."""
    if isinstance(x, Tensor):
        return change(x)
    if isinstance(x, tuple | list):
        return type(x)(mapped(part, change) for part in x)
    if is_dataclass(x) and not isinstance(x, type):
        return replace(x, **{field.name: mapped(getattr(x, field.name), change) for field in fields(x)})
    return x
