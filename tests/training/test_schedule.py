"""What makes a training step fast, as counts, and that it computes what the plain schedule does."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.micro import CAPTION, CHANNELS, CONFIG, SIZE, VIEWS, inputs_of, random_batch
from wav.config import ModelSettings
from wav.model import WAVTransformer, build_model, native_training
from wav.model.frozen import FrozenVideo
from wav.training.draws import Compat
from wav.training.objectives import StageModule

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from counting import Counted
from plain_training import NeverFrozen, diffusers_operations, plain

STAGES = ["pretrain_video", "train_value", "train_joint"]
# Widths that no two kinds of product share.
MODEL = ModelSettings(
    layers=4, heads=2, head_dim=20, value_heads=2, value_head_dim=6, action_heads=2, action_head_dim=8
)
D, VALUE = 40, 12
TOKENS = VIEWS * 4 * 2 * 2  # of random_batch: two memory and two future frames of 2 x 2 cells


def make(stage: str, kind: str = "ours", compat: Compat | None = None, **changes: Any) -> StageModule:
    model = build_model(MODEL, CONFIG.data, CHANNELS, CAPTION)
    with torch.no_grad():  # no parameter may hide behind a zero
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    if kind == "plain":
        plain(model)
    module = StageModule(model.train(), getattr(CONFIG, stage).model_copy(update=changes), 2, 7, compat or Compat())
    if kind == "plain":
        module.frozen = NeverFrozen()
    return module


def gradients(module: StageModule, inputs: Any) -> tuple[float, dict[str, torch.Tensor]]:
    loss, _ = module(inputs)
    loss.backward()
    found = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    return float(loss.detach()), found


@pytest.mark.parametrize("stage", STAGES)
def test_same_losses_and_gradients_as_the_plain_schedule(stage: str) -> None:
    batch = random_batch()
    mask = batch.text_mask.clone()
    mask[::2, 3:] = False
    inputs = inputs_of(replace(batch, text_mask=mask), stage)
    loss, found = gradients(make(stage), inputs)
    with diffusers_operations():
        wanted_loss, wanted = gradients(make(stage, "plain"), inputs)
    assert loss == pytest.approx(wanted_loss, rel=1e-5)
    head = {"model.scale_shift_table", "model.proj_out.weight", "model.proj_out.bias"}  # always computed there
    assert found.keys() - head == wanted.keys() - head
    for name, gradient in found.items():
        scale = float(wanted[name].abs().max())
        torch.testing.assert_close(gradient, wanted[name], atol=1e-4 * scale + 1e-8, rtol=0, msg=name)


def test_the_value_stage_keeps_nothing_of_the_video_pass() -> None:
    """No tensor of the video blocks' inside is kept for a backward pass; only the features, which K and V read."""
    kept: list[torch.Size] = []
    module = make("train_value")
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        module(inputs_of(random_batch(), "train_value"))
    assert not any(shape[-1:] == (4 * D,) for shape in kept)
    wide = [shape for shape in kept if shape[-1:] == (D,) and shape.numel() >= SIZE * TOKENS * D]
    assert len(wide) <= 2 * MODEL.layers  # each layer's features, once for keys and once for values
    assert not any(p.requires_grad for n, p in module.model.named_parameters() if not n.startswith("value_"))


def counted(module: StageModule, inputs: Any) -> Counted:
    module(inputs)  # weights are prepared
    with Counted() as counts:
        module(inputs)
    return counts


def test_counts_of_the_value_stage() -> None:
    inputs = inputs_of(random_batch(), "train_value")
    ours, theirs = counted(make("train_value"), inputs).products, counted(make("train_value", "plain"), inputs).products
    draws = inputs.draws.value_level.shape[1]
    assert draws > 1
    # Keys and values of the video features: once per sample and layer, whatever the number of draws.
    assert ours[D, VALUE] == 2 * MODEL.layers * SIZE * TOKENS
    assert theirs[D, VALUE] == draws * ours[D, VALUE]
    # AdaLN of the video: none once the level is known; plain: a row per token.
    assert ours[D, 6 * D] == 0
    assert theirs[D, 6 * D] >= SIZE * TOKENS
    # The head is for video alone; q, k and v of the frozen video are one product.
    assert ours[D, CHANNELS] == 0
    assert theirs[D, CHANNELS] == SIZE * TOKENS
    assert ours[D, 3 * D] > 0


def test_counts_of_the_joint_stage() -> None:
    inputs = inputs_of(random_batch(), "train_joint")
    roles, draws = inputs.roles, inputs.draws.value_level.shape[1]
    assert roles.value
    assert draws > 1
    ours, theirs = counted(make("train_joint"), inputs).products, counted(make("train_joint", "plain"), inputs).products
    assert ours[D, VALUE] == 2 * MODEL.layers * (roles.action + roles.value) * TOKENS
    assert theirs[D, VALUE] == 2 * MODEL.layers * (roles.action + roles.value * draws) * TOKENS
    # One AdaLN row per sample and frame (and per view, for the view's own part), not per token.
    assert ours[D, 6 * D] == SIZE * 4 + VIEWS
    assert theirs[D, 6 * D] == SIZE * TOKENS + VIEWS


def test_the_last_block_computes_what_the_video_loss_reads() -> None:
    """Memory frames are only keys and values there, and have no velocity; the plain schedule computes all."""
    inputs = inputs_of(random_batch(), "pretrain_video")
    ours, theirs = (counted(make("pretrain_video", kind), inputs).products for kind in ("ours", "plain"))
    future = TOKENS // 2
    assert ours[D, 4 * D] == SIZE * ((MODEL.layers - 1) * TOKENS + future)
    assert theirs[D, 4 * D] == SIZE * MODEL.layers * TOKENS
    assert ours[D, CHANNELS] == SIZE * future
    full = counted(make("pretrain_video", compat=Compat(diluted_video_loss=True)), inputs).products
    assert full[D, CHANNELS] == SIZE * TOKENS  # the reference's loss is of all frames


@pytest.mark.skipif(not native_training.available(), reason="no C compiler, or WAV_NATIVE=0")
@pytest.mark.parametrize("stage", STAGES)
def test_blocks_train_on_the_compiled_kernels(stage: str) -> None:
    module, inputs = make(stage), inputs_of(random_batch(), stage)
    with Counted() as counts:
        loss, _ = module(inputs)
        loss.backward()
    library = ("mm", "bmm", "gelu_backward", "linalg_vecdot", "view_as_complex")
    assert {name: counts.calls[name] for name in library} == dict.fromkeys(library, 0)
    assert not any("scaled_dot_product" in name for name in counts.calls)
    blocks = {"pretrain_video": 1, "train_value": 1, "train_joint": 3}[stage] * MODEL.layers
    assert counts.calls["attention_backward"] >= 2 * blocks
    assert counts.calls["modulate_backward"] == counts.calls["gate_backward"] == 2 * blocks
    assert counts.calls["norm_backward"] >= 4 * blocks


def test_frozen_features_are_the_models() -> None:
    module = make("train_value")
    model: WAVTransformer = module.model
    frozen = FrozenVideo(model)
    inputs = inputs_of(random_batch(), "train_value")
    latents, timestep = module._latents(inputs)
    batch = inputs.batch

    def both() -> tuple[Any, Any]:
        memory, noise = latents.split(2, dim=3)
        with torch.no_grad():
            wanted = model.video(latents, timestep, batch.text, batch.text_mask, need_head=False).features
        return frozen.features(memory, noise, batch.text, batch.text_mask), wanted

    for one, two in zip(*both(), strict=True):
        assert not one.requires_grad
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)
    first = frozen._prepared
    with torch.no_grad():
        model.value_proj_in.weight.add_(1)  # trained: not looked at
    both()
    assert frozen._prepared is first
    with torch.no_grad():
        model.proj_in.weight.mul_(1.5)  # loaded from a checkpoint, say
    for one, two in zip(*both(), strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)
    assert frozen._prepared is not first
    model.proj_in.weight.ds_tensor = None  # ZeRO-3: the weights are elsewhere
    assert not frozen.usable


def test_random_labels_of_the_reference_are_not_taken_for_pure_noise() -> None:
    inputs = inputs_of(random_batch(), "train_value")
    labels = replace(inputs.draws, video_label=torch.linspace(0.1, 0.9, SIZE))
    inputs = replace(inputs, draws=labels)
    compat = Compat(random_labels=True)
    one, two = (gradients(make("train_value", kind, compat), inputs)[0] for kind in ("ours", "plain"))
    assert one == pytest.approx(two, rel=1e-5)
    assert one != pytest.approx(gradients(make("train_value"), inputs)[0], rel=1e-3)


def test_layers_that_are_not_recomputed_keep_their_activations_and_no_number_changes() -> None:
    def step(layers: int) -> tuple[int, list[torch.Tensor]]:
        module, sizes = make("pretrain_video"), []
        module.model.enable_gradient_checkpointing()
        module.model.recomputed_layers = layers
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            loss, _ = module(inputs_of(random_batch(), "pretrain_video"))
        loss.backward()
        return sum(sizes), [p.grad for p in module.model.parameters() if p.grad is not None]

    (most, first), (some, second), (least, third) = (step(layers) for layers in (0, 2, MODEL.layers))
    assert most > some > least
    for other in (second, third):
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
