"""The transformer's own promises: names, sharing of rows, row independence, checkpointing, configuration, errors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.model.conftest import A, B, F, H, Inputs, V, W, small
from wav.errors import ConfigError
from wav.model import WAVTransformer
from wav.model.layers import Attention


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of everything keys and values were computed from."""
    shapes: list[tuple[int, ...]] = []
    original = Attention.keys_values

    def spy(self: Attention, context: torch.Tensor) -> object:
        shapes.append(tuple(context.shape))
        return original(self, context)

    monkeypatch.setattr(Attention, "keys_values", spy)
    return shapes


def test_full_size_has_the_published_parameter_counts() -> None:
    with torch.device("meta"):
        full = WAVTransformer()
    counts = {"video": 0, "value": 0, "action": 0}
    for name, parameter in full.named_parameters():
        counts[name.split(".")[0]] += parameter.numel()
    assert counts == {"video": 1_948_569_728, "value": 163_792_394, "action": 193_243_663}


def test_names_of_one_block() -> None:
    names = {n.removeprefix("action.blocks.1.") for n in small().state_dict() if n.startswith("action.blocks.1.")}
    attention = {f"{p}.{k}" for p in ("to_q", "to_k", "to_v", "to_out.0") for k in ("weight", "bias")}
    attention |= {"norm_q.weight", "norm_k.weight"}
    expected = {f"attn{i}.{name}" for i in (1, 2, 3) for name in attention} | {"scale_shift_table"}
    assert names == expected | {f"ff.net.{i}.{k}" for i in ("0.proj", "2") for k in ("weight", "bias")}


def test_without_value_expert(inputs: Inputs) -> None:
    model = small(value_expert=False)
    assert not model.has_value
    assert not [n for n in model.state_dict() if n.startswith("value.") or ".attn3." in n]
    features = model.video(inputs.latents, inputs.timestep, inputs.text).features
    assert model.action(inputs.action, inputs.expert_timestep, features).shape == inputs.action.shape
    with pytest.raises(ConfigError, match="value_expert"):
        model(inputs.latents, inputs.timestep, inputs.text, None, inputs.value, inputs.expert_timestep)


@torch.no_grad()
def test_candidates_share_their_samples_text(
    model: WAVTransformer, inputs: Inputs, captured: list[tuple[int, ...]]
) -> None:
    candidates = 3
    other = torch.randn(B, candidates, *inputs.latents.shape[1:])
    timestep = inputs.timestep.repeat_interleave(candidates, 0)
    out = model.video(other.flatten(0, 1), timestep, inputs.text, inputs.text_mask)
    assert captured == [(B, 4, 16)] * len(model.video.transformer_blocks)
    alone = model.video(other[:, 1], inputs.timestep, inputs.text, inputs.text_mask)
    torch.testing.assert_close(out.velocity.unflatten(0, (B, candidates))[:, 1], alone.velocity, atol=2e-6, rtol=1e-5)


@torch.no_grad()
def test_draws_share_keys_and_values_and_equal_single_passes(
    model: WAVTransformer, inputs: Inputs, captured: list[tuple[int, ...]]
) -> None:
    draws = 3
    features = model.video(inputs.latents, inputs.timestep, inputs.text).features
    captured.clear()
    values, actions = torch.randn(B, draws, A, 10), torch.randn(B, draws, A, 15)
    levels = torch.rand(B, draws) * 1000
    out = model.value(values, levels, features)
    assert captured == [(B, V * F * H * W, 16)] * 4
    assert out.features[-1].shape == (B, draws, A, 12)
    shared = model.value(values[:, 0], levels[:, 0], features).features
    chunk = model.action(actions, levels, features, shared, inputs.history)
    for r in range(draws):
        single = model.value(values[:, r], levels[:, r], features)
        torch.testing.assert_close(out.velocity[:, r], single.velocity, atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(out.features[-1][:, r], single.features[-1], atol=4e-6, rtol=1e-5)
        alone = model.action(actions[:, r], levels[:, r], features, shared, inputs.history)
        torch.testing.assert_close(chunk[:, r], alone, atol=2e-6, rtol=1e-5)


@torch.no_grad()
def test_a_cache_is_computed_once_for_all_steps(
    model: WAVTransformer, inputs: Inputs, captured: list[tuple[int, ...]]
) -> None:
    features = model.video(inputs.latents, inputs.timestep, inputs.text).features
    values = model.value(inputs.value, inputs.expert_timestep, features).features
    captured.clear()
    value_cache, action_cache = model.value.cache(features), model.action.cache(features, values)
    assert len(captured) == 4 + 8
    for _ in range(3):
        model.value(inputs.value, inputs.expert_timestep, value_cache)
        model.action(inputs.action, inputs.expert_timestep, action_cache, history=inputs.history)
    assert len(captured) == 4 + 8


def test_time_is_embedded_per_frame_not_per_token(model: WAVTransformer, inputs: Inputs) -> None:
    rows: list[int] = []
    handle = model.video.time_embed.register_forward_hook(lambda _, args, __: rows.append(args[0].numel()))
    model.video(inputs.latents, inputs.timestep, inputs.text)
    handle.remove()
    assert rows == [B * F]


@torch.no_grad()
def test_rows_do_not_leak_but_views_of_a_sample_do(model: WAVTransformer, inputs: Inputs) -> None:
    base = model.video(inputs.latents, inputs.timestep, inputs.text).velocity
    changed = inputs.latents.clone()
    changed[0, 0] += 1
    moved = (model.video(changed, inputs.timestep, inputs.text).velocity - base).abs().flatten(2).amax(-1)
    assert moved[1].max() == 0
    assert moved[0].min() > 1e-4


@torch.no_grad()
def test_views_join_in_every_third_layer_only(model: WAVTransformer, inputs: Inputs) -> None:
    assert [block.joint for block in model.video.transformer_blocks] == [True, False, False, True]
    for block in model.video.transformer_blocks:
        block.joint = False
    try:
        base = model.video(inputs.latents, inputs.timestep, inputs.text).velocity
        changed = inputs.latents.clone()
        changed[0, 0] += 1
        moved = model.video(changed, inputs.timestep, inputs.text).velocity - base
    finally:
        for i, block in enumerate(model.video.transformer_blocks):
            block.joint = i % 3 == 0
    assert moved[0, 1].abs().max() == 0


@torch.no_grad()
def test_masked_text_does_not_matter(model: WAVTransformer, inputs: Inputs) -> None:
    base = model.video(inputs.latents, inputs.timestep, inputs.text, inputs.text_mask).velocity
    changed = torch.where(inputs.text_mask[..., None], inputs.text, inputs.text + 5)
    assert torch.equal(model.video(inputs.latents, inputs.timestep, changed, inputs.text_mask).velocity, base)
    assert not torch.equal(model.video(inputs.latents, inputs.timestep, changed).velocity, base)


def _everything(model: WAVTransformer, inputs: Inputs, **changes: object) -> tuple[torch.Tensor, ...]:
    arguments = {
        "value_tokens": inputs.value,
        "value_timestep": inputs.expert_timestep,
        "action_tokens": torch.stack([inputs.action, -inputs.action], 1),
        "action_timestep": torch.tensor([[5.0, 500.0], [50.0, 950.0]]),
        "history": inputs.history,
        **changes,
    }
    return model(inputs.latents, inputs.timestep, inputs.text, inputs.text_mask, **arguments)


def _gradients(model: WAVTransformer, outputs: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    sum(out.square().sum() for out in outputs if out is not None).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_gradient_checkpointing_changes_nothing(inputs: Inputs) -> None:
    model = small()
    plain = _gradients(model, _everything(model, inputs))
    model.enable_gradient_checkpointing()
    assert model.is_gradient_checkpointing
    recomputed = _gradients(model, _everything(model, inputs))
    assert plain.keys() == recomputed.keys() == {name for name, _ in model.named_parameters()}
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, msg=name)


def test_gradients_of_draws_add_up(inputs: Inputs) -> None:
    model = small()
    tokens = torch.randn(B, 2, A, 10)
    levels = torch.tensor([[100.0, 800.0], [300.0, 30.0]])

    def loss(t: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        features = model.video(inputs.latents, inputs.timestep, inputs.text).features
        return model.value(t, s, features).velocity.square().sum()

    model.zero_grad()
    loss(tokens, levels).backward()
    together = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for r in range(2):
        loss(tokens[:, r], levels[:, r]).backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(together[name], parameter.grad, atol=2e-4, rtol=1e-3, msg=name)


def test_save_and_load_round_trip(model: WAVTransformer, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    again = WAVTransformer.from_pretrained(tmp_path)
    plain = {k: v for k, v in model.config.items() if not k.startswith("_")}
    for name, value in plain.items():
        other = again.config[name]
        assert (list(other) if isinstance(other, list | tuple) else other) == (
            list(value) if isinstance(value, list | tuple) else value
        ), name
    state = again.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def test_build_is_a_function_of_the_seed(model: WAVTransformer) -> None:
    before = torch.get_rng_state()
    again = small()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize(
    ("option", "value"), [("patch_size", 2), ("qk_norm", "layer_norm"), ("cross_attention_dim", 100)]
)
def test_fixed_options_are_refused(option: str, value: object) -> None:
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "cross_attention_dim": 16, "num_layers": 1}
    with pytest.raises(ConfigError, match=option):
        WAVTransformer(**{**sizes, option: value})


def test_too_many_views(model: WAVTransformer, inputs: Inputs) -> None:
    with pytest.raises(ConfigError, match="views = 4"):
        model.video(inputs.latents.repeat(1, 2, 1, 1, 1, 1), inputs.timestep, inputs.text)


@torch.no_grad()
def test_bfloat16_runs_and_stays_close(inputs: Inputs) -> None:
    model = small()
    exact = _everything(model, inputs)
    rough = _everything(model.to(torch.bfloat16), inputs)
    for a, b in zip(exact, rough, strict=True):
        assert b.dtype == torch.bfloat16
        assert (a - b.float()).abs().mean() < 0.05 * a.abs().mean() + 0.02


@pytest.mark.integration
def test_the_model_imports_no_other_room() -> None:
    code = (
        "import sys, wav.model, wav.flow_matching; "
        "bad = {'wav.data', 'wav.sim', 'wav.io.storage', 'wav.training', 'prefect', 'boto3', 'mujoco', 'deepspeed'}; "
        "sys.exit(str(sorted(bad & set(sys.modules))) if bad & set(sys.modules) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
