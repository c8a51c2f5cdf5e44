"""Backends against the baseline schedule and each other: the same numbers, and the counts that make them fast."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from wav.config import DataSettings, ModelSettings, PlannerSettings
from wav.errors import ConfigError
from wav.inference import fused
from wav.inference.backends import compiles_here, noise_shapes, planner_model
from wav.inference.compiled import CompiledPlannerModel
from wav.inference.cpu import kernels
from wav.inference.fused import FusedPlannerModel
from wav.inference.torch import TorchPlannerModel
from wav.model import build_model
from wav.planning.planner import Planner
from wav.planning.types import PUBLISHED, Levels, Plan, RowKey, SeededNoise

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from baseline.planner import BaselinePlannerModel
from counting import Counted

# Widths that no two kinds of product share, so that the counts tell them apart.
MODEL = ModelSettings(
    layers=4, heads=2, head_dim=20, value_heads=2, value_head_dim=6, action_heads=2, action_head_dim=8
)
D, VALUE, ACTION, LATENT, CAPTION = 40, 12, 16, 9, 11
VIEWS, MEMORY, FUTURE, GRID, CHUNK, WORDS = 2, 3, 2, (2, 3), 5, 7
B, M, N, K, STEPS = 2, 3, 4, 2, 3
TOKENS = VIEWS * (MEMORY + FUTURE) * GRID[0] * GRID[1]
PLANNER = PlannerSettings(
    iterations=K, video_samples=M, value_samples=N, video_elites=2, value_elites=3, denoise_steps=STEPS
)


def make(kind: Any = planner_model, dtype: torch.dtype = torch.float32) -> Any:
    model = build_model(MODEL, DataSettings(action_chunk=CHUNK), LATENT, CAPTION)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return kind(model.eval().to(dtype), noise_shapes(model, VIEWS, GRID, FUTURE, CHUNK))


def act(model: Any, settings: PlannerSettings = PLANNER, masked: bool = True, levels: Levels = PUBLISHED) -> Plan:
    generator = torch.Generator().manual_seed(1)
    shapes = ((B, VIEWS, LATENT, MEMORY, *GRID), (B, WORDS, CAPTION), (B, 1, 15))
    memory, text, history = (torch.randn(shape, generator=generator) for shape in shapes)
    mask = torch.ones(B, WORDS)
    if masked:
        mask[0, 4:] = 0
    noise = SeededNoise([RowKey(row, "test", 0) for row in range(B)])
    context = model.begin(memory, text, mask, history)
    return Planner(model, settings, lambda values: values[..., -1], levels).plan(context, noise, with_value=True)


@pytest.mark.parametrize("levels", [Levels(), Levels((1.0, 0.8, 0.5), 0.1)])
@pytest.mark.parametrize("masked", [True, False])
def test_backends_plan_as_the_baseline_does(levels: Levels, masked: bool) -> None:
    wanted = act(make(BaselinePlannerModel), PLANNER, masked, levels)
    for kind in (TorchPlannerModel, FusedPlannerModel, planner_model):
        ours = act(make(kind), PLANNER, masked, levels)
        torch.testing.assert_close(ours.actions, wanted.actions, atol=1e-5, rtol=0)
        torch.testing.assert_close(ours.values, wanted.values, atol=1e-5, rtol=0)
        for one, two in zip(ours.history, wanted.history, strict=True):
            torch.testing.assert_close(one.values, two.values, atol=1e-5, rtol=0)
            assert torch.equal(one.video_elites, two.video_elites)
            assert torch.equal(one.value_elites, two.value_elites)


def test_logits_without_a_bound_are_the_librarys(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = act(make(TorchPlannerModel)).actions
    monkeypatch.setattr(fused, "LARGEST", 0.0)
    model = make()
    assert not getattr(model, "video", None) or not model.video.blocks[0].bounded
    torch.testing.assert_close(act(model).actions, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", [TorchPlannerModel, FusedPlannerModel])
def test_half_precision(kind: Any) -> None:
    actions = act(make(kind, torch.bfloat16), PLANNER.model_copy(update={"iterations": 0})).actions
    wanted = act(make(), PLANNER.model_copy(update={"iterations": 0})).actions
    assert (actions - wanted).abs().mean() < 0.1 * wanted.abs().mean()


def test_planning_compiles_by_itself_where_its_tools_are(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def compiles(device: str, kind: str = "paper") -> bool:
        weight = SimpleNamespace(device=torch.device(device))
        config = SimpleNamespace(action_kind=kind)
        return compiles_here(SimpleNamespace(parameters=lambda: iter([weight]), config=config))  # type: ignore[arg-type]

    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: True)
    monkeypatch.setattr("shutil.which", lambda name: name if name == "gcc" else None)
    assert compiles("cuda:0")
    assert not compiles("cpu")
    assert not compiles("cuda:0", "mine")
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert not caplog.text
    assert not compiles("cuda:0")
    assert "planning is not compiled, this machine has not a C compiler" in caplog.text


def test_backends_by_name(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    model, shapes = make().model, make().shapes

    def chosen(backend: Any, dtype: torch.dtype = torch.float32) -> type:
        return type(planner_model(model.to(dtype), shapes, backend))

    assert chosen("torch") is TorchPlannerModel
    for here in (True, False):
        monkeypatch.setattr(kernels, "available", lambda here=here: here)
        monkeypatch.setattr(kernels, "CpuPlannerModel", FusedPlannerModel)
        assert chosen("auto") is (FusedPlannerModel if here else TorchPlannerModel)
        assert chosen("auto", torch.bfloat16) is TorchPlannerModel
        with caplog.at_level(logging.INFO):
            assert chosen("compiled") is (FusedPlannerModel if here else CompiledPlannerModel)
        assert chosen("compiled", torch.bfloat16) is CompiledPlannerModel
    assert caplog.text.count("export.compile = on: no effect here") == 1
    with pytest.raises(ConfigError, match=r"backend = 'cpu': its kernels do not compute torch.float32 on cpu"):
        chosen("cpu")
    with pytest.raises(ConfigError, match="backend = 'gpu': unknown; use auto, torch, compiled or cpu"):
        chosen("gpu")


def counted(kind: Any) -> Counted:
    model = make(kind)
    act(model)  # noise levels are known
    with torch.no_grad(), Counted() as counts:
        act(model)
    return counts


def test_counts_of_projections() -> None:
    """Rows that go through each kind of product in one planning call, with_value included."""
    ours, plain = counted(FusedPlannerModel).products, counted(BaselinePlannerModel).products
    passes, layers = K * M + 1, MODEL.layers  # video passes of each observation
    # Video K/V for the value expert: once per candidate and layer; plain: per sample and step, and k and v apart.
    assert ours[D, 2 * VALUE] == layers * B * passes * TOKENS
    reads = K * M * N * STEPS + STEPS + 1  # scoring, the reported value, the action's condition
    assert plain[D, VALUE] == 2 * layers * B * reads * TOKENS
    # For the action expert: once for all steps.
    assert ours[D, 2 * ACTION] == layers * B * TOKENS
    assert plain[D, ACTION] == 2 * layers * B * STEPS * TOKENS
    # Self-attention's q, k and v in one product.
    assert ours[D, 3 * D] == layers * B * passes * TOKENS
    # Instruction: projected and its K/V computed once per observation; plain: per candidate and iteration.
    assert ours[CAPTION, D] == B * WORDS
    assert ours[D, 2 * D] == layers * B * WORDS
    assert plain[CAPTION, D] == B * passes * WORDS
    # AdaLN: no rows at all once a noise level is known; plain: a row per token.
    assert ours[D, 6 * D] == ours[VALUE, 6 * VALUE] == ours[ACTION, 6 * ACTION] == 0
    assert plain[D, 6 * D] >= B * passes * TOKENS
    # The video head is for video alone.
    assert ours[D, LATENT] == 0
    assert plain[D, LATENT] == B * passes * TOKENS


def test_two_adaln_rows_per_view_of_a_new_noise_level() -> None:
    model = make(FusedPlannerModel)
    with torch.no_grad(), Counted() as counts:
        model.video.at(1000.0, VIEWS, MEMORY, FUTURE)
    assert counts.products[D, 6 * D] == 2 + VIEWS


@pytest.mark.parametrize("kind", [TorchPlannerModel, FusedPlannerModel])
def test_less_is_computed(kind: Any) -> None:
    assert counted(kind).flops < 0.7 * counted(BaselinePlannerModel).flops


def test_buffers_are_under_a_tenth() -> None:
    """Of candidates that are only scored nothing but the value expert's K/V is kept."""
    model = make(FusedPlannerModel)
    context = model.begin(torch.zeros(B, VIEWS, LATENT, MEMORY, *GRID), torch.zeros(B, WORDS, CAPTION), None, None)
    features = model.video_features(context, torch.zeros(B, M, *model.shapes.video), (1.0,))
    assert features.layers is None
    kept = sum(key.numel() for (key,) in features.keys)
    tiled = MODEL.layers * B * M * TOKENS * D * (1 + N)
    assert kept == MODEL.layers * B * M * TOKENS * 2 * VALUE
    assert kept < 0.13 * tiled  # 2 d / (D (1 + N)): 0.12 here, 0.083 at d = 64, D = 256, N = 5
    with pytest.raises(ConfigError, match="features of several candidates"):
        model.denoise_action(context, features, None, torch.zeros(B, CHUNK, 15), 1)


def test_fewer_steps_of_scoring_compute_less_and_still_plan() -> None:
    model, longer = make(FusedPlannerModel), PLANNER.model_copy(update={"denoise_steps": 6})
    exact, less = act(model, longer), longer.model_copy(update={"score_steps": 1})
    assert not torch.equal(act(model, less).actions, exact.actions)
    with torch.no_grad(), Counted() as whole:
        act(model, longer)
    with torch.no_grad(), Counted() as fewer:
        act(model, less)
    assert fewer.flops < whole.flops
