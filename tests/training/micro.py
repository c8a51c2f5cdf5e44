"""A micro-batch of random windows and its draws."""

from __future__ import annotations

from typing import Any

import torch

from tests.training.conftest import settings
from wav.data.windows import WindowBatch
from wav.training.draws import CLEAN, Compat, SeededRandom, StepInputs, draw

SIZE, VIEWS, CHANNELS, TOKENS, CAPTION = 8, 2, 6, 5, 16
CONFIG = settings(pretrain_video={"caption_dropout": 0.0})


class Empty:
    """The encoded empty instruction."""

    empty_text = torch.full((TOKENS, CAPTION), 7.0)
    empty_text_mask = torch.tensor([True] + [False] * (TOKENS - 1))


def random_batch() -> WindowBatch:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    return WindowBatch(
        memory=normal(SIZE, VIEWS, CHANNELS, 2, 2, 2),
        future=normal(SIZE, VIEWS, CHANNELS, 2, 2, 2),
        text=normal(SIZE, TOKENS, CAPTION),
        text_mask=torch.ones(SIZE, TOKENS, dtype=torch.bool),
        state=normal(SIZE, 8),
        actions=normal(SIZE, 4, 15),
        values=normal(SIZE, 4, 10),
        episode=torch.zeros(SIZE, dtype=torch.int64),
        step=torch.arange(SIZE),
    )


def inputs_of(
    batch: WindowBatch,
    stage: str,
    has_value: bool = True,
    index: int = 0,
    name: tuple[int, ...] | None = None,
    compat: Compat = CLEAN,
    **changes: Any,
) -> StepInputs:
    """Draws of ``stage``; ``name`` is (step, rank, micro-batch)."""
    train = getattr(CONFIG, stage).model_copy(update=changes)
    random = SeededRandom(train.seed, *(name or (index, 0, 0)))
    return draw(batch, train, Empty(), random, has_value=has_value, index=index, compat=compat)
