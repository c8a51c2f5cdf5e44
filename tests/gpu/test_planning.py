"""Planning on the GPU: the backends against the baseline and against the CPU, compiled, and their memory."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from baseline.planner import BaselinePlannerModel
from sizes import SIZES
from torch._dynamo.utils import counters

from wav.inference.backends import noise_shapes
from wav.inference.compiled import CompiledPlannerModel, Recorded
from wav.inference.fused import FusedPlannerModel
from wav.inference.torch import TorchPlannerModel
from wav.model import WAVTransformer, build_model
from wav.planning.planner import Planner
from wav.planning.types import Plan, RowKey, SeededNoise

SMALL = SIZES["tiny"]


@pytest.fixture(scope="module")
def model() -> WAVTransformer:
    made = build_model(SMALL.model, SMALL, SMALL.latent, SMALL.caption, SMALL.value_channels)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    return made.eval()


def adapted(kind: Any, model: WAVTransformer, device: torch.device, dtype: torch.dtype = torch.float32) -> Any:
    """The planner's view of a copy of the model on the device."""
    moved = copy.deepcopy(model).to(device, dtype)
    return kind(moved, noise_shapes(moved, SMALL.views, SMALL.grid, SMALL.future, SMALL.chunk))


def call(kind: Any, model: WAVTransformer, device: torch.device, dtype: torch.dtype = torch.float32) -> Plan:
    """A plan of fixed inputs and draws; the inputs are made on the CPU."""
    return planned(adapted(kind, model, device, dtype), device)


def planned(adapter: Any, device: torch.device, seed: int = 0, **changes: Any) -> Plan:
    """The plan of an adapter; ``seed`` names the draws."""
    generator = torch.Generator().manual_seed(1)
    shapes = (
        (2, SMALL.views, SMALL.latent, SMALL.memory, *SMALL.grid),
        (2, SMALL.text_tokens, SMALL.caption),
        (2, 1, SMALL.action_channels),
    )
    memory, text, history = (torch.randn(shape, generator=generator) for shape in shapes)
    context = adapter.begin(memory, text, torch.ones(2, SMALL.text_tokens), history)
    noise = SeededNoise([RowKey(seed, row, 0) for row in range(2)], device)
    settings: Any = replace(SMALL.planner, **changes)
    return Planner(adapter, settings, lambda values: values[..., -1]).plan(context, noise, with_value=True)


def compare(one: Plan, two: Plan, tolerance: float) -> None:
    torch.testing.assert_close(one.actions.cpu(), two.actions.cpu(), atol=tolerance, rtol=0)
    for a, b in zip(one.history, two.history, strict=True):
        torch.testing.assert_close(a.values.cpu(), b.values.cpu(), atol=tolerance, rtol=0)
        assert torch.equal(a.video_elites.cpu(), b.video_elites.cpu())
        assert torch.equal(a.value_elites.cpu(), b.value_elites.cpu())


@pytest.mark.parametrize("kind", [TorchPlannerModel, FusedPlannerModel])
def test_backends_equal_the_baseline(kind: Any, model: WAVTransformer, device: torch.device) -> None:
    compare(call(kind, model, device), call(BaselinePlannerModel, model, device), 1e-4)


def test_elites_are_those_of_the_cpu(model: WAVTransformer, device: torch.device) -> None:
    compare(call(TorchPlannerModel, model, device), call(TorchPlannerModel, model, torch.device("cpu")), 1e-4)


def test_bfloat16_plans_finite_actions(model: WAVTransformer, device: torch.device) -> None:
    made = call(TorchPlannerModel, model, device, torch.bfloat16)
    assert made.actions.isfinite().all()


@pytest.mark.parametrize("changes", [{}, {"iterations": 2}])
def test_compiled_plans_are_the_uncompiled_ones(
    model: WAVTransformer, device: torch.device, changes: dict[str, int]
) -> None:
    """Three calls: one records, two launch what was recorded, with other draws."""
    compiled, plain = adapted(CompiledPlannerModel, model, device), adapted(TorchPlannerModel, model, device)
    for seed in range(3):
        with torch.inference_mode():
            compare(planned(compiled, device, seed, **changes), planned(plain, device, seed, **changes), 1e-4)


def test_a_compiled_plan_that_is_kept_is_not_overwritten(model: WAVTransformer, device: torch.device) -> None:
    adapter = adapted(CompiledPlannerModel, model, device)
    first = planned(adapter, device)
    kept = [t.clone() for t in (first.actions, first.history[0].values, first.history[0].video.mean)]
    second = planned(adapter, device, seed=1)
    assert not torch.equal(first.actions, second.actions)
    for before, now in zip(kept, (first.actions, first.history[0].values, first.history[0].video.mean), strict=True):
        assert torch.equal(before, now)


def test_compiled_calls_are_recorded_graphs_and_nothing_is_compiled_twice(
    model: WAVTransformer, device: torch.device
) -> None:
    if device.type != "cuda":
        pytest.skip("graphs are recorded on a GPU")
    adapter = adapted(CompiledPlannerModel, model, device, torch.bfloat16)
    planned(adapter, device)
    recorded, made = dict(adapter._calls), counters["stats"]["unique_graphs"]
    assert all(isinstance(call, Recorded) for call in recorded.values())
    assert planned(adapter, device, seed=1).actions.isfinite().all()
    assert adapter._calls == recorded
    assert counters["stats"]["unique_graphs"] == made


def test_scoring_takes_less_memory_than_the_buffers_of_the_reference(device: torch.device) -> None:
    """Peak above weights and variants, of scoring every candidate, against the reference's tiled buffers alone."""
    if device.type != "cuda":
        pytest.skip("memory is measured on a GPU")
    sizes = SIZES["default"]
    model = build_model(sizes.model, sizes, sizes.latent, sizes.caption, sizes.value_channels).eval().to(device)
    adapter = TorchPlannerModel(model, noise_shapes(model, sizes.views, sizes.grid, sizes.future, sizes.chunk))
    memory = torch.zeros(1, sizes.views, sizes.latent, sizes.memory, *sizes.grid)
    context = adapter.begin(memory, torch.zeros(1, sizes.text_tokens, sizes.caption), None, None)
    M, N = 30, 5
    noise = torch.zeros(1, M, *adapter.shapes.video, device=device)
    values = torch.zeros(1, M, N, *(adapter.shapes.value or ()), device=device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    adapter.denoise_value(adapter.video_features(context, noise, (1.0,)), values, sizes.planner.denoise_steps)
    taken = torch.cuda.max_memory_allocated(device) - before
    assert taken < 4 * sizes.model.layers * M * sizes.tokens * sizes.model.width * (1 + N)
