"""What makes a training step fast, as counts, and that it computes what the baseline does."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.micro import (
    CAPTION,
    CHANNELS,
    CONFIG,
    SIZE,
    VIEWS,
    inputs_of,
    objective_of,
    random_batch,
    record_calls,
)
from wav.config import ModelSettings
from wav.model import build_model
from wav.training.objectives.base import Objective

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from baseline.training import baseline, diffusers_operations
from counting import Counted

STAGES = ["pretrain_video", "train_value", "train_joint"]
# Widths that no two kinds of product share.
MODEL = ModelSettings(
    layers=4, heads=2, head_dim=20, value_heads=2, value_head_dim=6, action_heads=2, action_head_dim=8
)
D, VALUE = 40, 12
TOKENS = VIEWS * 4 * 2 * 2  # of random_batch: two memory and two future frames of 2 x 2 cells


def make(stage: str, kind: str = "ours") -> Objective:
    model = build_model(MODEL, CONFIG.data, CHANNELS, CAPTION)
    with torch.no_grad():  # no parameter may hide behind a zero
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    if kind == "baseline":
        baseline(model)
    return objective_of(stage, model.train())


def gradients(objective: Objective, inputs: Any) -> tuple[float, dict[str, torch.Tensor]]:
    loss, _ = objective(inputs)
    loss.backward()
    found = {n: p.grad for n, p in objective.named_parameters() if p.grad is not None}
    return float(loss.detach()), found


@pytest.mark.parametrize(
    ("stage", "changes"), [*((stage, {}) for stage in STAGES), ("train_joint", {"value_draws": 1, "action_draws": 1})]
)
def test_same_losses_and_gradients_as_the_baseline(stage: str, changes: dict[str, int]) -> None:
    batch = random_batch()
    mask = batch.text_mask.clone()
    mask[::2, 3:] = False
    inputs = inputs_of(replace(batch, text_mask=mask), stage, **changes)
    loss, found = gradients(make(stage), inputs)
    with diffusers_operations():
        wanted_loss, wanted = gradients(make(stage, "baseline"), inputs)
    assert loss == pytest.approx(wanted_loss, rel=1e-5)
    head = {
        f"model.video.{name}" for name in ("scale_shift_table", "proj_out.weight", "proj_out.bias")
    }  # always computed there
    assert found.keys() - head == wanted.keys() - head
    for name, gradient in found.items():
        scale = float(wanted[name].abs().max())
        torch.testing.assert_close(gradient, wanted[name], atol=1e-4 * scale + 1e-8, rtol=0, msg=name)


def test_with_one_draw_all_value_tokens_go_through_their_expert_at_once() -> None:
    module = make("train_joint")
    calls = record_calls(module.model, "value")
    inputs = inputs_of(random_batch(), "train_joint", value_draws=1)
    module(inputs)
    assert inputs.roles.value
    (((tokens, *_), _),) = calls
    assert len(tokens) == inputs.roles.action + inputs.roles.value


def test_the_value_stage_keeps_nothing_of_the_video_pass() -> None:
    """No tensor of the video blocks' inside is kept for a backward pass; only the features, which K and V read."""
    kept: list[torch.Size] = []
    module = make("train_value")
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        module(inputs_of(random_batch(), "train_value"))
    assert not any(shape[-1:] == (4 * D,) for shape in kept)
    wide = [shape for shape in kept if shape[-1:] == (D,) and shape.numel() >= SIZE * TOKENS * D]
    assert len(wide) <= 2 * MODEL.layers  # each layer's features, once for keys and once for values
    assert not any(p.requires_grad for n, p in module.model.named_parameters() if not n.startswith("value."))


def counted(objective: Objective, inputs: Any) -> Counted:
    with Counted() as counts:
        objective(inputs)
    return counts


def test_counts_of_the_value_stage() -> None:
    inputs = inputs_of(random_batch(), "train_value")
    ours, theirs = (
        counted(make("train_value"), inputs).products,
        counted(make("train_value", "baseline"), inputs).products,
    )
    draws = inputs.draws.value_level.shape[1]
    assert draws > 1
    # Keys and values of the video features: once per sample and layer, whatever the number of draws.
    assert ours[D, VALUE] == 2 * MODEL.layers * SIZE * TOKENS
    assert theirs[D, VALUE] == draws * ours[D, VALUE]
    # One AdaLN row per sample and frame (and per view, for the view's own part), not per token.
    assert ours[D, 6 * D] == SIZE * 4 + VIEWS
    assert theirs[D, 6 * D] == SIZE * TOKENS + VIEWS
    # The head is for video alone.
    assert ours[D, CHANNELS] == 0
    assert theirs[D, CHANNELS] == SIZE * TOKENS


def test_counts_of_the_joint_stage() -> None:
    inputs = inputs_of(random_batch(), "train_joint")
    roles, draws = inputs.roles, inputs.draws.value_level.shape[1]
    assert roles.value
    assert draws > 1
    ours, theirs = (
        counted(make("train_joint"), inputs).products,
        counted(make("train_joint", "baseline"), inputs).products,
    )
    assert ours[D, VALUE] == 2 * MODEL.layers * (roles.action + roles.value) * TOKENS
    assert theirs[D, VALUE] == 2 * MODEL.layers * (roles.action + roles.value * draws) * TOKENS
    # One AdaLN row per sample and frame (and per view, for the view's own part), not per token.
    assert ours[D, 6 * D] == SIZE * 4 + VIEWS
    assert theirs[D, 6 * D] == SIZE * TOKENS + VIEWS


def test_the_last_block_computes_what_the_video_loss_reads() -> None:
    """Memory frames are only keys and values there, and have no velocity; the baseline computes all."""
    inputs = inputs_of(random_batch(), "pretrain_video")
    ours, theirs = (counted(make("pretrain_video", kind), inputs).products for kind in ("ours", "baseline"))
    future = TOKENS // 2
    assert ours[D, 4 * D] == SIZE * ((MODEL.layers - 1) * TOKENS + future)
    assert theirs[D, 4 * D] == SIZE * MODEL.layers * TOKENS
    assert ours[D, CHANNELS] == SIZE * future


def test_layers_that_are_not_recomputed_keep_their_activations_and_no_number_changes() -> None:
    def step(layers: int) -> tuple[int, list[torch.Tensor]]:
        module, sizes = make("pretrain_video"), []
        module.model.enable_gradient_checkpointing()
        module.model.recompute(layers)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            loss, _ = module(inputs_of(random_batch(), "pretrain_video"))
        loss.backward()
        return sum(sizes), [p.grad for p in module.model.parameters() if p.grad is not None]

    (most, first), (some, second), (least, third) = (step(layers) for layers in (0, 2, MODEL.layers))
    assert most > some > least
    for other in (second, third):
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
