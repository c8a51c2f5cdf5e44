"""Training steps on the GPU: as on the CPU in float32, finite in bfloat16, our schedule as the baseline."""

from __future__ import annotations

import math

import pytest
import torch
from gpu_training import Windows
from sizes import SIZES, Train
from torch import Tensor
from train import BASELINE, DROPOUT, STAGES, Run, difference, runs_of
from training_data import Encoders, windows

from wav.model import build_model
from wav.training.draws import SeededRandom
from wav.training.graphs import RECOMPUTE, PassGraphs
from wav.training.objectives import build_objective

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


def gradients(stage: str, device: torch.device, recorded: bool, recompute: bool) -> list[list[Tensor]]:
    """Loss and gradients of four passes, over which the joint stage's roles change."""
    train, sizes = Train(stage, 4), SMALL
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = build_model(sizes.model, sizes, sizes.latent, sizes.caption, sizes.value_channels).to(device).train()
    if recompute:
        model.enable_gradient_checkpointing(RECOMPUTE)
    objective = build_objective(train, model, sizes.memory, sizes.action_dim)
    if recorded:
        objective.graphs = PassGraphs(objective.compute, objective)
    found = []
    for index in range(4):
        inputs = objective.draw(Windows(sizes, 4).batch, None, SeededRandom(0, index), index).to(device)
        loss, parts = objective(inputs)
        loss.backward()
        reached = [p.grad for p in objective.parameters() if p.grad is not None]
        found.append([x.clone() for x in (loss.detach(), *parts.values(), *reached)])
        objective.zero_grad()
    return found


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_recorded_pass_gives_the_numbers_of_one_that_is_not(
    stage: str, recompute: bool, device: torch.device
) -> None:
    if device.type != "cuda":
        pytest.skip("no CUDA device here: nothing can be recorded")
    for kept, wanted in zip(
        gradients(stage, device, True, recompute), gradients(stage, device, False, recompute), strict=True
    ):
        assert len(kept) == len(wanted) > 10
        for one, other in zip(kept, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
