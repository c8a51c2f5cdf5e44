"""Which rows of the video features the experts read, and the gradients of rows that both of them read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Rows = Tensor | slice | None


class _FirstRows(torch.autograd.Function):
    """The first ``fewer`` and the first ``more`` rows; their gradients meet in one pass, not in two padded copies."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, fewer: int, more: int) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.shape, ctx.fewer, ctx.more = x.shape, fewer, more
        return x[:fewer], x[:more]

    @staticmethod
    def backward(ctx: Any, one: Tensor | None, other: Tensor | None) -> tuple[Tensor | None, None, None]:
        given = one if other is None else other
        if given is None:
            return None, None, None
        grad, fewer, more = given.new_empty(ctx.shape), ctx.fewer, ctx.more
        if one is not None and other is not None:
            torch.add(one, other[:fewer], out=grad[:fewer])
            grad[fewer:more] = other[fewer:]
        else:
            grad[: len(given)] = given
            more = len(given)
        grad[more:].zero_()
        return grad, None, None


def select(features: Sequence[Tensor], rows: Rows) -> Sequence[Tensor]:
    """Rows of every layer; None: all."""
    return features if rows is None else [f[rows] for f in features]


def divide(
    features: Sequence[Tensor], rows: Rows, sources: int | None, action_rows: Rows
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """What the value expert reads, ``rows`` or the first ``sources``, and what the action expert reads."""
    if sources is None:
        return select(features, rows), select(features, action_rows)
    first = action_rows.stop if isinstance(action_rows, slice) else None
    if first is None or action_rows != slice(0, first) or not 0 <= first <= sources:
        return select(features, slice(0, sources)), select(features, action_rows)
    pairs = [_FirstRows.apply(f, first, sources) for f in features]
    return [pair[1] for pair in pairs], [pair[0] for pair in pairs]
