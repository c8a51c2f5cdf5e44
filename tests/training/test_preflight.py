"""Room before a run, a stop at a loss spike, the numbers of speed."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tests.training.conftest import settings
from tests.training.test_loop import finish
from wav.data.latents import LatentStore
from wav.data.reward_store import RewardStore
from wav.data.store import EpisodeStore
from wav.errors import StorageError, TrainingError, WavError
from wav.io.files import write_json
from wav.io.storage.commit import commits
from wav.training.activations import activation_bytes
from wav.training.engine import World
from wav.training.inputs import initial_model, open_inputs
from wav.training.objectives import build_objective
from wav.training.output import model_digest
from wav.training.preflight import (
    layers_to_recompute,
    preflight,
    recorded_bytes,
    sizes_of,
    state_bytes,
    verify_inputs,
)
from wav.training.record import Recorder
from wav.training.throughput import peak_operations
from wav.training.universal import Layout

ONE = Layout(1, 0, "fp32")
CPU = torch.device("cpu")


def test_spike(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, enabled=False)
    recorder.restore([(step, {"loss": 1.0 + step / 100}) for step in range(4)])
    assert recorder.usual_loss() is None
    assert not recorder.is_spike(1e9, 10.0)
    recorder.restore([(4, {"loss": 1.04}), (5, {"loss": 1.05}), (6, {"validation/loss": 99.0})])
    assert recorder.usual_loss() == pytest.approx(1.025)
    assert recorder.is_spike(11.0, 10.0)
    assert not recorder.is_spike(10.0, 10.0)
    assert not recorder.is_spike(1e9, 0.0)


def test_memory_is_cut_as_zero_cuts_it() -> None:
    assert state_bytes(1000, 800, ONE) == 4000 + 3200 + 6400 + 3200
    assert state_bytes(1000, 800, Layout(4, 1, "fp32")) == 4000 + 3200 + 1600 + 800
    assert state_bytes(1000, 800, Layout(4, 2, "bf16")) == 2000 + 400 + 2400 + 800
    assert state_bytes(1000, 800, Layout(4, 3, "bf16")) == 500 + 400 + 2400 + 800


def test_memory_of_recorded_passes_is_not_the_optimisers() -> None:
    def beside(ranks: int, zero: int, precision: str) -> int:
        changes = {"zero_stage": zero, "precision": precision}
        return recorded_bytes(800, ranks, settings().train_joint.model_copy(update=changes))

    assert beside(1, 0, "fp32") == 0
    assert beside(1, 2, "bf16") == 1600 + 3200  # gradients in a row, then in float32
    assert beside(1, 1, "fp32") == 3200
    assert beside(4, 2, "bf16") == 1200 + 400 + 800  # and those that other ranks update


def test_auto_recomputes_only_what_memory_asks_for(spec_of, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_of()
    inputs = open_inputs(spec)
    model, world = initial_model(spec, inputs), World(0, 1, CPU)
    needed = activation_bytes(sizes_of(spec, inputs, model), spec.train, 4)
    objective = build_objective(spec.train, model, spec.data.memory_frames, spec.data.action_dim)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    state = state_bytes(sum(p.numel() for p in model.parameters()), trained, ONE)
    memory = namedtuple("memory", "available")

    def layers(free: float) -> int:
        monkeypatch.setattr("wav.training.preflight.psutil.virtual_memory", lambda: memory(int(free / 0.9) + 1))
        return layers_to_recompute(spec, inputs, objective, 4, world)[0]

    assert layers(state + 2 * needed) == 0
    assert layers(state + 0.95 * needed) == 1
    assert layers(state) == spec.model.layers == 2
    _, said = layers_to_recompute(spec, inputs, objective, 4, world)
    assert re.match(r"2 of 2 layers are recomputed: 0\.0 GiB free, about .* for 4 samples' activations", said)


def test_preflight(spec_of, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, module = spec_of(), nn.Linear(1000, 1000)
    spec.work.mkdir(parents=True)
    preflight(spec, module, ONE, CPU, 24)
    memory = namedtuple("memory", "available")
    monkeypatch.setattr("wav.training.preflight.psutil.virtual_memory", lambda: memory(20_000_000))
    with pytest.raises(TrainingError, match=r"pretrain_video: 1 million parameters.*smaller model"):
        preflight(spec, module, ONE, CPU, 24)
    asked: list[int] = []

    def full(path: Path, needed: int) -> None:
        asked.append(needed)
        raise StorageError("disk")

    monkeypatch.setattr("wav.training.preflight.require_free_space", full)
    with pytest.raises(StorageError):
        preflight(spec, module, ONE, CPU, 24)
    trained = 1_001_000
    assert asked == [3 * trained * 24 + 8 * trained]  # two checkpoints kept, a third while it is written; weights twice


def test_peak_is_known_for_some_gpus(monkeypatch: pytest.MonkeyPatch, spec_of) -> None:
    bf16 = spec_of(pretrain_video={"precision": "bf16"}).train
    assert peak_operations(CPU, bf16) is None
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: "NVIDIA A100-SXM4-80GB")
    assert peak_operations(torch.device("cuda", 0), bf16) == 312e12
    assert peak_operations(torch.device("cuda", 0), spec_of().train) is None


def test_a_spike_stops_the_run_and_names_the_checkpoint_before_it(spec_of, start) -> None:
    """From step 8 on the loss is 1000 times what it was; the checkpoint of step 8 is not the last good one."""

    def spoil() -> None:
        from wav.training import loop

        update = loop.update

        def spoiled(engine: Any, ema: Any, settings: Any, step: int, inputs: Any) -> Any:
            done = update(engine, ema, settings, step, inputs)
            losses = {name: value * (1000 if step >= 8 else 1) for name, value in done.losses.items()}
            return replace(done, losses=losses)

        loop.update = spoiled

    few = {"steps": 9, "log_every": 1, "checkpoint_every": 1, "validate_every": 9}
    spec = spec_of(pretrain_video=few)
    process = start(spec, spoil)
    log = finish(process)
    assert process.exitcode == 1, log
    error = log.splitlines()[-1]
    assert error.startswith("ERROR: pretrain_video.spike_factor = 10.0: loss")
    assert "at step 8" in error
    assert "last good checkpoint is" in error
    assert "step-00000007" in error


def test_full_disk_skips_a_checkpoint_but_not_the_last(spec_of, start) -> None:
    """Training goes on without the checkpoint of step 3; nothing half-written is left; metrics say how fast it was."""

    def fill() -> None:
        from wav.training import checkpoint

        check, calls = checkpoint.require_free_space, []

        def full(path: Path, needed: int) -> None:
            calls.append(path)
            if len(calls) == 1:
                raise StorageError(f"{path}: no room")
            check(path, needed)

        checkpoint.require_free_space = full  # type: ignore[assignment]

    spec = spec_of()
    log = finish(start(spec, fill))
    assert "WARNING: pretrain_video: no checkpoint of step 3, training goes on" in log
    assert [path.name for path in (spec.work / "checkpoints").iterdir()] == ["step-00000006"]
    metrics = json.loads((spec.paths.output / "metrics.json").read_text())
    tokens = metrics["tokens_per_second"] / metrics["samples_per_second"]
    assert tokens == pytest.approx(2 * (2 + 2) * 2 * 2, rel=0.01)  # views x (memory + future) x 2 x 2 cells
    assert metrics["grad_norm"] > 0
    assert "mfu" not in metrics  # nobody knows a CPU's peak


def test_training_goes_on_while_the_store_fails(spec_of, start, s3_server, tmp_path: Path) -> None:
    """Uploads fail for a while; the run ends well, and every commit that is visible verifies."""
    from tests.helpers.fault_proxy import FaultProxy
    from wav.io.storage import open_store
    from wav.io.storage.commands import verify

    with FaultProxy(s3_server.endpoint) as proxy:
        fault = proxy.arm("bad_key", method="PUT", path="step-00000002", times=-1)
        for kind in ("reset", "slow_down", "error500"):
            proxy.arm(kind, method="PUT", path="step-00000006")
        spec = replace(
            spec_of(pretrain_video={"checkpoint_every": 2}),
            store=f"s3://{s3_server.bucket}/{tmp_path.name}",
            endpoint=proxy.endpoint,
        )
        log = finish(start(spec))
    assert spec.paths.output.is_dir(), log
    if fault.hits:  # a newer checkpoint may have taken its place in the queue
        assert "step-00000002 stays local for now" in log
        assert "AWS_ACCESS_KEY_ID" in log
    assert s3_server.secret_key not in log
    store = open_store(spec.store, s3_server.endpoint)
    visible = commits(store, f"{spec.prefix}/checkpoints")
    assert visible[-1].endswith("step-00000006")
    assert not any(name.endswith("step-00000002") for name in visible)
    for name in visible:
        assert all(line.startswith("good ") for line in verify(store, name))
    for path in spec.work.rglob("*"):
        assert not path.is_file() or s3_server.secret_key.encode() not in path.read_bytes(), path


@pytest.mark.parametrize(
    ("path", "named"),
    [
        ("latents/shard-00000/image.npy", "image.npy: content does not match .*remove .*latents, then encode"),
        ("rewards/shard-00000/values.npy", "values.npy: content does not match .*remove .*rewards, then label"),
        ("episodes/shard-00000/actions.npy", "actions.npy: content does not match .*remove .*episodes, then make"),
        ("init/model/weights", "init/model: its files have digest .*remove .*init/model, then train"),
    ],
)
def test_one_flipped_bit_is_not_trained_on(path: str, named: str, workspace: Path, spec_of, tmp_path: Path) -> None:
    """With the file's time and size as they were, which is all that DVC looks at."""
    for name in ("episodes", "latents", "rewards"):
        shutil.copytree(workspace / name, tmp_path / name)
    init = tmp_path / "init"
    (init / "model").mkdir(parents=True)
    (init / "model" / "weights").write_bytes(b"weights")
    write_json(init / "checkpoint.json", {"model_digest": model_digest(init / "model")})
    spec = spec_of("train_value", init)
    paths = {name: tmp_path / name for name in ("episodes", "latents", "rewards")}
    spec = replace(spec, paths=replace(spec.paths, **paths))
    episodes = EpisodeStore.open(tmp_path / "episodes")
    latents, rewards = LatentStore.open(tmp_path / "latents"), RewardStore.open(tmp_path / "rewards")
    inputs = SimpleNamespace(episodes=episodes, latents=latents, rewards=rewards)
    verify_inputs(spec, inputs)
    damaged, times = tmp_path / path, (tmp_path / path).stat()
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    os.utime(damaged, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(WavError, match=named):
        verify_inputs(spec, inputs)
