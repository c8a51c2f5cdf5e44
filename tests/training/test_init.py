"""``model.init_from`` through training: what a run starts from, what its key digests, errors before it starts."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import LTXVideoTransformer3DModel
from safetensors.torch import load_file, save_file

from wav.errors import CheckpointError, ServiceError
from wav.model.loading import published_state
from wav.model.weights import WEIGHTS
from wav.training.inputs import initial_model, open_inputs
from wav.training.spec import TrainSpec

SIZES: dict[str, Any] = {
    "in_channels": 6,
    "out_channels": 6,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "cross_attention_dim": 24,
    "num_layers": 2,
    "caption_channels": 16,
}


@pytest.fixture
def stock(tmp_path: Path) -> Path:
    """A stock LTX-Video pipeline folder of the tiny model's sizes."""
    torch.manual_seed(5)
    LTXVideoTransformer3DModel(**SIZES).save_pretrained(tmp_path / "ltx" / "transformer")
    return tmp_path / "ltx"


def start_of(spec: TrainSpec) -> dict[str, torch.Tensor]:
    return published_state(initial_model(spec, open_inputs(spec)).state_dict())


def test_folder_and_file(spec_of, stock: Path, caplog: pytest.LogCaptureFixture) -> None:
    wanted = load_file(stock / "transformer" / WEIGHTS)
    with caplog.at_level(logging.INFO, "wav.training"):
        for source in (stock, stock / "transformer", stock / "transformer" / WEIGHTS):
            found = start_of(spec_of(model={"init_from": str(source)}))
            assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
            assert not found["view_embed"].any()
    assert f"started from {stock}" in caplog.text


def test_hub_id(spec_of, stock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(ServiceError, match=r"model.init_from = 'Lightricks/LTX-Video': .*`hf download Lightricks"):
        spec_of(model={"init_from": "Lightricks/LTX-Video"})
    repository = tmp_path / "hub" / "models--Lightricks--LTX-Video"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / ("a" * 40)).symlink_to(stock, target_is_directory=True)
    found = start_of(spec_of(model={"init_from": "Lightricks/LTX-Video"}))
    assert torch.equal(found["proj_in.weight"], load_file(stock / "transformer" / WEIGHTS)["proj_in.weight"])


def test_key_follows_the_weights_and_only_the_first_stage_reads_them(spec_of, stock: Path) -> None:
    spec = spec_of(model={"init_from": str(stock)})
    assert spec.inputs["init_from"] != spec_of().inputs.get("init_from")
    assert TrainSpec.from_json(spec.to_json()) == spec
    assert spec_of(model={"init_from": str(stock)}).key == spec.key
    state = load_file(stock / "transformer" / WEIGHTS)
    save_file({**state, "proj_in.bias": state["proj_in.bias"] + 1}, stock / "transformer" / WEIGHTS)
    assert spec_of(model={"init_from": str(stock)}).key != spec.key


def test_rewards_of_other_channels_than_the_first_stage_assumed_begin_the_value_expert_anew(
    spec_of, workspace: Path, tmp_path: Path
) -> None:
    spec = spec_of()
    first = initial_model(spec, open_inputs(spec))
    first.save_pretrained(tmp_path / "first" / "model")
    spec = replace(spec, stage="train_value", paths=replace(spec.paths, init=None, rewards=workspace / "rewards"))
    inputs = open_inputs(spec)
    spec = replace(spec, paths=replace(spec.paths, init=tmp_path / "first"))
    assert initial_model(spec, inputs).config.value_in_channels == 10
    assert inputs.rewards is not None
    inputs.rewards.values = np.zeros((1, 11), np.float32)
    found, old = initial_model(spec, inputs), first.state_dict()
    assert found.config.value_in_channels == 11
    kept = {name for name, tensor in found.state_dict().items() if torch.equal(tensor, old.get(name, tensor[:0]))}
    assert {name for name in old if not name.startswith("value")} <= kept


def test_weights_of_another_size_are_refused(spec_of, stock: Path) -> None:
    spec = spec_of(model={"init_from": str(stock), "heads": 3, "head_dim": 8})
    with pytest.raises(CheckpointError, match=r"attention_head_dim = 12, this model has 8"):
        start_of(spec)
    (stock / "transformer" / "config.json").unlink()
    spec = spec_of(model={"init_from": str(stock / "transformer"), "layers": 3})
    with pytest.raises(CheckpointError, match=r"missing \(transformer_blocks\.2\."):
        start_of(spec)


def test_a_run_trains_from_them(spec_of, start, stock: Path) -> None:
    train = {"steps": 1, "learning_rate": 1e-9, "warmup_steps": 0, "validation_share": 0.0}
    spec = spec_of(model={"init_from": str(stock)}, pretrain_video=train)
    process = start(spec)
    process.join(60)
    log = process.log.read_text()
    assert process.exitcode == 0, log
    assert f"started from {stock}" in log
    trained = load_file(spec.paths.output / "model" / WEIGHTS)
    for name, tensor in load_file(stock / "transformer" / WEIGHTS).items():
        torch.testing.assert_close(trained[name], tensor, atol=1e-7, rtol=0)
