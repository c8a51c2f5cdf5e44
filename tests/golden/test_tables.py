"""Full-size RoPE tables, scheduler levels and the construction of noisy latents against the reference."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from tests.golden.conftest import Golden
from tests.golden.reference_trainer import reference_timesteps
from wav.flow_matching import (
    frame_timesteps,
    inference_sigmas,
    join_frames,
    mix,
    timesteps,
    training_sigmas,
)
from wav.model import WAVTransformer
from wav.model.rope import token_rope, video_rope
from wav.model.video import pack

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tables(golden: Golden) -> dict[str, Tensor]:
    return golden.tensors("tables")


def test_rope_tables_of_the_full_size(golden: Golden, tables: dict[str, Tensor], transformer: WAVTransformer) -> None:
    seen = set()
    for key in golden.meta["tables"]:
        if video := re.fullmatch(r"(video)(\d+)_f(\d+)_h(\d+)_w(\d+)\.cos", key):
            dim, *grid = map(int, video.groups()[1:])
            table = video_rope(dim, *grid, tuple(golden.meta["rope_interpolation_scale"]), CPU)
        elif tokens := re.fullmatch(r"(action|value)(\d+)_L(\d+)\.cos", key):
            table = token_rope(int(tokens[2]), int(tokens[3]), transformer.config[f"{tokens[1]}_rope_base"], CPU)
        else:
            continue
        seen.add((video or tokens)[1])
        cos, sin = tables[key][0], tables[key.replace(".cos", ".sin")][0]
        torch.testing.assert_close(table[0], cos, atol=1e-5, rtol=0)
        signs = torch.tensor([-1.0, 1.0]).repeat(cos.shape[-1] // 2)  # of the sines in a table
        torch.testing.assert_close(table[1] * signs, sin, atol=1e-5, rtol=0)
    assert seen == {"video", "value", "action"}


def test_inference_levels(tables: dict[str, Tensor]) -> None:
    recorded = [int(match[1]) for key in tables if (match := re.fullmatch(r"sched(\d+)\.sigmas", key))]
    assert recorded
    for steps in recorded:
        sigmas = inference_sigmas(steps)
        torch.testing.assert_close(sigmas, tables[f"sched{steps}.sigmas"], atol=1e-7, rtol=0)
        torch.testing.assert_close(timesteps(sigmas[:-1]), tables[f"sched{steps}.timesteps"], atol=1e-4, rtol=0)


def test_training_levels(tables: dict[str, Tensor]) -> None:
    torch.testing.assert_close(training_sigmas(), tables["train_sched.sigmas"], atol=1e-7, rtol=0)
    torch.testing.assert_close(timesteps(training_sigmas()), tables["train_sched.timesteps"], atol=1e-4, rtol=0)
    assert torch.equal(reference_timesteps(training_sigmas()), tables["train_sched.bf16_sigma_times_1000_long"])


@pytest.mark.parametrize("mode", ["plain", "train", "meanstd"])
def test_noisy_latents(golden: Golden, tables: dict[str, Tensor], mode: str) -> None:
    memory, noise = tables["noisebuild.condition_frame_latent"], tables["noisebuild.raw_noise"]
    frames = memory.shape[-3]
    future = noise[..., frames:, :, :]
    if mode == "train":  # the reference draws one rate for the batch
        strength = golden.recorded("train", "video_only")[0]["noise_to_first_frame"]
        rate = strength * tables["noisebuild.train.random_random"].float().expand(len(memory))
        memory = mix(memory, noise[..., :frames, :, :], rate)
    elif mode == "meanstd":  # the case's mean and standard deviation of the future noise
        future = 0.25 + 0.5 * future
    latents = pack(join_frames(memory, future)[:, None])[:, 0].flatten(1, 2)
    torch.testing.assert_close(latents, tables[f"noisebuild.{mode}.latents"], atol=1e-6, rtol=0)
    is_memory = frame_timesteps(frames, future.shape[-3], torch.ones(1)) == 0
    assert torch.equal(is_memory.float(), tables[f"noisebuild.{mode}.cond_indicator"])
