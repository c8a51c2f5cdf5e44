"""The stages' losses: who trains, what the model is given, what a loss may depend on and how it is counted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.training.conftest import settings
from tests.training.micro import CAPTION, CHANNELS, CONFIG, SIZE, inputs_of, random_batch
from wav.data.windows import WindowBatch
from wav.flow_matching import join_frames
from wav.model import WAVTransformer, build_model
from wav.model.transformer import WAVOutput
from wav.training.draws import CLEAN, Compat, Draws, Roles, StepInputs
from wav.training.objectives import StageModule, trainable_names


@pytest.fixture
def batch() -> WindowBatch:
    return random_batch()


def build(**changes: Any) -> WAVTransformer:
    config = settings(model=changes)
    model = build_model(config.model, config.data, CHANNELS, CAPTION)
    with torch.no_grad():  # no parameter may hide behind a zero
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return model


def loss_of(
    inputs: StepInputs, stage: str, model: WAVTransformer, compat: Compat = CLEAN, **changes: Any
) -> tuple[torch.Tensor, dict[str, Any]]:
    module = StageModule(model, getattr(CONFIG, stage).model_copy(update=changes), 2, 7, compat)
    return module(inputs)


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
            "video_label": torch.ones(rows),
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


def test_what_the_experts_are_given(batch: WindowBatch) -> None:
    """Value noise that the action reads is pure and labelled 1000, as at inference; labels are mixed at their level."""
    model, inputs, called = build(), inputs_of(batch, "train_joint"), {}
    model.register_forward_pre_hook(lambda _, args, kwargs: called.update(kwargs), with_kwargs=True)
    loss_of(inputs, "train_joint", model)
    draws, rows = inputs.draws, inputs.roles.action
    assert torch.equal(called["value_tokens"][:rows], draws.condition_noise)
    assert (called["value_timestep"][:rows] == 1000).all()
    assert torch.allclose(called["value_timestep"][rows:], draws.value_level.flatten() * 1000)
    assert torch.allclose(called["action_timestep"], draws.action_level * 1000)
    level = draws.action_level[..., None, None]
    noised = (1 - level) * batch.actions[:rows, None] + level * draws.action_noise
    assert torch.allclose(called["action_tokens"], noised, atol=1e-6)
    assert torch.equal(called["history"][:, 0, 7:], batch.state[:rows])
    assert (called["history"][:, 0, :7] == 0).all()

    value = inputs_of(batch, "train_value")
    loss_of(value, "train_value", model)
    level = value.draws.value_level[..., None, None]
    noised = (1 - level) * batch.values[:, None] + level * value.draws.value_noise
    assert torch.allclose(called["value_tokens"], noised, atol=1e-6)
    assert torch.allclose(called["value_timestep"], value.draws.value_level * 1000)


@pytest.mark.parametrize("stage", ["pretrain_video", "train_value", "train_joint"])
def test_gradient_checkpointing_changes_no_number(stage: str, batch: WindowBatch) -> None:
    inputs, results = inputs_of(batch, stage), []
    for checkpointing in (False, True):
        model = build()
        if checkpointing:
            model.enable_gradient_checkpointing()
        loss, _ = loss_of(inputs, stage, model.train())
        loss.backward()
        results.append((loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (plain, gradients), (again, recomputed) = results
    assert torch.equal(plain, again)
    assert gradients.keys() == recomputed.keys()
    assert all(torch.equal(gradients[name], recomputed[name]) for name in gradients)


def test_a_weight_of_zero_trains_nothing_through_its_loss(batch: WindowBatch) -> None:
    model, inputs = build(), inputs_of(batch, "train_joint")
    loss, parts = loss_of(inputs, "train_joint", model, weight_value=0.0, weight_video=0.0)
    loss.backward()
    assert loss.item() == pytest.approx(parts["loss_action"].item())
    norms = {name: p.grad.norm().item() for name, p in model.named_parameters() if p.grad is not None}
    assert norms["proj_out.weight"] == norms["value_proj_out.weight"] == 0
    assert norms["action_proj_out.weight"] > 0
    assert norms["value_blocks.0.attn1.to_q.weight"] > 0


def test_departures_of_the_loss(batch: WindowBatch) -> None:
    """The reference divides the future's error by the count of all frames and cuts timesteps to integers."""
    model, inputs = build(), inputs_of(batch, "pretrain_video")
    model.__class__ = Oracle
    model.answer = inputs.draws.future_noise - batch.future + 2
    loss, _ = loss_of(inputs, "pretrain_video", model, Compat(diluted_video_loss=True))
    assert loss.item() == pytest.approx(4 * 2 / 4)  # two of four frames
    loss_of(inputs, "pretrain_video", model.to(torch.bfloat16), Compat(integer_timesteps=True))
    rounded = (inputs.draws.video_level.bfloat16() * 1000).long()
    assert torch.equal(model.seen[1][:, -1].long(), rounded)
    assert (rounded - inputs.draws.video_level * 1000).abs().max() > 0.5
