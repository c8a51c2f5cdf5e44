"""Whole runs of the loop on a tiny workspace: three stages, kill -9 and exact resume, outputs and refusals."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from wav.io.storage import open_store
from wav.io.storage.commit import commits, verify
from wav.training.spec import TrainSpec

TIMING = ("time/",)


def finish(process: Any) -> str:
    process.join(300)
    return process.log.read_text()


def weights(spec: TrainSpec) -> dict[str, torch.Tensor]:
    return load_file(spec.paths.output / "model" / "diffusion_pytorch_model.safetensors")


def state_of(spec: TrainSpec, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
    folder = spec.work / "checkpoints" / f"step-{step:08d}"
    verify(folder)
    engine = torch.load(folder / "engine" / "mp_rank_00_model_states.pt", weights_only=False)
    return engine, torch.load(folder / "rank-00000.pt")


def assert_equal(a: Any, b: Any, where: str = "") -> None:
    """Bit equality of nested containers, wall-clock fields aside."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for name in a:
            if not str(name).startswith(("time/", "seconds", "waited")):
                assert_equal(a[name], b[name], f"{where}.{name}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b, strict=True)):
            assert_equal(*pair, f"{where}[{i}]")
    else:
        assert a == b, where


def wait_for(path: Path, process: Any, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert process.is_alive(), process.log.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_three_stages(spec_of, start) -> None:
    video = spec_of("pretrain_video")
    log = finish(start(video))
    assert "checkpoint of step 6" in log, log
    metrics = json.loads((video.paths.output / "metrics.json").read_text())
    assert metrics["steps"] == 6
    assert {"loss", "loss_video", "validation_loss", "samples_per_second", "data_wait_share", "grad_norm"} <= set(
        metrics
    )
    assert metrics["trainable_parameters"] < metrics["parameters"]
    curve = (video.paths.output / "plots" / "metrics" / "loss_video.tsv").read_text().splitlines()
    assert [line.split("\t")[0] for line in curve] == ["step", "2", "4", "6"]
    info = json.loads((video.paths.output / "checkpoint.json").read_text())
    store = open_store(video.store)
    assert commits(store, f"{video.prefix}/checkpoints") == [
        f"{video.prefix}/checkpoints/step-0000000{n}" for n in (3, 6)
    ]
    assert all(store.head(entry["key"]) for entry in info["objects"])

    value = spec_of("train_value", init=video.paths.output)
    log = finish(start(value))
    assert value.paths.output.is_dir(), log
    before, after = weights(video), weights(value)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.startswith("value_") for name in changed)

    joint = spec_of("train_joint", init=value.paths.output)
    log = finish(start(joint))
    metrics = json.loads((joint.paths.output / "metrics.json").read_text())
    assert {"loss_action", "loss_value", "loss_video"} <= set(metrics), log
    final = weights(joint)
    assert all(not torch.equal(after[name], final[name]) for name in after if not name.endswith("attn2.to_k.bias"))
    assert not list(joint.paths.output.parent.glob(".*"))


@pytest.mark.parametrize("stage", ["pretrain_video", "train_joint"])
def test_kill_and_resume_is_bit_equal(stage: str, spec_of, start) -> None:
    """2N steps equal N steps, kill -9, resume, N steps: weights, optimiser, average, random states, metrics."""
    init = None
    if stage == "train_joint":
        first = spec_of("pretrain_video", name="video")
        finish(start(first))
        init = first.paths.output
    whole, killed = spec_of(stage, init, "whole"), spec_of(stage, init, "killed")
    assert whole.key == killed.key
    finish(start(whole))
    process = start(killed)
    wait_for(killed.work / "checkpoints" / "step-00000003", process)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not killed.paths.output.exists()
    log = finish(start(killed))
    assert "resumed from the checkpoint of step" in log, log
    a, b = state_of(whole, 6), state_of(killed, 6)
    assert_equal(a[0]["module"], b[0]["module"], "module")
    assert_equal(a[0]["optimizer"], b[0]["optimizer"], "optimizer")
    assert_equal(a[1], b[1], "rank")
    assert_equal(weights(whole), weights(killed), "output")
    for curve in sorted((whole.paths.output / "plots").rglob("*.tsv")):
        other = killed.paths.output / curve.relative_to(whole.paths.output)
        if "time" not in curve.parts:
            assert curve.read_text() == other.read_text()


def test_sigterm_saves_and_the_store_is_enough_to_resume(spec_of, start) -> None:
    long = {"pretrain_video": {"steps": 400, "checkpoint_every": 50}}
    spec = spec_of(**long)
    process = start(spec)
    wait_for(spec.work / "checkpoints" / "step-00000050", process)
    process.terminate()
    log = finish(process)
    assert process.exitcode == 143, log
    saved = sorted((spec.work / "checkpoints").glob("step-*"))[-1].name
    assert f"interrupted at step {int(saved[5:])}" in log
    store = open_store(spec.store)
    uploaded = commits(store, f"{spec.prefix}/checkpoints")
    assert uploaded
    shutil.rmtree(spec.paths.cache)  # another machine
    process = start(spec)
    deadline = time.monotonic() + 60
    while "resumed from" not in process.log.read_text():
        assert process.is_alive(), process.log.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    assert f"resumed from the checkpoint of step {int(uploaded[-1][-8:])}" in finish(process)


def test_damaged_checkpoint_is_passed_over(spec_of, start) -> None:
    spec = spec_of()
    finish(start(spec))
    newest = spec.work / "checkpoints" / "step-00000006"
    (newest / "rank-00000.pt").write_bytes(b"damaged")
    shutil.rmtree(spec.paths.output)
    open_store(spec.store).put_bytes(f"{spec.prefix}/checkpoints/{newest.name}/rank-00000.pt", b"damaged too")
    log = finish(start(spec))
    assert log.count("checkpoint ignored") == 2
    assert "resumed from the checkpoint of step 3" in log
    assert spec.paths.output.is_dir()


def test_divergence_names_the_last_good_checkpoint(spec_of, start) -> None:
    spec = spec_of(pretrain_video={"learning_rate": 1e30, "clip": 1e30, "warmup_steps": 0, "checkpoint_every": 1})
    process = start(spec)
    log = finish(process)
    assert process.exitcode == 1
    error = log.splitlines()[-1]
    assert error.startswith("ERROR: pretrain_video.learning_rate = 1e+30")
    assert "diverged" in error
    assert "step-0000000" in error or "none yet" in error
    assert not spec.paths.output.exists()


def test_model_without_value_expert(spec_of, start) -> None:
    model = {"model": {"value_expert": False}}
    video = spec_of("pretrain_video", **model)
    finish(start(video))
    value = spec_of("train_value", init=video.paths.output, **model)
    log = finish(start(value))
    assert "nothing to train" in log
    assert_equal(weights(video), weights(value))
    assert json.loads((value.paths.output / "metrics.json").read_text())["trainable_parameters"] == 0
    joint = spec_of("train_joint", init=value.paths.output, **model)
    log = finish(start(joint))
    metrics = json.loads((joint.paths.output / "metrics.json").read_text())
    assert "loss_value" not in metrics, log
    assert {"loss_action", "loss_video"} <= set(metrics)
    for spec, name in ((video, "video"), (value, "value"), (joint, "joint")):
        stage = yaml.safe_load((Path(__file__).parents[2] / "dvc.yaml").read_text())["stages"][spec.stage]
        declared = [next(iter(entry)) for entry in (*stage["outs"], *stage["metrics"])]
        wanted = {path.split("/")[2] for path in declared if path.startswith(f"models/{name}/")}
        assert {path.name for path in spec.paths.output.iterdir()} == wanted


def test_bf16_zero_and_accumulation(spec_of, start) -> None:
    spec = spec_of(pretrain_video={"precision": "bf16", "zero_stage": 2, "micro_batch_size": 2})
    log = finish(start(spec))
    metrics = json.loads((spec.paths.output / "metrics.json").read_text())
    assert metrics["grad_norm"] > 0, log
    assert all(tensor.dtype == torch.float32 for tensor in weights(spec).values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"statistics": {"episodes": "0" * 64}}, "statistics.episodes = '000000000000"),
        ({"latents": "f" * 64}, "latents = 'ffffffffffff"),
    ],
)
def test_other_data_are_refused(change: dict[str, Any], message: str, spec_of, start) -> None:
    video = spec_of("pretrain_video", pretrain_video={"steps": 1})
    finish(start(video))
    path = video.paths.output / "checkpoint.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    value = spec_of("train_value", init=video.paths.output)
    process = start(value)
    log = finish(process)
    assert process.exitcode == 1
    assert message in log.splitlines()[-1]
    assert log.splitlines()[-1].startswith("ERROR: ")
    assert not value.paths.output.exists()


def test_store_that_is_down_is_named_before_training(spec_of, start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "y")
    spec = replace(spec_of(), store="s3://wav", endpoint="http://127.0.0.1:9")
    process = start(spec)
    log = finish(process)
    assert process.exitcode == 1
    assert "make up" in log.splitlines()[-1]


def test_s3_objects_are_recorded_with_their_versions(spec_of, start, s3_server) -> None:
    spec = replace(spec_of(), store=f"s3://{s3_server.bucket}/loop", endpoint=s3_server.endpoint)
    log = finish(start(spec))
    assert spec.paths.output.is_dir(), log
    info = json.loads((spec.paths.output / "checkpoint.json").read_text())
    store = open_store(spec.store, spec.endpoint)
    assert info["objects"], log
    for entry in info["objects"]:
        assert entry["version"]
        assert store.get_bytes(entry["key"], entry["version"])
    assert len(commits(store, f"{spec.prefix}/checkpoints")) == 2
    assert s3_server.secret_key not in log + spec.to_json() + json.dumps(info)


def test_old_runs_make_room(spec_of, start) -> None:
    for rate in (0.1, 0.2, 0.3):
        spec = spec_of(pretrain_video={"learning_rate": rate, "steps": 1})
        log = finish(start(spec))
    assert "resumed" not in log
    assert len(list((spec.paths.cache / spec.stage).iterdir())) == 2
