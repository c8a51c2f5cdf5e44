"""Exact resume on one and two ranks, ZeRO 0 to 3; other ranks and ZeRO stages through universal checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.test_loop import assert_equal, finish, wait_for, weights
from wav.io.storage.commit import verify
from wav.training.spec import TrainSpec

N = 2
STEPS = {"steps": 2 * N, "checkpoint_every": N, "log_every": 1, "warmup_steps": 1, "validate_every": 2 * N}
MUON, BF16 = {"optimizer": "muon"}, {"precision": "bf16"}
SHARDED = pytest.mark.parametrize(
    ("ranks", "zero", "more"),
    [
        (2, 0, MUON),
        (2, 2, {}),
        pytest.param(2, 0, {}, marks=pytest.mark.long),
        pytest.param(1, 2, {}, marks=pytest.mark.long),
        pytest.param(1, 1, {}, marks=pytest.mark.long),
        pytest.param(1, 3, {}, marks=pytest.mark.long),
        pytest.param(2, 1, {}, marks=pytest.mark.long),
        pytest.param(2, 3, {}, marks=pytest.mark.long),
        pytest.param(1, 0, BF16, marks=pytest.mark.long),
        pytest.param(1, 2, BF16, marks=pytest.mark.long),
        pytest.param(2, 2, BF16, marks=pytest.mark.long),
        pytest.param(1, 3, BF16, marks=pytest.mark.long),
    ],
)


def checkpoint(spec: TrainSpec, step: int) -> dict[str, Any]:
    """Every file of a checkpoint by name: engine state of every rank, averages, random states, run state."""
    folder = spec.work / "checkpoints" / f"step-{step:08d}"
    verify(folder)
    files = sorted(path for path in folder.rglob("*.pt"))
    found = {str(path.relative_to(folder)): torch.load(path, weights_only=False) for path in files}
    return {
        name: {k: v for k, v in raw.items() if k not in ("ds_config", "data_sampler")} for name, raw in found.items()
    }


def plain(value: Any) -> Any:
    """DeepSpeed's containers as dicts and lists, so that they compare bit by bit."""
    if isinstance(value, torch.Tensor | str | int | float | bool | None):
        return value
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, torch.Size):
        return list(value)
    return str(value) if not hasattr(value, "__dict__") else plain(vars(value))


def dump(path: Path) -> Callable[[], None]:
    """To be called in a run's children: before training goes on, its whole state goes to ``path``."""

    def prepare() -> None:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        from wav.training.loop import Trainer

        go_on = Trainer.run

        def run(trainer: Trainer) -> None:
            whole: dict[str, Any] = {"step": trainer.start, "rows": trainer.recorder.rows}
            whole["losses"] = trainer.losses
            optimizer = trainer.engine.optimizer
            if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
                optimizer._lazy_init_hp_params_optimizer_state()  # DeepSpeed links moments at the first step otherwise
            for name, parameter in trainer.engine.module.named_parameters():
                if not parameter.requires_grad:
                    continue
                whole[f"ema.{name}"] = trainer.ema.full(name).clone()
                if trainer.settings.zero_stage:
                    whole[name] = safe_get_full_fp32_param(parameter).clone()
                    for key in ("exp_avg", "exp_avg_sq"):
                        whole[f"{key}.{name}"] = safe_get_full_optimizer_state(parameter, key).clone()
                else:
                    whole[name] = parameter.detach().clone()
                    for key in ("exp_avg", "exp_avg_sq"):
                        whole[f"{key}.{name}"] = optimizer.state[parameter][key].clone()
            inner = getattr(optimizer, "optimizer", optimizer)
            whole["adam_step"] = sorted({float(state["step"]) for state in inner.state.values() if "step" in state})
            if trainer.world.is_main:
                torch.save(whole, path)
            go_on(trainer)

        Trainer.run = run  # type: ignore[method-assign]

    return prepare


def run_of(spec_of: Callable[..., TrainSpec], name: str, ranks: int, zero: int, **more: Any) -> TrainSpec:
    return spec_of(name=name, pretrain_video={**STEPS, "ranks": ranks, "zero_stage": zero, **more})


def with_layout(spec: TrainSpec, ranks: int, zero: int) -> TrainSpec:
    """The same run, spread in another way."""
    return replace(spec, train=spec.train.model_copy(update={"ranks": ranks, "zero_stage": zero}))


@SHARDED
def test_kill_and_resume_is_bit_equal(ranks: int, zero: int, more: dict[str, str], spec_of, start) -> None:
    """2N steps equal N steps, kill -9, resume, N steps: every file of the last checkpoint, the weights, the metrics.

    In bf16 the float32 weights come back as well: at ZeRO 0 DeepSpeed keeps them in another file.
    """
    whole, killed = (run_of(spec_of, name, ranks, zero, **more) for name in ("whole", "killed"))
    log = finish(start(whole))
    assert whole.paths.output.is_dir(), log
    process = start(killed)
    wait_for(killed.work / "checkpoints" / f"step-{N:08d}", process)
    process.kill()
    assert not killed.paths.output.exists()
    log = finish(start(killed))
    assert f"resumed from the checkpoint of step {N}" in log, log
    first, second = plain(checkpoint(whole, 2 * N)), plain(checkpoint(killed, 2 * N))
    assert len([name for name in first if name.startswith("rank-")]) == ranks
    assert_equal(first, second)
    assert_equal(weights(whole), weights(killed), "output")
    assert_metrics(whole, killed)


def assert_metrics(a: TrainSpec, b: TrainSpec) -> None:
    """Losses and norms of ``metrics.json`` are equal."""
    found = [json.loads((spec.paths.output / "metrics.json").read_text()) for spec in (a, b)]
    names = {name for name in found[0] if "loss" in name or "norm" in name}
    assert len(names) >= 3
    assert {name: found[0][name] for name in names} == {name: found[1][name] for name in names}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((2, 2), (1, 2)),
        ((1, 2), (2, 2)),
        pytest.param((2, 2), (1, 1), marks=pytest.mark.long),
        pytest.param((2, 0), (1, 0), marks=pytest.mark.long),
        pytest.param((1, 0), (2, 0), marks=pytest.mark.long),
        pytest.param((2, 3), (1, 3), marks=pytest.mark.long),
        pytest.param((1, 3), (2, 3), marks=pytest.mark.long),
    ],
)
def test_other_ranks_go_on_with_equal_state(
    before: tuple[int, int], after: tuple[int, int], spec_of, start, tmp_path: Path
) -> None:
    """The state is the one that was saved: weights, both moments, average, position, losses so far."""
    first = run_of(spec_of, "a", *before, steps=N)
    log = finish(start(first))
    assert first.paths.output.is_dir(), log
    log = finish(start(first, dump(tmp_path / "same.pt")))
    assert (tmp_path / "same.pt").is_file(), log
    second = with_layout(first, *after)
    log = finish(start(second, dump(tmp_path / "other.pt")))
    assert f"resumed from the checkpoint of step {N}" in log, log
    same, other = torch.load(tmp_path / "same.pt"), torch.load(tmp_path / "other.pt")
    assert same["adam_step"] == [N]
    assert same.keys() == other.keys()
    assert_equal(same, other)
    assert not list((first.work / "checkpoints").glob(".*"))


def losses(spec: TrainSpec) -> list[float]:
    """Of every logged step."""
    rows = (spec.paths.output / "plots" / "metrics" / "loss.tsv").read_text().splitlines()[1:]
    return [float(row.split("\t")[1]) for row in rows]


@pytest.mark.long
def test_training_goes_on_with_fewer_ranks(spec_of, start) -> None:
    """N steps on two ranks, kill -9, N on one: losses of an undisturbed run, and checkpoints of the new layout."""
    whole, first = (run_of(spec_of, name, 2, 2, micro_batch_size=2) for name in ("whole", "killed"))
    log = finish(start(whole))
    assert whole.paths.output.is_dir(), log
    process = start(first)
    wait_for(first.work / "checkpoints" / f"step-{N:08d}", process)
    process.kill()
    second = with_layout(first, 1, 2)
    log = finish(start(second))
    assert f"resumed from the checkpoint of step {N}" in log, log
    assert losses(second) == pytest.approx(losses(whole), rel=1e-4)
    manifest = verify(second.work / "checkpoints" / f"step-{2 * N:08d}")
    assert (manifest.meta["ranks"], manifest.meta["zero_stage"], manifest.meta["step"]) == (1, 2, 2 * N)


def test_layout_that_cannot_go_on_is_refused(spec_of, start) -> None:
    spec = run_of(spec_of, "a", 1, 0, steps=N)
    finish(start(spec))
    spec = with_layout(spec, 1, 2)
    process = start(spec)
    log = finish(process)
    assert process.exitcode == 1
    assert "set zero_stage = 0" in log.splitlines()[-1]


def validation_loss(spec: TrainSpec) -> float:
    """The loss of the written weights on the held-out windows, computed without DeepSpeed."""
    from wav.model.loading import load_model
    from wav.training.engine import plan_batch
    from wav.training.inputs import open_inputs
    from wav.training.objectives import build_objective
    from wav.training.prefetch import validation_inputs

    model = load_model(spec.paths.output / "model", torch.float32)
    sizes = (spec.data.memory_frames, spec.data.action_dim)
    objective = build_objective(spec.train, model, *sizes).eval()
    held_out = open_inputs(spec).validation
    assert held_out is not None
    plan = plan_batch(spec.train, spec.train.ranks)
    inputs = validation_inputs(held_out, objective, plan, torch.device("cpu"))
    with torch.no_grad():
        losses = [float(objective(batch)[0]) for batch in inputs]
    return sum(losses) / len(losses)


@pytest.mark.long
def test_zero3_weights_are_whole(spec_of, start) -> None:
    """The safetensors of a ZeRO-3 run hold every parameter, the frozen ones too, and evaluate as the run did."""
    video = spec_of(name="video", pretrain_video={"steps": 1})
    finish(start(video))
    layout = {**STEPS, "ranks": 2, "zero_stage": 3}
    value = spec_of("train_value", video.paths.output, "value", train_value=layout)
    log = finish(start(value))
    assert value.paths.output.is_dir(), log
    before, after = weights(video), weights(value)
    assert {name: t.shape for name, t in before.items()} == {name: t.shape for name, t in after.items()}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.startswith("value_") for name in changed)
    metrics = json.loads((value.paths.output / "metrics.json").read_text())
    assert metrics["validation_loss"] == pytest.approx(validation_loss(value), rel=1e-6)
