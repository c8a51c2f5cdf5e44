"""The formulas behind ``wav summary`` against torch's own counter, and the full sizes they are meant for."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from wav.config import CouplingSettings, PlannerSettings, Settings, load_settings
from wav.data.windows import WindowBatch
from wav.inference.backends import noise_shapes
from wav.inference.fused import FusedPlannerModel
from wav.model.accounting import (
    SAVED_PER_TOKEN,
    Sizes,
    memory_per_gpu,
    parameter_split,
    plan_cost,
    reference_search,
    trained_parameters,
    training_cost,
)
from wav.model.build import build_from_settings, value_channels
from wav.model.video import VideoBlock
from wav.planning.planner import Planner
from wav.planning.types import RowKey, SeededNoise
from wav.training.draws import SeededRandom
from wav.training.objectives import build_objective

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from baseline.planner import BaselinePlannerModel

PRESETS = Path(__file__).resolve().parents[2] / "presets"
BATCH = 10
SECTIONS: dict[str, dict[str, Any]] = {
    "data": {"views": ["agentview", "wrist"], "memory_frames": 3, "action_chunk": 7, "text_tokens": 9},
    "model": {"layers": 5, "heads": 2, "head_dim": 16, "value_heads": 2, "action_heads": 2},
    "encode": {"channels": 6, "text_dim": 24},
    "eval_libero": {"execute_steps": 2},
    "train_value": {"value_draws": 3},
    "train_joint": {"action_probability": 0.6, "action_draws": 2, "value_draws": 3},
}


def settings(**changes: dict[str, Any]) -> Settings:
    return Settings.model_validate({n: {**SECTIONS.get(n, {}), **changes.get(n, {})} for n in {*SECTIONS, *changes}})


class Empty:
    empty_text = torch.zeros(9, 24)
    empty_text_mask = torch.ones(9, dtype=torch.bool)


def windows(config: Settings) -> WindowBatch:
    sizes = Sizes.of(config)
    grid = (sizes.height, sizes.image_width)
    return WindowBatch(
        memory=torch.randn(BATCH, sizes.views, 6, sizes.memory, *grid),
        future=torch.randn(BATCH, sizes.views, 6, sizes.future, *grid),
        text=torch.randn(BATCH, 9, 24),
        text_mask=torch.ones(BATCH, 9, dtype=torch.bool),
        state=torch.randn(BATCH, 8),
        actions=torch.randn(BATCH, 7, 15),
        values=torch.randn(BATCH, 7, 10),
        episode=torch.zeros(BATCH, dtype=torch.int64),
        step=torch.arange(BATCH),
    )


@pytest.mark.parametrize("value_expert", [True, False])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("stage", ["pretrain_video", "train_value", "train_joint"])
def test_training_flops(stage: str, checkpointing: bool, value_expert: bool) -> None:
    if stage == "train_value" and not value_expert:
        pytest.skip("nothing to train")
    changes = {stage: {**SECTIONS.get(stage, {}), "gradient_checkpointing": checkpointing}}
    config = settings(**changes, model={"value_expert": value_expert})
    train, model = getattr(config, stage), build_from_settings(config)
    if checkpointing:
        model.enable_gradient_checkpointing()
    module = build_objective(train, model, config.data.memory_frames, config.data.action_dim, CouplingSettings())
    inputs = module.draw(windows(config), Empty(), SeededRandom(0, 0), index=0)
    module(inputs)  # AdaLN rows of the frozen video part are kept from step to step
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss, _ = module(inputs)
        forward = counter.get_total_flops()
        loss.backward()
    cost = training_cost(Sizes.of(config), train, BATCH)
    assert cost.forward * BATCH == pytest.approx(forward, rel=0.005)
    assert cost.total * BATCH == pytest.approx(counter.get_total_flops(), rel=0.02)
    assert (cost.recomputed > 0) == checkpointing


@pytest.mark.parametrize("changes", [{}, {"iterations": 0}, {"denoise_steps": 4}, {"value_samples": 1}])
def test_plan_flops(changes: dict[str, int]) -> None:
    config = settings(
        planner={"value_elites": 4, "video_samples": 6, "value_samples": 3, "denoise_steps": 5, **changes}
    )
    sizes, planner = Sizes.of(config), config.planner
    built = build_from_settings(config).eval().requires_grad_(False)
    model = FusedPlannerModel(built, noise_shapes(built, 2, (4, 4), sizes.future, 7))

    def call() -> None:
        context = model.begin(torch.randn(1, 2, 6, 3, 4, 4), torch.randn(1, 9, 24), None, torch.randn(1, 1, 15))
        Planner(model, planner, lambda values: values[..., -1]).plan(context, SeededNoise([RowKey(0, 0, 0)]))

    call()  # AdaLN rows are kept from call to call
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    cost = plan_cost(sizes, planner)
    assert cost.total == pytest.approx(counter.get_total_flops(), rel=0.02)
    assert (cost.search > 0) == (planner.iterations > 0)


def test_parameters_of_the_paper() -> None:
    config = load_settings(PRESETS / "libero.yaml")
    assert parameter_split(config) == {
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
    assert split["video"] == 1_948_569_728
    # 13 more action channels (in: d each; out: d + bias each), 7 more value channels
    assert split["action"] == 193_243_663 + 13 * (2 * 512 + 1)
    assert split["value"] == 163_792_394 + 7 * (2 * 512 + 1)


def test_the_reference_spends_what_the_specification_says() -> None:
    sizes = Sizes.of(load_settings(PRESETS / "libero.yaml"))
    assert sizes.tokens == 768
    assert reference_search(sizes, 5, 30, 5, 10) / 1e12 == pytest.approx(1158, abs=1)
    ours = PlannerSettings(
        iterations=5, video_samples=30, value_samples=5, video_elites=27, value_elites=15, denoise_steps=10
    )
    assert reference_search(sizes, 5, 30, 5, 10) / plan_cost(sizes, ours).search == pytest.approx(2.4, abs=0.05)


def test_the_reference_schedule_is_counted_right() -> None:
    config = settings()
    sizes = Sizes.of(config)
    built = build_from_settings(config).eval().requires_grad_(False)
    model = BaselinePlannerModel(built, noise_shapes(built, 2, (4, 4), sizes.future, 7))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        context = model.begin(torch.randn(1, 2, 6, 3, 4, 4), torch.randn(1, 9, 24), None, None)
        features = model.video_features(context, torch.randn(1, 4, *model.shapes.video), (1.0,))
        model.denoise_value(features, torch.randn(1, 4, 3, *(model.shapes.value or ())), 5)
    assert reference_search(sizes, 1, 4, 3, 5) == pytest.approx(counter.get_total_flops(), rel=0.02)


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
