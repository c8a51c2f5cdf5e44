"""Strict loading: every mismatch is named, nothing is filled in silently, stock LTX weights behave as stock."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import LTXVideoTransformer3DModel
from safetensors.torch import load_file, save_file

from tests.model.conftest import B, F, H, Inputs, V, W, small
from wav.errors import CheckpointError
from wav.model import WAVTransformer
from wav.model.pretrained import WEIGHTS, init_from, load_model, load_state, read_weights
from wav.model.video import pack


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
    assert again.proj_in.weight.grad is not None


def test_shards_are_read_whole(model: WAVTransformer, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert read_weights(tmp_path).keys() == model.state_dict().keys()
    next(iter(tmp_path.glob("*.safetensors"))).unlink()
    with pytest.raises(CheckpointError, match="no such weights"):
        load_model(tmp_path)


def test_mismatches_are_named_and_change_nothing(model: WAVTransformer) -> None:
    target = small()
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    state = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    del state["proj_in.weight"]
    state["surplus"] = torch.zeros(1)
    state["proj_out.bias"] = torch.zeros(99)
    with pytest.raises(
        CheckpointError, match=r"1 missing \(proj_in.weight\).*surplus.*proj_out.bias \(99,\) for \(6,\)"
    ):
        load_state(target, state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in target.state_dict().items())


def test_expected_mismatches_are_reported(model: WAVTransformer) -> None:
    state = dict(model.state_dict())
    del state["view_embed"]
    state["surplus.bias"] = torch.zeros(1)
    report = load_state(small(), state, expected_missing=["view_embed"], expected_extra=[r"surplus\."])
    assert report.missing == ("view_embed",)
    assert report.extra == ("surplus.bias",)
    assert len(report.loaded) == len(model.state_dict()) - 1


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
    assert target.view_embed.abs().max() == 0
    for block in target.transformer_blocks:  # stock knows one view: compare view by view
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
