"""The planner's adapter against the plain schedule: the same numbers, and the counts that make it fast."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from wav.config import DataSettings, ModelSettings, PlannerSettings
from wav.errors import ConfigError
from wav.inference import native
from wav.inference import products as kernels
from wav.inference.adapter import WAVPlannerModel, noise_shapes
from wav.model import build_model
from wav.planning.planner import Planner
from wav.planning.types import Plan, RowKey, SeededNoise

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


def make(kind: type[WAVPlannerModel] = WAVPlannerModel, dtype: torch.dtype = torch.float32) -> Any:
    model = build_model(MODEL, DataSettings(action_chunk=CHUNK), LATENT, CAPTION)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return kind(model.eval().to(dtype), noise_shapes(model, VIEWS, GRID, FUTURE, CHUNK))


def act(model: Any, settings: PlannerSettings = PLANNER, masked: bool = True) -> Plan:
    generator = torch.Generator().manual_seed(1)
    shapes = ((B, VIEWS, LATENT, MEMORY, *GRID), (B, WORDS, CAPTION), (B, 1, 15))
    memory, text, history = (torch.randn(shape, generator=generator) for shape in shapes)
    mask = torch.ones(B, WORDS)
    if masked:
        mask[0, 4:] = 0
    noise = SeededNoise([RowKey(row, "test", 0) for row in range(B)])
    context = model.begin(memory, text, mask, history)
    return Planner(model, settings, lambda values: values[..., -1]).plan(context, noise, with_value=True)


@pytest.mark.parametrize("video_steps", [1, 2])
@pytest.mark.parametrize("masked", [True, False])
def test_same_plan_as_the_plain_schedule(video_steps: int, masked: bool) -> None:
    settings = PLANNER.model_copy(update={"video_denoise_steps": video_steps})
    ours, plain = (act(make(kind), settings, masked) for kind in (WAVPlannerModel, BaselinePlannerModel))
    torch.testing.assert_close(ours.actions, plain.actions, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.values, plain.values, atol=1e-5, rtol=0)
    for one, two in zip(ours.history, plain.history, strict=True):
        torch.testing.assert_close(one.values, two.values, atol=1e-5, rtol=0)
        assert torch.equal(one.video_elites, two.video_elites)
        assert torch.equal(one.value_elites, two.value_elites)


@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("bounded", [True, False])
def test_same_plan_without_compiled_kernels(onednn: bool, bounded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With oneDNN and without, and with logits that are not bounded."""
    wanted = act(make()).actions
    monkeypatch.setattr(native, "available", lambda: False)
    if not onednn:
        monkeypatch.setattr(kernels, "has_onednn", lambda: False)
    if not bounded:
        monkeypatch.setattr(kernels, "LARGEST", 0.0)
    model = make()
    product = model.prepared.proj_in
    assert model.prepared.layers[0].own.small == bounded
    assert not product.native
    assert product.onednn == kernels.has_onednn()
    torch.testing.assert_close(act(model).actions, wanted, atol=1e-5, rtol=0)


@pytest.mark.skipif(not native.available(), reason="no C compiler, or WAV_NATIVE=0")
def test_compiled_kernels_leave_no_pass_of_their_own_to_norms_and_gates() -> None:
    """Projections, attentions and feed-forwards carry the norms, modulations, rotations and gates around them."""
    model = make()
    act(model)
    with torch.no_grad(), Counted() as counts:
        act(model)
    layers, reads = MODEL.layers, K * STEPS + STEPS + 1  # value passes: scoring, the reported value, the condition
    video, action = K + 1, STEPS
    assert counts.calls["attend"] == layers * (2 * reads + 3 * action + video)  # text is masked: not by the kernel
    assert counts.calls["feed"] == layers * (reads + action + video)
    for gone in ("linalg_vector_norm", "rsqrt_", "exp2_", "_linear_pointwise", "baddbmm", "repeat_interleave"):
        assert counts.calls[gone] == 0


def test_half_precision_runs_on_the_library_kernels() -> None:
    actions = act(make(dtype=torch.bfloat16), PLANNER.model_copy(update={"iterations": 0})).actions
    wanted = act(make(), PLANNER.model_copy(update={"iterations": 0})).actions
    assert (actions - wanted).abs().mean() < 0.1 * wanted.abs().mean()


def counted(kind: type[WAVPlannerModel]) -> Counted:
    model = make(kind)
    act(model)  # weights are prepared, noise levels known
    with torch.no_grad(), Counted() as counts:
        act(model)
    return counts


def test_counts_of_projections() -> None:
    """Rows that go through each kind of product in one planning call, with_value included."""
    ours, plain = counted(WAVPlannerModel).products, counted(BaselinePlannerModel).products
    passes, layers = K * M + 1, MODEL.layers  # video passes of each observation
    # Video K/V for the value expert: once per candidate and layer; plain: per sample and step, and k and v apart.
    assert ours[D, 2 * VALUE] == layers * B * passes * TOKENS
    reads = K * M * N * STEPS + STEPS + 1  # scoring, the reported value, the action's condition
    assert plain[D, VALUE] == 2 * layers * B * reads * TOKENS
    # For the action expert: once for all steps.
    assert ours[D, 2 * ACTION] == layers * B * TOKENS
    assert plain[D, ACTION] == 2 * layers * B * STEPS * TOKENS
    # Self-attention's fused q, k, v: memory tokens of layer 0 once per observation.
    memory = TOKENS * MEMORY // (MEMORY + FUTURE)
    assert ours[D, 3 * D] == B * ((layers - 1) * passes * TOKENS + passes * (TOKENS - memory) + memory)
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
    model = make()
    with torch.no_grad(), Counted() as counts:
        model.prepared.at(1000.0, VIEWS, MEMORY, FUTURE)
    assert counts.products[D, 6 * D] == 2 + VIEWS


def test_less_is_computed_and_copied() -> None:
    ours, plain = counted(WAVPlannerModel), counted(BaselinePlannerModel)
    assert ours.flops < 0.7 * plain.flops
    assert ours.copied < plain.copied / 2


def test_buffers_are_under_a_tenth() -> None:
    """Of candidates that are only scored nothing but the value expert's K/V is kept."""
    model = make()
    context = model.begin(torch.zeros(B, VIEWS, LATENT, MEMORY, *GRID), torch.zeros(B, WORDS, CAPTION), None, None)
    features = model.video_features(context, torch.zeros(B, M, *model.shapes.video), 1)
    assert features.layers is None
    kept = sum(key.numel() for key in features.keys)
    tiled = MODEL.layers * B * M * TOKENS * D * (1 + N)
    assert kept == MODEL.layers * B * M * TOKENS * 2 * VALUE
    assert kept < 0.13 * tiled  # 2 d / (D (1 + N)): 0.12 here, 0.083 at d = 64, D = 256, N = 5
    with pytest.raises(ConfigError, match="features of several candidates"):
        model.denoise_action(context, features, None, torch.zeros(B, CHUNK, 15), 1)


def test_changed_weights_are_seen_by_the_next_observation() -> None:
    model = make()
    before = act(model).actions
    with torch.no_grad():
        cast_linear(model.model.video.transformer_blocks[1].attn1.to_q).weight.mul_(1.5)
    after = act(model).actions
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, act(WAVPlannerModel(model.model, model.shapes)).actions, atol=0, rtol=0)


def cast_linear(module: nn.Module) -> nn.Linear:
    assert isinstance(module, nn.Linear)
    return module


def test_vector_tails_do_not_decide_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of attention is bit-equal wherever it stands, though its logits do not fill whole vectors."""
    monkeypatch.setattr(native, "available", lambda: False)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(5, 7, 12, generator=generator) for _ in range(3))
    there = kernels.attend(query, key, value, 2, True)
    for shift in (1, 2, 3):
        moved = kernels.attend(query.roll(shift, 0), key.roll(shift, 0), value.roll(shift, 0), 2, True)
        assert torch.equal(moved.roll(-shift, 0), there)
    torch.testing.assert_close(there, kernels.attend(query, key, value, 2, False), atol=1e-6, rtol=1e-5)
