"""What ``wav summary`` counts: the paper's sizes, the reference's search, growth with layers, memory under ZeRO."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from wav.accounting import (
    _step,
    memory_per_gpu,
    parameter_split,
    plan_cost,
    reference_search,
    trained_parameters,
    training_cost,
)
from wav.config import PlannerSettings, Settings, load_settings
from wav.model.build import build_from_settings, value_channels
from wav.model.video import VideoBlock
from wav.planning.types import Levels
from wav.training.activations import SAVED_PER_TOKEN, Sizes

PRESETS = Path(__file__).resolve().parents[1] / "presets"
SMALL = Settings.model_validate(
    {
        "data": {"views": ["agentview", "wrist"], "memory_frames": 3, "action_chunk": 7, "text_tokens": 9},
        "model": {"layers": 7, "heads": 2, "head_dim": 16, "value_heads": 2, "action_heads": 2},
        "encode": {"channels": 6, "text_dim": 24},
        "eval_libero": {"execute_steps": 2},
        "train_joint": {"action_probability": 0.6, "action_draws": 2, "value_draws": 3},
    }
)
SIZES = Sizes.of(SMALL)
FEW = replace(SIZES, layers=2)


@pytest.mark.integration
@pytest.mark.parametrize("stage", ["pretrain_video", "train_joint"])
def test_few_layers_tell_what_many_cost(stage: str) -> None:
    train = getattr(SMALL, stage).model_copy(update={"gradient_checkpointing": "off"})
    cost = training_cost(SIZES, train)
    assert (cost.forward, cost.backward) == pytest.approx(_step(SIZES, train, checkpointing=False), rel=1e-6)
    assert cost.recomputed == 0


def test_gradient_checkpointing_repeats_the_blocks() -> None:
    plain, again = (
        training_cost(FEW, SMALL.train_value.model_copy(update={"gradient_checkpointing": on})) for on in ("off", "on")
    )
    assert (again.forward, again.backward) == (plain.forward, plain.backward)
    assert 0 < again.recomputed < again.forward / 2  # the video expert is frozen: the value expert's blocks alone


def test_a_step_by_hand() -> None:
    """The video stage: products with weights cost twice as much backwards, which is two thirds of a step."""
    cost = training_cost(SIZES, SMALL.pretrain_video.model_copy(update={"gradient_checkpointing": "off"}))
    tokens, width = SIZES.tokens, SIZES.width
    weights = SIZES.layers * 2 * tokens * 14 * width**2
    assert 0.8 * weights < cost.forward < 1.6 * weights
    assert cost.backward == pytest.approx(2 * cost.forward, rel=0.02)


def test_a_model_without_value_expert_only_acts() -> None:
    sizes = replace(FEW, value_width=0)
    assert training_cost(sizes, SMALL.train_value).total == 0
    assert 0 < training_cost(sizes, SMALL.train_joint).total < training_cost(FEW, SMALL.train_joint).total
    plan = plan_cost(sizes, SMALL.planner)
    assert plan.search == 0
    assert plan.act > 0


@pytest.mark.integration
def test_a_plan_grows_with_its_search() -> None:
    planner = SMALL.planner.model_copy(update={"iterations": 1, "score_steps": 0})
    one, none = plan_cost(FEW, planner), plan_cost(FEW, planner.model_copy(update={"iterations": 0}))
    assert none.search == 0
    assert none.act == one.act
    assert plan_cost(FEW, planner.model_copy(update={"iterations": 3})).search == 3 * one.search
    assert plan_cost(FEW, planner.model_copy(update={"score_steps": 2})).search < one.search


@pytest.mark.integration
def test_every_level_of_the_video_is_a_pass() -> None:
    """Features of pure noise take one; each further level one with the head, and values that are read their steps."""
    planner = SMALL.planner.model_copy(update={"iterations": 1})
    one, two, three = (plan_cost(FEW, planner, Levels(tuple(1 - i / 4 for i in range(n)))) for n in (1, 2, 3))
    assert one == plan_cost(FEW, planner)
    assert three.search - two.search == pytest.approx(two.search - one.search)
    assert two.search > one.search
    assert two.act - one.act == pytest.approx((two.search - one.search) / planner.video_samples, rel=0.05)
    read = plan_cost(FEW, planner, Levels(value=0.5))
    assert read.search == one.search
    assert read.act > one.act


def test_parameters_of_the_paper() -> None:
    assert parameter_split(load_settings(PRESETS / "libero.yaml")) == {
        "video": 1_948_569_728,
        "value": 163_792_394,
        "action": 193_243_663,
        "total": 2_305_605_785,
    }


def test_bimanual_preset_builds() -> None:
    config = load_settings(PRESETS / "piper.yaml")
    with torch.device("meta"):
        model = build_from_settings(config)
    assert (len(config.data.views), config.data.action_chunk) == (3, 54)
    assert (model.config.action_in_channels, model.config.value_in_channels) == (28, 17)
    assert value_channels(config.data) == 17
    split = parameter_split(config)
    # 13 more action channels (in: d each; out: d + bias each), 7 more value channels
    assert split["action"] == 193_243_663 + 13 * (2 * 512 + 1)
    assert split["value"] == 163_792_394 + 7 * (2 * 512 + 1)


@pytest.mark.integration
def test_the_reference_spends_what_the_specification_says() -> None:
    sizes = Sizes.of(load_settings(PRESETS / "libero.yaml"))
    assert sizes.tokens == 768
    theirs = reference_search(sizes, 5, 30, 5, 10)
    assert theirs / 1e12 == pytest.approx(1158, abs=1)
    ours = PlannerSettings(
        iterations=5, video_samples=30, value_samples=5, video_elites=27, value_elites=15, denoise_steps=10
    )
    assert theirs / plan_cost(sizes, ours).search == pytest.approx(2.4, abs=0.05)


def test_memory_under_zero() -> None:
    config = load_settings(PRESETS / "libero.yaml")
    sizes, split, gib = Sizes.of(config), parameter_split(config), 2**30
    stages = [memory_per_gpu(sizes, split, config.train_joint, stage, 8, 16) for stage in (1, 2, 3)]
    total = split["total"]
    assert [m.weights / gib for m in stages] == pytest.approx([2 * total / gib, 2 * total / gib, total / 4 / gib])
    assert [m.gradients / gib for m in stages] == pytest.approx([2 * total / gib, total / 4 / gib, total / 4 / gib])
    assert all(m.optimizer == 1.5 * total and m.average == total / 2 for m in stages)
    value = memory_per_gpu(sizes, split, config.train_value, 2, 8, 16)
    assert value.optimizer == 1.5 * split["value"]
    assert trained_parameters(split, config.pretrain_video) == split["video"]
    single = memory_per_gpu(sizes, split, config.train_joint.model_copy(update={"precision": "fp32"}), 0, 1, 16)
    assert (single.weights, single.gradients, single.optimizer) == (4 * total, 4 * total, 8 * total)


def test_the_activation_estimate_is_what_a_block_keeps() -> None:
    dim, frames, cells = 64, 3, 16
    block = VideoBlock(dim, 2, False, True, True, eps=1e-6).bfloat16()
    parameters, sizes = {p.untyped_storage().data_ptr() for p in block.parameters()}, {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            sizes[storage.data_ptr()] = tensor, storage.nbytes()  # a storage kept twice counts once
        return tensor

    half = {"dtype": torch.bfloat16}
    h = torch.randn(1, 2, frames, cells, dim, **half, requires_grad=True)
    turns = torch.rand(2, frames * cells, dim).unbind()
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        block(h, torch.randn(1, 2, frames, 6, dim, **half), turns, torch.randn(1, 4, dim, **half), None)
    tokens = 2 * frames * cells
    measured = sum(size for _, size in sizes.values()) / (2 * tokens * dim)
    assert measured == pytest.approx(SAVED_PER_TOKEN, rel=0.2)
