"""Micro-batches of a real workspace: a function of (seed, step, rank), and how they reach the training thread."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from tests.training.micro import CONFIG, small_model
from wav.data.windows import BatchSampler
from wav.training.draws import StepInputs
from wav.training.engine import World, plan_batch
from wav.training.inputs import Inputs, open_inputs
from wav.training.objectives import build_objective
from wav.training.objectives.base import Objective
from wav.training.prefetch import Prefetcher, Source, validation_inputs

CPU = torch.device("cpu")
RANKS = 2


@pytest.fixture
def inputs(spec_of: Any) -> tuple[Inputs, Any]:
    spec = spec_of()
    return open_inputs(spec), spec.train


def source(inputs: tuple[Inputs, Any], rank: int, ranks: int = RANKS, **changes: Any) -> Source:
    opened, settings = inputs
    settings = settings.model_copy(update={"micro_batch_size": 1, **changes})
    sampler = BatchSampler(len(opened.train), settings.batch_size, settings.seed, rank, ranks)
    world = World(rank, ranks, CPU)
    return Source(opened.train, sampler, around(settings), plan_batch(settings, ranks), world)


def around(settings: Any) -> Objective:
    sizes = (CONFIG.data.memory_frames, CONFIG.data.action_dim)
    return build_objective(settings, small_model(), *sizes)


def tensors(step: list[StepInputs]) -> list[torch.Tensor]:
    return [
        getattr(part, field.name)
        for micro in step
        for part in (micro.batch, micro.draws)
        for field in fields(part)
        if getattr(part, field.name) is not None
    ]


def equal(a: list[StepInputs], b: list[StepInputs]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b), strict=True))


def test_a_step_is_a_function_of_seed_step_and_rank(inputs: tuple[Inputs, Any]) -> None:
    first = source(inputs, 0)
    steps = [first.step(step) for step in (3, 4)]
    assert [len(step) for step in steps] == [2, 2]
    assert equal(steps[0], source(inputs, 0).step(3))
    others = [steps[1], source(inputs, 1).step(3), source(inputs, 0, seed=1).step(3)]
    for other in others:
        for name in ("memory_rate", "memory_noise", "video_noise", "video_level"):
            mine, theirs = (getattr(step[0].draws, name) for step in (steps[0], other))
            assert not torch.equal(mine, theirs), name


def test_ranks_share_one_global_batch(inputs: tuple[Inputs, Any]) -> None:
    """The windows of a step, and their memories, do not depend on the number of ranks."""

    def memories(ranks: int) -> torch.Tensor:
        return torch.cat([micro.batch.memory for rank in range(ranks) for micro in source(inputs, rank, ranks).step(1)])

    assert torch.equal(memories(1), memories(RANKS))


def test_the_batches_gives_every_step_once_in_order(inputs: tuple[Inputs, Any]) -> None:
    made = source(inputs, 0)
    batches = Prefetcher(made, 2, 6)
    steps = list(batches)
    assert len(steps) == 4
    assert all(equal(step, made.step(2 + i)) for i, step in enumerate(steps))


def test_an_error_while_preparing_reaches_the_training_thread(inputs: tuple[Inputs, Any]) -> None:
    broken = replace(source(inputs, 0), dataset=None)
    batches = Prefetcher(broken, 0, 3)
    with pytest.raises(AttributeError):
        next(iter(batches))


def test_validation_draws_repeat_and_drop_no_caption(inputs: tuple[Inputs, Any]) -> None:
    opened, settings = inputs
    assert opened.validation is not None
    quiet, always = (
        validation_inputs(
            opened.validation,
            around(settings.model_copy(update={"caption_dropout": dropout})),
            plan_batch(settings, 1),
            CPU,
        )
        for dropout in (0.0, 1.0)
    )
    assert quiet
    assert equal(quiet, always)
