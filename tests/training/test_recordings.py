"""The baseline of the training benchmark decodes, in every step, the very frames that ours was encoded from."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from baseline import recordings
from baseline.recordings import HORIZON, Recordings
from counting import Counted
from sizes import SIZES, Train
from train import BASELINE, FROM_LATENTS, Run, stage_result
from training_data import PcaEncoders, windows

from wav.model import build_model

SMALL = SIZES["tiny"]


@pytest.fixture(scope="module")
def encoders() -> PcaEncoders:
    return PcaEncoders(SMALL, torch.device("cpu"))


def test_samples_are_frames_of_one_episode_in_order() -> None:
    made = Recordings(views=2, size=(32, 32), memory=3, clip=5)
    samples = made.draw(4, np.random.default_rng(0))
    memory, clip = made.read(samples)
    assert memory.shape == (4, 2, 3, 32, 32, 3)
    assert clip.shape == (4, 2, 5, 32, 32, 3)
    now = samples.memory[:, -1:]
    assert (np.diff(samples.memory) > 0).all()
    assert (now - samples.memory <= HORIZON).all()
    assert (samples.clip == now + 3 * np.arange(1, 6)).all()
    # a square moves one pixel a frame: frames that differ by their number differ
    assert all(np.abs(a.astype(int) - b).max() > 50 for a, b in zip(memory[:, 0, 0], memory[:, 0, 2], strict=True))


@pytest.mark.integration
def test_the_baseline_step_decodes_what_ours_was_encoded_from(
    encoders: PcaEncoders, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert encoders.recordings is not None
    batch, pictures = windows(SMALL, encoders, 4, 0)
    again = encoders.decode(pictures)
    assert np.array_equal(again.memory, pictures.memory)
    assert np.array_equal(again.clip, pictures.clip)
    assert torch.equal(encoders.encode(batch, again).future, batch.future)
    reads: list[Path] = []
    decoded = recordings._decoded
    monkeypatch.setattr(recordings, "_decoded", lambda file, groups: reads.append(file) or decoded(file, groups))
    train: Any = Train("train_value", 4)
    model: Any = build_model(SMALL.model, SMALL, SMALL.latent, SMALL.caption, SMALL.value_channels)
    for parts, files in ((BASELINE, 4 * SMALL.views), (BASELINE[2:], 0), ((), 0)):
        reads.clear()
        Run(model, train, SMALL, encoders, parts).loss(batch, pictures, 0)
        assert len(reads) == files


def test_ratios_of_a_stage(encoders: PcaEncoders) -> None:
    pool = [windows(SMALL, encoders, 4, seed) for seed in range(4)]
    found = stage_result(Train("train_value", 4), SMALL, encoders, pool, torch.float32, 2, 60.0, False)
    assert found["ratio"] > 0
    assert found["step_ratio"] > 0
    assert set(found["schedules"]) == {"baseline", FROM_LATENTS, "ours", "ours, more draws"}
    assert found["difference"]["loss"] < 1e-5


def test_convolutions_count() -> None:
    with torch.no_grad(), Counted() as counted:
        torch.nn.Conv2d(3, 8, 3, padding=1)(torch.zeros(2, 3, 10, 10))
    assert counted.flops == 2 * (2 * 8 * 100) * 3 * 9
