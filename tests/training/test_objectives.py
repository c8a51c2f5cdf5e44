"""The stages' losses: who trains, what the model is given, what a loss may depend on and how it is counted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from tests.training.conftest import settings
from tests.training.micro import CAPTION, CHANNELS, SIZE, inputs_of, objective_of, random_batch, record_calls
from wav.data.windows import WindowBatch
from wav.model import WAVTransformer, build_model
from wav.model.video import VideoOutput
from wav.training.draws import Draws, Roles, StepInputs


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
    inputs: StepInputs, stage: str, model: WAVTransformer, **changes: Any
) -> tuple[torch.Tensor, dict[str, Any]]:
    return objective_of(stage, model, **changes)(inputs)


@pytest.mark.parametrize(
    ("stage", "trains"),
    [
        ("pretrain_video", lambda name: name.startswith("video.")),
        ("train_value", lambda name: name.startswith("value.")),
        ("train_joint", lambda name: True),
    ],
)
def test_who_gets_a_gradient(stage: str, trains: Callable[[str], bool], batch: WindowBatch) -> None:
    model = build()
    loss, _ = loss_of(inputs_of(batch, stage), stage, model)
    loss.backward()
    got = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert got == {name for name, _ in model.named_parameters() if trains(name)}


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


class Oracle(nn.Module):
    """A video expert that predicts ``answer``, the velocity of the future frames."""

    def __init__(self, answer: torch.Tensor) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, *args: Any, first_frame: int) -> VideoOutput:
        assert first_frame == 2
        return VideoOutput(self.answer, ())


def test_video_loss_counts_future_frames_alone(batch: WindowBatch) -> None:
    inputs = inputs_of(batch, "pretrain_video")
    answer = inputs.draws.video_noise - batch.future
    for error in (0, 2):
        model = build()
        model.video = Oracle(answer + error)  # type: ignore[assignment]
        loss, _ = loss_of(inputs, "pretrain_video", model)
        assert loss.item() == pytest.approx(error**2)


def test_what_the_video_expert_is_given(batch: WindowBatch) -> None:
    """Memory: (1 - r) z + r noise at t = 0. Future: the point at its level for video rows, else noise at t = 1000."""
    for stage in ("pretrain_video", "train_joint"):
        model = build()
        calls = record_calls(model, "video")
        inputs = inputs_of(batch, stage, action_probability=0.0, memory_noise=0.5)
        loss_of(inputs, stage, model)
        ((latents, timestep, *_), _) = calls[-1]
        draws, video = inputs.draws, inputs.roles.video
        rate = draws.memory_rate.view(-1, 1, 1, 1, 1, 1)
        memory = (1 - rate) * batch.memory + rate * draws.memory_noise
        assert torch.allclose(latents[:, :, :, :2], memory, atol=1e-6)
        assert (timestep[:, :2] == 0).all()
        level = draws.video_level.view(-1, 1, 1, 1, 1, 1)
        noised = (1 - level) * batch.future + level * draws.video_noise
        assert torch.allclose(latents[:, :, :, 2:], noised, atol=1e-6)
        assert torch.allclose(timestep[:, 2], draws.video_level * 1000)
        assert torch.equal(latents[: SIZE - video, :, :, 2:], draws.video_noise[: SIZE - video])
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
            "video_noise": joint.draws.video_noise[:rows],
            "video_level": torch.ones(rows),
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
    model, inputs = build(), inputs_of(batch, "train_joint")
    values, actions = record_calls(model, "value"), record_calls(model, "action")
    loss_of(inputs, "train_joint", model)
    draws, rows = inputs.draws, inputs.roles.action
    ((tokens, timestep, _), _), ((noised, told, _), _) = values
    assert torch.equal(tokens, draws.condition_noise)
    assert (timestep == 1000).all()
    assert torch.allclose(noised, at_level(batch.values[rows : rows + inputs.roles.value], draws, "value"), atol=1e-6)
    assert torch.allclose(told, draws.value_level * 1000)
    (((tokens, timestep, _, features, history), _),) = actions
    assert torch.allclose(tokens, at_level(batch.actions[:rows], draws, "action"), atol=1e-6)
    assert torch.allclose(timestep, draws.action_level * 1000)
    assert features[0].shape[:2] == (rows, 4)
    assert torch.equal(history[:, 0, 7:], batch.state[:rows])
    assert (history[:, 0, :7] == 0).all()

    inputs = inputs_of(batch, "train_value")
    loss_of(inputs, "train_value", model)
    (tokens, timestep, _), _ = values[-1]
    assert torch.allclose(tokens, at_level(batch.values, inputs.draws, "value"), atol=1e-6)
    assert torch.allclose(timestep, inputs.draws.value_level * 1000)


def at_level(clean: torch.Tensor, draws: Draws, name: str) -> torch.Tensor:
    """(n, R, A, C): every draw of an expert's tokens at its level."""
    level = getattr(draws, f"{name}_level")[..., None, None]
    return (1 - level) * clean[:, None] + level * getattr(draws, f"{name}_noise")


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
    assert norms["video.proj_out.weight"] == norms["value.proj_out.weight"] == 0
    assert norms["action.proj_out.weight"] > 0
    assert norms["value.blocks.0.attn1.to_q.weight"] > 0
