"""Training steps on the GPU: as on the CPU in float32, finite in bfloat16, our schedule as the baseline."""

from __future__ import annotations

import math

import pytest
import torch
from sizes import SIZES, Train
from train import BASELINE, DROPOUT, STAGES, Run, difference, runs_of
from training_data import Encoders, windows

SMALL = SIZES["tiny"]


def runs(stage: str, device: torch.device, dtype: torch.dtype = torch.float32) -> dict[str, Run]:
    train = Train(stage, SMALL.batch, DROPOUT[stage], value_draws=2, action_draws=2)
    encoders = Encoders(SMALL, device)
    names = {"baseline": (tuple(p for p in BASELINE if p != "encoders"), train), "ours": ((), train)}
    return runs_of(names, SMALL, encoders, dtype)


@pytest.mark.parametrize("stage", STAGES)
def test_our_schedule_equals_the_baseline(stage: str, device: torch.device) -> None:
    made = runs(stage, device)
    batch = windows(SMALL, Encoders(SMALL, device), SMALL.batch, 0)
    found = difference(made["baseline"], made["ours"], *batch)
    assert found["loss"] < 1e-4
    assert found["gradient"] < 1e-3


@pytest.mark.parametrize("stage", STAGES)
def test_the_device_computes_what_the_cpu_does(stage: str, device: torch.device) -> None:
    here, there = runs(stage, torch.device("cpu"))["ours"], runs(stage, device)["ours"]
    batch = windows(SMALL, Encoders(SMALL, device), SMALL.batch, 0)
    found = difference(here, there, *batch)
    assert found["loss"] < 1e-4
    assert found["gradient"] < 1e-3


@pytest.mark.parametrize("stage", STAGES)
def test_bfloat16_steps_are_finite(stage: str, device: torch.device) -> None:
    run = runs(stage, device, torch.bfloat16)["ours"]
    batch = windows(SMALL, Encoders(SMALL, device), SMALL.batch, 0)
    assert all(math.isfinite(run.step(*batch, index)) for index in range(3))
    assert all(parameter.isfinite().all() for parameter in run.model.parameters())
