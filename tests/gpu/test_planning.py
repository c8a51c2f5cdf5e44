"""Planning on the GPU: the fast path against the plain schedule and against the CPU, and what it keeps in memory."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from sizes import SIZES

from wav.model import WAVTransformer, build_model
from wav.model.inference import WAVPlannerModel, noise_shapes
from wav.model.plain import PlainPlannerModel
from wav.planner import Plan, RowKey, SeededNoise, plan

SMALL = SIZES["tiny"]


@pytest.fixture(scope="module")
def model() -> WAVTransformer:
    made = build_model(SMALL.model, SMALL, SMALL.latent, SMALL.caption, SMALL.value_channels)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    return made.eval()


def call(kind: Any, model: WAVTransformer, device: torch.device, dtype: torch.dtype = torch.float32) -> Plan:
    """A plan of fixed inputs and draws; the inputs are made on the CPU."""
    moved = copy.deepcopy(model).to(device, dtype)
    adapter = kind(moved, noise_shapes(moved, SMALL.views, SMALL.grid, SMALL.future, SMALL.chunk))
    generator = torch.Generator().manual_seed(1)
    shapes = (
        (2, SMALL.views, SMALL.latent, SMALL.memory, *SMALL.grid),
        (2, SMALL.text_tokens, SMALL.caption),
        (2, 1, SMALL.action_channels),
    )
    memory, text, history = (torch.randn(shape, generator=generator) for shape in shapes)
    context = adapter.begin(memory, text, torch.ones(2, SMALL.text_tokens), history)
    noise = SeededNoise([RowKey(0, row, 0) for row in range(2)], device)
    settings: Any = SMALL.planner
    return plan(adapter, context, settings, noise, lambda values: values[..., -1], with_value=True)


def compare(one: Plan, two: Plan, tolerance: float) -> None:
    torch.testing.assert_close(one.actions.cpu(), two.actions.cpu(), atol=tolerance, rtol=0)
    for a, b in zip(one.history, two.history, strict=True):
        torch.testing.assert_close(a.values.cpu(), b.values.cpu(), atol=tolerance, rtol=0)
        assert torch.equal(a.video_elites.cpu(), b.video_elites.cpu())
        assert torch.equal(a.value_elites.cpu(), b.value_elites.cpu())


def test_fast_path_equals_the_plain_schedule(model: WAVTransformer, device: torch.device) -> None:
    compare(call(WAVPlannerModel, model, device), call(PlainPlannerModel, model, device), 1e-4)


def test_elites_are_those_of_the_cpu(model: WAVTransformer, device: torch.device) -> None:
    compare(call(WAVPlannerModel, model, device), call(WAVPlannerModel, model, torch.device("cpu")), 1e-4)


def test_bfloat16_plans_finite_actions(model: WAVTransformer, device: torch.device) -> None:
    made = call(WAVPlannerModel, model, device, torch.bfloat16)
    assert made.actions.isfinite().all()


def test_scoring_takes_less_memory_than_the_buffers_of_the_reference(device: torch.device) -> None:
    """Peak above weights and conditions, of scoring every candidate, against the reference's tiled buffers alone."""
    if device.type != "cuda":
        pytest.skip("memory is measured on a GPU")
    sizes = SIZES["default"]
    model = build_model(sizes.model, sizes, sizes.latent, sizes.caption, sizes.value_channels).eval().to(device)
    adapter = WAVPlannerModel(model, noise_shapes(model, sizes.views, sizes.grid, sizes.future, sizes.chunk))
    memory = torch.zeros(1, sizes.views, sizes.latent, sizes.memory, *sizes.grid)
    context = adapter.begin(memory, torch.zeros(1, sizes.text_tokens, sizes.caption), None, None)
    M, N = 30, 5
    noise = torch.zeros(1, M, *adapter.shapes.video, device=device)
    values = torch.zeros(1, M, N, *(adapter.shapes.value or ()), device=device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    adapter.denoise_value(adapter.video_features(context, noise, 1), values, sizes.planner.denoise_steps)
    taken = torch.cuda.max_memory_allocated(device) - before
    assert taken < 4 * sizes.model.layers * M * sizes.tokens * sizes.model.width * (1 + N)
