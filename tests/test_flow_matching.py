"""Flow matching: the path, its velocity, Euler steps and which frames the loss counts."""

from __future__ import annotations

import itertools

import pytest
import torch

from wav.errors import ConfigError
from wav.flow_matching import (
    draw_sigmas,
    euler_step,
    frame_timesteps,
    inference_sigmas,
    mix,
    timesteps,
    training_sigmas,
    velocity_loss,
    velocity_target,
)
from wav.seeding import torch_generator


def test_levels_run_from_noise_to_data() -> None:
    sigmas = inference_sigmas(4)
    assert sigmas.tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert timesteps(sigmas).tolist() == [1000.0, 750.0, 500.0, 250.0, 0.0]
    levels = training_sigmas()
    assert levels.shape == (1000,)
    assert levels.min() > 0
    assert levels.max() == 1
    with pytest.raises(ConfigError, match="denoise steps = 0"):
        inference_sigmas(0)


def test_mix_has_one_level_per_leading_axis() -> None:
    clean, noise = torch.zeros(2, 3, 4, 5), torch.ones(2, 3, 4, 5)
    assert mix(clean, noise, torch.tensor([0.25, 1.0]))[:, 0, 0, 0].tolist() == [0.25, 1.0]
    per_draw = torch.tensor([[0.0, 0.5, 1.0], [0.1, 0.2, 0.3]])
    assert torch.equal(mix(clean, noise, per_draw)[..., 0, 0], per_draw)


@pytest.mark.parametrize("steps", [1, 7])
def test_euler_with_the_true_velocity_returns_to_the_data(steps: int) -> None:
    clean, x = torch.randn(3, 4), torch.randn(3, 4)
    velocity = velocity_target(clean, x)
    sigmas = inference_sigmas(steps)
    for sigma, following in itertools.pairwise(sigmas):
        x = euler_step(x, velocity, sigma, following)
    torch.testing.assert_close(x, clean, atol=1e-6, rtol=0)


def test_velocity_is_the_derivative_of_the_path() -> None:
    clean, noise = torch.randn(2, 5), torch.randn(2, 5)
    slope = (mix(clean, noise, torch.tensor([0.75, 0.75])) - mix(clean, noise, torch.tensor([0.25, 0.25]))) / 0.5
    torch.testing.assert_close(slope, velocity_target(clean, noise))


def test_memory_frames_carry_timestep_zero() -> None:
    assert frame_timesteps(2, 1, torch.tensor([700.0, 20.0])).tolist() == [[0, 0, 700], [0, 0, 20]]


def test_memory_noise_is_one_rate_per_sample() -> None:
    memory, noise = torch.zeros(2, 2, 3, 4, 1, 1), torch.ones(2, 2, 3, 4, 1, 1)
    mixed = mix(memory, noise, torch.tensor([0.0, 0.1]))
    assert mixed[0].abs().max() == 0
    torch.testing.assert_close(mixed[1], torch.full_like(mixed[1], 0.1))


def test_loss_is_the_mean_over_every_draw() -> None:
    clean, noise = torch.zeros(2, 1, 4, 5), torch.zeros(2, 3, 4, 5)
    velocity = torch.zeros(2, 3, 4, 5, dtype=torch.bfloat16)
    assert velocity_loss(velocity, clean, noise).item() == 0
    velocity[1, 0] = 3.0
    assert velocity_loss(velocity, clean, noise).item() == pytest.approx(9 / 6)
    assert velocity_loss(velocity, clean, noise).dtype == torch.float32


def test_draws_are_levels_and_repeat_with_the_seed() -> None:
    first = draw_sigmas((4, 500), torch_generator(1, "level"))
    assert torch.equal(first, draw_sigmas((4, 500), torch_generator(1, "level")))
    assert not torch.equal(first, draw_sigmas((4, 500), torch_generator(2, "level")))
    assert torch.isin(first, training_sigmas()).all()
    assert abs(first.mean().item() - 0.5) < 0.03
