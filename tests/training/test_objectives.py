"""The stages' losses: who trains, what a loss may depend on, roles, draws, caption dropout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.training.conftest import settings
from wav.data.windows import WindowBatch
from wav.flow_matching import join_frames
from wav.model import WAVTransformer, build_model
from wav.model.transformer import WAVOutput
from wav.training.objectives import (
    Draws,
    Roles,
    StageModule,
    StepInputs,
    draw,
    drop_captions,
    share,
    split_roles,
    trainable_names,
)

SIZE, VIEWS, CHANNELS, TOKENS, CAPTION = 8, 2, 6, 5, 16
CONFIG = settings(pretrain_video={"caption_dropout": 0.0})


class Empty:
    """The encoded empty instruction."""

    empty_text = torch.full((TOKENS, CAPTION), 7.0)
    empty_text_mask = torch.tensor([True] + [False] * (TOKENS - 1))


@pytest.fixture
def batch() -> WindowBatch:
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


def build(**changes: Any) -> WAVTransformer:
    config = settings(model=changes)
    model = build_model(config.model, config.data, CHANNELS, CAPTION)
    with torch.no_grad():  # no parameter may hide behind a zero
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return model


def inputs_of(batch: WindowBatch, stage: str, has_value: bool = True, index: int = 0, **changes: Any) -> StepInputs:
    train = getattr(CONFIG, stage).model_copy(update=changes)
    return draw(batch, train, Empty(), has_value=has_value, index=index, name=(index, 0, 0))


def loss_of(
    inputs: StepInputs, stage: str, model: WAVTransformer, **changes: Any
) -> tuple[torch.Tensor, dict[str, Any]]:
    module = StageModule(model, getattr(CONFIG, stage).model_copy(update=changes), 2, 7)
    return module(inputs)


def test_roles_hold_their_share_over_a_run() -> None:
    assert sum(share(i, 1, 0.7) for i in range(1000)) == 700
    assert sum(share(i, 32, 0.7) for i in range(100)) == 2240
    joint = CONFIG.train_joint.model_copy(update={"action_probability": 0.7})
    roles = [split_roles(joint, 4, i, True) for i in range(100)]
    assert all(r.action + r.value + r.video == 4 for r in roles)
    assert (sum(r.action for r in roles), sum(r.value for r in roles)) == (280, 60)
    assert split_roles(joint, 4, 0, False).value == 0
    assert split_roles(CONFIG.pretrain_video, 4, 0, True) == Roles(0, 0, 4)
    assert split_roles(CONFIG.train_value, 4, 0, True) == Roles(0, 4, 0)


def test_draws_are_a_pure_function_of_their_name(batch: WindowBatch) -> None:
    a, b, c = (inputs_of(batch, "train_joint", index=i).draws for i in (0, 0, 1))
    for name in vars(a):
        assert torch.equal(getattr(a, name), getattr(b, name))
    assert not torch.equal(a.future_noise, c.future_noise)
    assert a.memory_rate.shape == (SIZE,)
    assert a.memory_rate.max() <= CONFIG.train_joint.memory_noise
    levels = torch.cat([a.action_level.flatten(), a.value_level.flatten(), a.video_level])
    assert ((levels > 0) & (levels <= 1)).all()


def test_purposes_do_not_share_noise(batch: WindowBatch) -> None:
    draws = inputs_of(batch, "train_joint").draws
    flat = [getattr(draws, n).flatten()[:8] for n in ("memory_noise", "future_noise", "value_noise", "action_noise")]
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


@pytest.mark.parametrize(
    ("stage", "trains"),
    [
        ("pretrain_video", lambda name: not name.startswith(("value_", "action_"))),
        ("train_value", lambda name: name.startswith("value_")),
        ("train_joint", lambda name: True),
    ],
)
def test_who_gets_a_gradient(stage: str, trains: Callable[[str], bool], batch: WindowBatch) -> None:
    model = build()
    loss, _ = loss_of(inputs_of(batch, stage), stage, model)
    loss.backward()
    got = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert got == {name for name, _ in model.named_parameters() if trains(name)}
    assert got == trainable_names(model, getattr(CONFIG, stage))


def test_value_stage_never_sees_the_future(batch: WindowBatch) -> None:
    model = build()
    inputs = inputs_of(batch, "train_value")
    other = replace(inputs, batch=replace(batch, future=batch.future + 1, actions=batch.actions + 1))
    assert torch.equal(loss_of(inputs, "train_value", model)[0], loss_of(other, "train_value", model)[0])
    worse = replace(inputs, batch=replace(batch, memory=batch.memory + 1))
    assert not torch.equal(loss_of(inputs, "train_value", model)[0], loss_of(worse, "train_value", model)[0])


def test_action_loss_sees_neither_future_nor_values(batch: WindowBatch) -> None:
    model = build()
    inputs = inputs_of(batch, "train_joint")
    changed = replace(batch, future=batch.future + 1, values=batch.values + 1)
    first, second = (loss_of(i, "train_joint", model)[1] for i in (inputs, replace(inputs, batch=changed)))
    assert torch.equal(first["loss_action"], second["loss_action"])
    assert not torch.equal(first["loss_value"], second["loss_value"])
    assert not torch.equal(first["loss_video"], second["loss_video"])
    moved = replace(inputs, batch=replace(batch, state=batch.state + 1))
    assert not torch.equal(first["loss_action"], loss_of(moved, "train_joint", model)[1]["loss_action"])


def test_weights_of_the_joint_loss(batch: WindowBatch) -> None:
    model, inputs = build(), inputs_of(batch, "train_joint")
    total, parts = loss_of(inputs, "train_joint", model, weight_action=2.0, weight_value=3.0, weight_video=5.0)
    expected = 2 * parts["loss_action"] + 3 * parts["loss_value"] + 5 * parts["loss_video"]
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)


class Oracle(WAVTransformer):
    """Keeps what it was called with; predicts the true future velocity and garbage for memory frames."""

    def forward(self, latents: torch.Tensor, timestep: torch.Tensor, *args: Any, **kwargs: Any) -> WAVOutput:
        self.seen = (latents, timestep, args, kwargs)
        return WAVOutput(join_frames(torch.full_like(latents[:, :, :, :2], 9.0), self.answer), None, None)


def test_video_loss_counts_future_frames_alone(batch: WindowBatch) -> None:
    model, inputs = build(), inputs_of(batch, "pretrain_video")
    model.__class__ = Oracle
    model.answer = inputs.draws.future_noise - batch.future
    loss, _ = loss_of(inputs, "pretrain_video", model)
    assert loss.item() == 0
    model.answer = model.answer + 2
    loss, _ = loss_of(inputs, "pretrain_video", model)
    assert loss.item() == pytest.approx(4)


def test_what_the_video_expert_is_given(batch: WindowBatch) -> None:
    """Memory: (1 - r) z + r noise at t = 0. Future: the point at its level for video rows, else noise at t = 1000."""
    model = build()
    model.__class__ = Oracle
    model.answer = torch.zeros_like(batch.future)
    for stage in ("pretrain_video", "train_joint"):
        inputs = inputs_of(batch, stage, action_probability=0.0, memory_noise=0.5)
        draws, video = inputs.draws, inputs.roles.video
        module = StageModule(model, getattr(CONFIG, stage), 2, 7)
        latents, timestep = module._latents(inputs)
        rate = draws.memory_rate.view(-1, 1, 1, 1, 1, 1)
        memory = (1 - rate) * batch.memory + rate * draws.memory_noise
        assert torch.allclose(latents[:, :, :, :2], memory, atol=1e-6)
        assert (timestep[:, :2] == 0).all()
        level = draws.video_level.view(-1, 1, 1, 1, 1, 1)
        clean, noise = batch.future[SIZE - video :], draws.future_noise[SIZE - video :]
        assert torch.allclose(latents[SIZE - video :, :, :, 2:], (1 - level) * clean + level * noise, atol=1e-6)
        assert torch.allclose(timestep[SIZE - video :, 2], draws.video_level * 1000)
        assert torch.equal(latents[: SIZE - video, :, :, 2:], draws.future_noise[: SIZE - video])
        assert (timestep[: SIZE - video, 2:] == 1000).all()


def test_joint_value_loss_equals_the_value_stage(batch: WindowBatch) -> None:
    """The joint stage's value rows compute what the value stage does (draws side by side instead of along an axis)."""
    model = build()
    joint = inputs_of(batch, "train_joint", action_probability=0.0)
    rows = joint.roles.value
    part = batch.rows(0, rows)
    draws = Draws(
        **{
            **vars(joint.draws),
            "memory_rate": joint.draws.memory_rate[:rows],
            "memory_noise": joint.draws.memory_noise[:rows],
            "future_noise": joint.draws.future_noise[:rows],
            "video_level": torch.zeros(0),
        }
    )
    alone, _ = loss_of(StepInputs(part, draws, Roles(0, rows, 0)), "train_value", model)
    _, parts = loss_of(joint, "train_joint", model, action_probability=0.0)
    assert parts["loss_value"].item() == pytest.approx(alone.item(), rel=1e-5)


@pytest.mark.parametrize("probability", [0.0, 0.5, 1.0])
def test_joint_without_value_expert(probability: float, batch: WindowBatch) -> None:
    model = build(value_expert=False)
    inputs = inputs_of(replace(batch, values=None), "train_joint", has_value=False, action_probability=probability)
    loss, parts = loss_of(inputs, "train_joint", model, action_probability=probability)
    assert torch.isfinite(loss)
    assert set(parts) == {0.0: {"loss_video"}, 1.0: {"loss_action"}}.get(probability, {"loss_action", "loss_video"})
