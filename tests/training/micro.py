"""A micro-batch of random windows and its draws."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn

from tests.training.conftest import settings
from wav.config import CouplingSettings
from wav.data.windows import WindowBatch
from wav.model import WAVTransformer, build_model
from wav.training.draws import SeededRandom, StepInputs
from wav.training.objectives import build_objective
from wav.training.objectives.base import Objective

SIZE, VIEWS, CHANNELS, TOKENS, CAPTION = 8, 2, 6, 5, 16
NONE = CouplingSettings()  # the paper's published form
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
    coupling: CouplingSettings = NONE,
    **changes: Any,
) -> StepInputs:
    """Draws of ``stage``; ``name`` is (step, rank, micro-batch)."""
    objective = objective_of(stage, small_model(has_value), coupling, **changes)
    random = SeededRandom(objective.settings.seed, *(name or (index, 0, 0)))
    return objective.draw(batch, Empty(), random, index)


@cache
def small_model(has_value: bool = True) -> WAVTransformer:
    """A model that is only asked what it has."""
    config = settings(model={"value_expert": has_value})
    return build_model(config.model, config.data, CHANNELS, CAPTION)


def objective_of(stage: str, model: WAVTransformer, coupling: CouplingSettings = NONE, **changes: Any) -> Objective:
    """The stage's objective around ``model``, some of its settings changed."""
    train = getattr(CONFIG, stage).model_copy(update=changes)
    return build_objective(train, model, CONFIG.data.memory_frames, CONFIG.data.action_dim, coupling)


def record_calls(model: WAVTransformer, name: str) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Arguments of every later call of a part of the model: video, value or action."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    part: nn.Module = getattr(model, name)
    part.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    return calls
