"""Strict loading: every mismatch is named, nothing is filled in silently, stock LTX weights behave as stock."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import LTXVideoTransformer3DModel
from safetensors.torch import load_file, save_file

from tests.model.conftest import B, F, H, Inputs, V, W, small
from wav.errors import CheckpointError, ServiceError
from wav.model import WAVTransformer
from wav.model.loading import init_from, load_model, load_state, module_name, published_name, published_state
from wav.model.video import pack
from wav.model.weights import WEIGHTS, locate, read_weights, weights_digest


def published(model: WAVTransformer) -> dict[str, torch.Tensor]:
    return published_state(model.state_dict())


def test_names_on_disk_and_in_the_model_undo_each_other(model: WAVTransformer) -> None:
    assert published_name("video.transformer_blocks.0.attn1.to_q.weight") == "transformer_blocks.0.attn1.to_q.weight"
    assert published_name("value.blocks.0.scale_shift_table") == "value_blocks.0.scale_shift_table"
    assert [module_name(published_name(name)) for name in model.state_dict()] == list(model.state_dict())


@pytest.fixture
def folder(model: WAVTransformer, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_load_model_is_exact(model: WAVTransformer, folder: Path, inputs: Inputs) -> None:
    again = load_model(folder)
    assert not again.training
    with torch.no_grad():
        expected = model.video(inputs.latents, inputs.timestep, inputs.text).velocity
        assert torch.equal(again.video(inputs.latents, inputs.timestep, inputs.text).velocity, expected)
    again.train()
    again.video(inputs.latents, inputs.timestep, inputs.text).velocity.sum().backward()
    assert again.video.proj_in.weight.grad is not None


def test_shards_are_read_whole(model: WAVTransformer, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert read_weights(tmp_path).keys() == published(model).keys()
    next(iter(tmp_path.glob("*.safetensors"))).unlink()
    with pytest.raises(CheckpointError, match="no such weights"):
        load_model(tmp_path)


def test_mismatches_are_named_and_change_nothing(model: WAVTransformer) -> None:
    target = small()
    before = {name: tensor.clone() for name, tensor in published(target).items()}
    state = {name: tensor + 1 for name, tensor in published(model).items()}
    del state["proj_in.weight"]
    state["surplus"] = torch.zeros(1)
    state["proj_out.bias"] = torch.zeros(99)
    with pytest.raises(
        CheckpointError, match=r"1 missing \(proj_in.weight\).*surplus.*proj_out.bias \(99,\) for \(6,\)"
    ):
        load_state(target, state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in published(target).items())


def test_expected_mismatches_are_reported(model: WAVTransformer) -> None:
    state = dict(published(model))
    del state["view_embed"]
    state["surplus.bias"] = torch.zeros(1)
    report = load_state(small(), state, expected_missing=["view_embed"], expected_extra=[r"surplus\."])
    assert report.missing == ("view_embed",)
    assert report.extra == ("surplus.bias",)
    assert len(report.loaded) == len(published(model)) - 1


def test_another_class_unknown_options_and_bad_files(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "novelty": 1}))
    with pytest.raises(CheckpointError, match="novelty: unknown"):
        load_model(folder)
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "norm_eps"}))
    with pytest.raises(CheckpointError, match="norm_eps: missing"):
        load_model(folder)
    (folder / "config.json").write_text(json.dumps({**config, "_class_name": "Other"}))
    with pytest.raises(CheckpointError, match="'Other'"):
        load_model(folder)
    with pytest.raises(CheckpointError, match="'Other'"):
        init_from(small(), folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        load_model(folder)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="not readable"):
        load_model(folder)
    with pytest.raises(CheckpointError, match="no such file"):
        init_from(small(), folder / "nowhere")


def test_init_refuses_another_number_of_heads(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="attention_head_dim = 8, this model has 4"):
        init_from(small(heads=4, head_dim=4), folder)


def test_init_from_a_model_without_value_expert(tmp_path: Path) -> None:
    baseline = small(value_expert=False)
    baseline.save_pretrained(tmp_path)
    report = init_from(small(), tmp_path)
    assert report.missing
    assert all(name.startswith("value_") or ".attn3." in name for name in report.missing)
    assert not report.extra


def test_a_missing_ordinary_weight_is_refused_at_init(folder: Path) -> None:
    state = load_file(folder / WEIGHTS)
    del state["proj_out.weight"]
    save_file(state, folder / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"proj_out\.weight"):
        init_from(small(), folder)


def test_stock_ltx_weights_compute_what_stock_computes(inputs: Inputs, tmp_path: Path) -> None:
    target = small()
    sizes = ("in_channels", "out_channels", "num_attention_heads", "attention_head_dim", "num_layers")
    sizes += ("cross_attention_dim", "caption_channels")
    torch.manual_seed(0)
    stock = LTXVideoTransformer3DModel(**{name: target.config[name] for name in sizes}).eval()
    stock.save_pretrained(tmp_path / "transformer")
    report = init_from(target, tmp_path)
    assert {n for n in report.missing if not n.startswith(("value_", "action_"))} == {
        "view_embed",
        "view_ada.1.weight",
        "view_ada.1.bias",
    }
    assert target.video.view_embed.abs().max() == 0
    for block in target.video.transformer_blocks:  # stock knows one view: compare view by view
        block.joint = False
    with torch.no_grad():
        got = target.video(inputs.latents, inputs.timestep, inputs.text, inputs.text_mask).velocity
        tokens = pack(inputs.latents).flatten(0, 1).flatten(1, 2)
        expected = stock(
            hidden_states=tokens,
            encoder_hidden_states=inputs.text.repeat_interleave(V, 0),
            timestep=inputs.timestep.repeat_interleave(H * W, 1).repeat_interleave(V, 0),
            encoder_attention_mask=inputs.text_mask.repeat_interleave(V, 0),
            num_frames=F,
            height=H,
            width=W,
            rope_interpolation_scale=tuple(target.config.rope_interpolation_scale),
            return_dict=False,
        )[0]
    torch.testing.assert_close(pack(got).reshape(B * V, F * H * W, -1), expected, atol=5e-6, rtol=1e-5)


def stock_model() -> LTXVideoTransformer3DModel:
    """Diffusers' own LTX-Video of the small model's sizes."""
    sizes = ("in_channels", "out_channels", "num_attention_heads", "attention_head_dim", "num_layers")
    config = small().config
    torch.manual_seed(1)
    return LTXVideoTransformer3DModel(
        **{name: config[name] for name in (*sizes, "cross_attention_dim", "caption_channels")}
    ).eval()


def stock_velocity(stock: LTXVideoTransformer3DModel, inputs: Inputs) -> torch.Tensor:
    """Tokens (B, F * H * W, C) of the first view alone, computed by diffusers."""
    with torch.no_grad():
        tokens: torch.Tensor = stock(
            hidden_states=pack(inputs.latents[:, :1]).flatten(0, 1).flatten(1, 2),
            encoder_hidden_states=inputs.text,
            timestep=inputs.timestep.repeat_interleave(H * W, 1),
            encoder_attention_mask=inputs.text_mask,
            num_frames=F,
            height=H,
            width=W,
            rope_interpolation_scale=tuple(small().config.rope_interpolation_scale),
            return_dict=False,
        )[0]
    return tokens


@pytest.mark.parametrize("layout", ["one file", "shards", "shards without index", "pipeline", "file alone"])
def test_ltx_video_in_every_layout_computes_what_stock_computes(layout: str, inputs: Inputs, tmp_path: Path) -> None:
    stock, target = stock_model(), small()
    folder = tmp_path / "transformer" if layout == "pipeline" else tmp_path
    stock.save_pretrained(folder, max_shard_size="20KB" if "shards" in layout else "1GB")
    if layout == "shards without index":
        next(folder.glob("*.index.json")).unlink()
    if layout == "pipeline":
        (tmp_path / "ltx-video-2b-v0.9.safetensors").write_bytes(b"the original release lies beside it on the hub")
    source = tmp_path / WEIGHTS if layout == "file alone" else tmp_path
    report = init_from(target, source)
    assert len(report.loaded) == len(stock.state_dict())
    assert not target.video.view_embed.any()
    assert not any(p.any() for p in target.video.view_ada.parameters())
    with torch.no_grad():
        got = target.video(inputs.latents[:, :1], inputs.timestep, inputs.text, inputs.text_mask).velocity
    torch.testing.assert_close(pack(got).reshape(B, F * H * W, -1), stock_velocity(stock, inputs), atol=5e-6, rtol=1e-5)


def test_a_missing_shard_or_tensor_is_named(tmp_path: Path) -> None:
    stock_model().save_pretrained(tmp_path, max_shard_size="20KB")
    index = next(tmp_path.glob("*.index.json"))
    raw = json.loads(index.read_text())
    index.write_text(
        json.dumps({**raw, "weight_map": {**raw["weight_map"], "lost.weight": min(raw["weight_map"].values())}})
    )
    with pytest.raises(CheckpointError, match=r"00001-of-\d+.safetensors: lacks lost.weight, which the index promises"):
        init_from(small(), tmp_path)
    index.unlink()
    shard = sorted(tmp_path.glob("*.safetensors"))[-1]
    content = shard.read_bytes()
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"{shard.name}: no such weights"):
        init_from(small(), tmp_path)
    shard.write_bytes(content)
    tensors = load_file(shard)
    save_file({**tensors, "proj_in.bias": torch.zeros(16)}, shard)
    with pytest.raises(CheckpointError, match=r"proj_in\.bias is in another shard too"):
        init_from(small(), tmp_path)


def video_weights(model: WAVTransformer) -> dict[str, torch.Tensor]:
    return {n: t for n, t in published(model).items() if not n.startswith(("value_", "action_"))}


def test_ge_base_is_one_file_without_configuration(model: WAVTransformer, inputs: Inputs, tmp_path: Path) -> None:
    save_file({n: t.bfloat16() for n, t in video_weights(model).items()}, tmp_path / "GE_base_fast.safetensors")
    for source in (tmp_path, tmp_path / "GE_base_fast.safetensors"):
        target = small(layers=4)
        before = target.value.proj_in.weight.clone()
        report = init_from(target, source)
        assert set(report.loaded) == set(video_weights(model))
        assert all(name.startswith(("value_", "action_")) for name in report.missing)
        assert torch.equal(target.video.view_embed, model.video.view_embed.bfloat16().float())
        assert torch.equal(target.value.proj_in.weight, before)
    save_file({"a": torch.zeros(1)}, tmp_path / "GE_sim.safetensors")
    with pytest.raises(CheckpointError, match=r"GE_base_fast.safetensors, GE_sim.safetensors; name one"):
        init_from(small(), tmp_path)


STAGES = {"video": {}, "value": {"value_expert": True}, "action": {"value_expert": True, "action_expert": True}}


@pytest.mark.parametrize("stage", STAGES)
def test_reference_checkpoints_of_every_stage(stage: str, tmp_path: Path) -> None:
    """The reference's own class bears the stock class's name and leaves the experts' sizes out of its config.json."""
    source = small()
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(0.1)
    experts = [name.removesuffix("_expert") for name in STAGES[stage]]
    names = [n for n in published(source) if n.split("_")[0] not in {"value", "action"} - set(experts)]
    options = dict(stock_model().config)
    config = {n: v for n, v in options.items() if not n.startswith("_")}
    config |= {"_class_name": "LTXVideoTransformer3DModel", "_diffusers_version": "0.32.0"}
    config |= {"use_view_embed": True, "max_view": 3, "action_expert": False, "value_expert": False} | STAGES[stage]
    folder = tmp_path / "step_30000"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: published(source)[name].contiguous() for name in names}, folder / WEIGHTS)
    for where in (folder, folder / WEIGHTS):
        target = small()
        before = {name: tensor.clone() for name, tensor in published(target).items()}
        report = init_from(target, where)
        assert set(report.loaded) == set(names)
        assert not report.extra
        for name, tensor in published(target).items():
            assert torch.equal(tensor, published(source)[name] if name in names else before[name]), name
    with pytest.raises(CheckpointError, match=r"num_attention_heads = 2, this model has 4"):
        init_from(small(heads=4, head_dim=4), folder / WEIGHTS)


def test_half_an_expert_is_refused(model: WAVTransformer, tmp_path: Path) -> None:
    for lost in ("value_proj_out.bias", "action_blocks.2.attn3.to_q.weight", "view_ada.1.bias"):
        state = {name: tensor for name, tensor in published(model).items() if name != lost}
        save_file(state, tmp_path / "half.safetensors")
        with pytest.raises(CheckpointError, match=rf"half.safetensors: parameters 1 missing \({lost}\)"):
            init_from(small(), tmp_path)
        report = init_from(small(), tmp_path, expected_missing=[lost])
        assert report.missing == (lost,)


def test_what_this_model_cannot_hold_is_said(
    model: WAVTransformer, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    report = init_from(small(value_expert=False), folder)
    assert report.extra
    assert all(name.startswith("value_") or ".attn3." in name for name in report.extra)
    assert f"{len(report.extra)} unused" in caplog.text
    save_file({**published(model), "action_state": torch.zeros(1, 1, 15)}, tmp_path / "act.safetensors")
    with pytest.raises(CheckpointError, match=r"1 unexpected \(action_state\)"):
        init_from(small(), tmp_path / "act.safetensors")
    assert init_from(small(), tmp_path / "act.safetensors", expected_extra=["action_state"]).extra == ("action_state",)
    save_file({f"model.diffusion_model.{n}": t for n, t in published(model).items()}, tmp_path / "ltx.safetensors")
    with pytest.raises(CheckpointError, match=r"original release.*transformer/"):
        init_from(small(), tmp_path / "ltx.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "novelty": 1}))
    with pytest.raises(CheckpointError, match="novelty = 1: this model has no such option"):
        init_from(small(), folder)


def test_our_own_outputs(model: WAVTransformer, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "models" / "joint" / "model")
    report = init_from(small(), tmp_path / "models" / "joint")
    assert not report.missing
    assert not report.extra
    digest = weights_digest(tmp_path / "models" / "joint")
    assert digest == weights_digest(tmp_path / "models" / "joint" / "model")
    small(layers=3).save_pretrained(tmp_path / "models" / "joint" / "model")
    assert weights_digest(tmp_path / "models" / "joint") != digest


def test_paths_that_hold_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"empty/config.json: no such file, nor weights"):
        locate(tmp_path / "empty")
    (tmp_path / "weights.bin").touch()
    with pytest.raises(CheckpointError, match=r"must be a \.safetensors file"):
        locate(tmp_path / "weights.bin")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty local hub cache, as huggingface_hub lays it out."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def cached(hub: Path, name: str) -> Path:
    """Snapshot folder of a cached repository."""
    repository, commit = hub / f"models--{name.replace('/', '--')}", "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    return snapshot


def test_hub_ids_come_from_the_local_cache(hub: Path, model: WAVTransformer) -> None:
    stock_model().save_pretrained(cached(hub, "Lightricks/LTX-Video") / "transformer")
    assert init_from(small(), "Lightricks/LTX-Video").loaded
    snapshot = cached(hub, "agibot-world/Genie-Envisioner")
    for name in ("GE_base_fast_v0.1", "GE_base_slow_v0.1"):
        save_file(video_weights(model), snapshot / f"{name}.safetensors")
    assert init_from(small(), "agibot-world/Genie-Envisioner/GE_base_fast_v0.1.safetensors").loaded
    with pytest.raises(CheckpointError, match=r"holds GE_base_fast_v0.1.safetensors, .*; name one of these files"):
        init_from(small(), "agibot-world/Genie-Envisioner")


def test_offline_the_error_holds_the_command(hub: Path) -> None:
    with pytest.raises(ServiceError, match=r'`hf download Lightricks/LTX-Video --include "transformer/\*"`'):
        init_from(small(), "Lightricks/LTX-Video")
    (cached(hub, "Lightricks/LTX-Video") / "vae").mkdir()  # fetched, but another part of it
    with pytest.raises(ServiceError, match=r'without it; .*`hf download Lightricks/LTX-Video --include "trans'):
        init_from(small(), "Lightricks/LTX-Video")
    with pytest.raises(ServiceError, match=r'`hf download owner/name --include "step/base.safetensors"`'):
        init_from(small(), "owner/name/step/base.safetensors")
