"""Roles and random numbers of a micro-batch: shares, names, ranks, caption dropout, the reference's departures."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from tests.training.micro import CONFIG, SIZE, Empty, inputs_of, objective_of, random_batch, small_model
from wav.data.windows import WindowBatch
from wav.training.draws import Draws, Roles, drop_captions, share


@pytest.fixture
def batch() -> WindowBatch:
    return random_batch()


def test_roles_hold_their_share_over_a_run() -> None:
    assert sum(share(i, 1, 0.7) for i in range(1000)) == 700
    assert sum(share(i, 32, 0.7) for i in range(100)) == 2240
    joint = objective_of("train_joint", small_model(), action_probability=0.7)
    roles = [joint.roles(4, i) for i in range(100)]
    assert all(r.action + r.value + r.video == 4 for r in roles)
    assert (sum(r.action for r in roles), sum(r.value for r in roles)) == (280, 60)
    assert objective_of("train_joint", small_model(has_value=False)).roles(4, 0).value == 0
    assert objective_of("pretrain_video", small_model()).roles(4, 0) == Roles(0, 0, 4)
    assert objective_of("train_value", small_model()).roles(4, 0) == Roles(0, 4, 0)


def test_draws_are_a_pure_function_of_their_name(batch: WindowBatch) -> None:
    a, b, c = (inputs_of(batch, "train_joint", index=i).draws for i in (0, 0, 1))
    for name in vars(a):
        assert torch.equal(getattr(a, name), getattr(b, name))
    assert not torch.equal(a.video_noise, c.video_noise)
    assert a.memory_rate.shape == (SIZE,)
    assert a.memory_rate.max() <= CONFIG.train_joint.memory_noise
    levels = torch.cat([a.action_level.flatten(), a.value_level.flatten(), a.video_level, a.condition_level])
    assert ((levels > 0) & (levels <= 1)).all()


def test_purposes_do_not_share_noise(batch: WindowBatch) -> None:
    draws = inputs_of(batch, "train_joint").draws
    flat = [getattr(draws, n).flatten()[:8] for n in ("memory_noise", "video_noise", "value_noise", "action_noise")]
    assert all(not torch.equal(a, b) for i, a in enumerate(flat) for b in flat[:i])


def test_caption_dropout_replaces_embedding_and_mask(batch: WindowBatch) -> None:
    drop = torch.tensor([True] + [False] * (SIZE - 1))
    after = drop_captions(batch, drop, Empty())
    assert torch.equal(after.text[0], Empty.empty_text)
    assert torch.equal(after.text_mask[0], Empty.empty_text_mask)
    assert torch.equal(after.text[1:], batch.text[1:])
    assert torch.equal(after.text_mask[1:], batch.text_mask[1:])
    shares = [
        (inputs_of(batch, "pretrain_video", index=i, caption_dropout=0.25).batch.text_mask.sum(1) == 1).float().mean()
        for i in range(100)
    ]
    assert torch.stack(shares).mean() == pytest.approx(0.25, abs=0.05)


def test_ranks_and_micro_batches_draw_their_own_numbers(batch: WindowBatch) -> None:
    """Every tensor differs between steps, ranks and micro-batches, and each is reproducible."""
    names = [(5, 0, 0), (5, 1, 0), (5, 0, 1), (6, 0, 0)]
    first, again = ([inputs_of(batch, "train_joint", name=name).draws for name in names] for _ in range(2))
    for field in fields(Draws):
        tensors = [getattr(draws, field.name) for draws in first]
        assert tensors[0].numel() > 0, field.name
        assert all(torch.equal(a, getattr(b, field.name)) for a, b in zip(tensors, again, strict=True))
        if field.name != "condition_level":
            assert all(not torch.equal(a, b) for i, a in enumerate(tensors) for b in tensors[:i]), field.name


def test_ranks_drop_their_own_captions(batch: WindowBatch) -> None:
    masks = [
        inputs_of(batch, "pretrain_video", name=(0, rank, 0), caption_dropout=0.5).batch.text_mask for rank in range(4)
    ]
    assert any(not torch.equal(masks[0], mask) for mask in masks[1:])


@pytest.mark.parametrize("stage", ["pretrain_video", "train_value", "train_joint"])
def test_what_is_read_and_not_trained_is_pure_noise(stage: str, batch: WindowBatch) -> None:
    inputs = inputs_of(batch, stage)
    draws, roles = inputs.draws, inputs.roles
    assert torch.equal(draws.video_level[: SIZE - roles.video], torch.ones(SIZE - roles.video))
    assert torch.equal(draws.condition_level, torch.ones(roles.action))
