"""Steps whose gradients are not finite end the run on every layout, or are dropped and counted where allowed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.training.test_loop import finish, weights
from tests.training.test_resume import checkpoint, run_of
from wav.training.spec import TrainSpec


def spoil() -> None:
    """In a run's children: rank 0's gradient of one parameter is not a number in step 3, with a loss as ever."""
    from wav.training import loop

    update = loop.update

    def spoiled(engine: Any, ema: Any, settings: Any, step: int, inputs: Any) -> Any:
        handles = []
        if step == 3 and engine.global_rank == 0:
            parameter = next(p for p in engine.module.parameters() if p.requires_grad)
            handles = [parameter.register_hook(lambda gradient: gradient * float("nan"))]
        done = update(engine, ema, settings, step, inputs)
        for handle in handles:
            handle.remove()
        return done

    loop.update = spoiled


@pytest.mark.parametrize(
    ("ranks", "zero", "precision"),
    [
        (1, 0, "fp32"),
        (2, 2, "fp32"),
        pytest.param(2, 0, "fp32", marks=pytest.mark.long),
        pytest.param(1, 1, "fp32", marks=pytest.mark.long),
        pytest.param(1, 3, "fp32", marks=pytest.mark.long),
        pytest.param(1, 0, "bf16", marks=pytest.mark.long),
        pytest.param(1, 2, "bf16", marks=pytest.mark.long),
    ],
)
def test_a_step_that_is_not_finite_ends_the_run_or_is_counted(
    ranks: int, zero: int, precision: str, spec_of: Callable[..., TrainSpec], start: Callable[..., Any]
) -> None:
    """The remedy that the message names goes on from the checkpoint before, which is still a good one."""
    few = {"steps": 4, "checkpoint_every": 1, "log_every": 2, "validate_every": 4, "precision": precision}
    spec = run_of(spec_of, "a", ranks, zero, **few)
    process = start(spec, spoil)
    log = finish(process)
    assert process.exitcode == 1, log
    error = next(line for line in log.splitlines() if line.startswith("ERROR: "))
    assert "at step 3, training diverged" in error
    assert "set max_skipped_steps (now 0)" in error
    assert "step-00000002" in error
    spec = replace(spec, train=spec.train.model_copy(update={"max_skipped_steps": 1}))
    log = finish(start(spec, spoil))
    assert "resumed from the checkpoint of step 2" in log
    assert log.count("step 3 is dropped, its gradients are not finite (1)") == 1, log
    saved = [state["skipped_steps"] for state in checkpoint(spec, 4).values() if "skipped_steps" in state]
    assert set(saved) == {1}  # so that a run that is resumed later may not lose as many again
    metrics = json.loads((spec.paths.output / "metrics.json").read_text())
    assert metrics["skipped_steps"] == 1
    assert all(bool(torch.isfinite(tensor).all()) for tensor in weights(spec).values())
