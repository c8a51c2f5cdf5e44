"""Flow matching: noise levels, the straight path from data to noise, its velocity, Euler steps and the masked loss.

x_s = (1 - s) x1 + s x0 with data x1 and Gaussian noise x0; the network predicts v = dx/ds = x0 - x1 at timestep
t = 1000 s. Decoding starts at s = 1 (noise) and steps down to s = 0. Video latents are (..., F, h, w), memory frames
first; memory frames are never denoised and always carry timestep 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wav.errors import ConfigError

TRAINING_LEVELS = 1000


def inference_sigmas(steps: int) -> Tensor:
    """Levels of an Euler loop, (steps + 1,) float32, from 1 down to 0 (the reference scheduler, no shift).

    Raises:
        ConfigError: ``steps`` is not positive.
    """
    if steps < 1:
        raise ConfigError(f"denoise steps = {steps}: must be at least 1; raise planner.denoise_steps")
    return (torch.arange(steps, -1, -1, dtype=torch.float64) / steps).float()


def training_sigmas(levels: int = TRAINING_LEVELS) -> Tensor:
    """Levels that training draws from, (levels,) float32: 1, ..., 2 / levels, 1 / levels."""
    return inference_sigmas(levels)[:-1]


def timesteps(sigma: Tensor) -> Tensor:
    """What the network is told about level ``sigma``: sigma * 1000, float32."""
    return sigma.float() * 1000.0


def reference_timesteps(sigma: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The reference trainer's timesteps: levels rounded to its compute ``dtype``, times 1000, cut to integers."""
    return (sigma.to(dtype) * 1000.0).long()


def draw_sigmas(shape: tuple[int, ...], generator: torch.Generator, levels: int = TRAINING_LEVELS) -> Tensor:
    """Uniformly drawn training levels of ``shape``, from a CPU generator."""
    index = torch.randint(levels, shape, generator=generator)
    return training_sigmas(levels)[index]


def _like(sigma: Tensor, x: Tensor) -> Tensor:
    """``sigma`` with leading axes of ``x`` to a shape that broadcasts against it."""
    return sigma.to(x).reshape(*sigma.shape, *(1,) * (x.ndim - sigma.ndim))


def mix(clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """x_s = (1 - s) clean + s noise; ``sigma`` has the leading axes of ``clean``."""
    return torch.lerp(clean, noise, _like(sigma, clean))


def velocity_target(clean: Tensor, noise: Tensor) -> Tensor:
    """Velocity v = noise - clean, from data to noise."""
    return noise - clean


def euler_step(x: Tensor, velocity: Tensor, sigma: float | Tensor, sigma_next: float | Tensor) -> Tensor:
    """Move x to ``sigma_next`` from x at ``sigma``: x + (sigma_next - sigma) v."""
    return x + (sigma_next - sigma) * velocity


def mix_memory(memory: Tensor, noise: Tensor, rate: Tensor) -> Tensor:
    """Training augmentation of memory frames: (1 - r) memory + r noise, one ``rate`` r per sample (B,)."""
    return mix(memory, noise, rate)


def join_frames(memory: Tensor, future: Tensor) -> Tensor:
    """Memory (..., Fm, h, w) and future (..., Ff, h, w) latents along the frame axis."""
    return torch.cat([memory, future], dim=-3)


def shaped_noise(noise: Tensor, mean: Tensor | float = 0.0, std: Tensor | float = 1.0) -> Tensor:
    """A sample of N(mean, diag std^2) from standard normal ``noise`` (the planner's distributions)."""
    return noise * std + mean


def frame_timesteps(memory_frames: int, future_frames: int, timestep: Tensor) -> Tensor:
    """Timesteps per frame (B, Fm + Ff): 0 for memory, ``timestep`` (B,) for future frames."""
    is_future = torch.arange(memory_frames + future_frames, device=timestep.device) >= memory_frames
    return timestep.unsqueeze(-1) * is_future


def masked_loss(prediction: Tensor, target: Tensor, memory_frames: int) -> Tensor:
    """Mean squared error per sample (B,) over future frames only; both (B, V, C, F, h, w), F counting memory frames.

    The reference masks memory tokens too, but divides by all tokens (:func:`reference_loss`).
    """
    error = (prediction[..., memory_frames:, :, :].float() - target[..., memory_frames:, :, :].float()).square()
    return error.flatten(1).mean(1)


def reference_loss(prediction: Tensor, target: Tensor, memory_frames: int) -> Tensor:
    """The reference's video loss per sample (B,): squared error of future frames over the count of ALL elements."""
    frames = prediction.shape[-3]
    return masked_loss(prediction, target, memory_frames) * ((frames - memory_frames) / frames)


def token_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error per sample (B,) of expert tokens (B, ..., A, C)."""
    return (prediction.float() - target.float()).square().flatten(1).mean(1)
