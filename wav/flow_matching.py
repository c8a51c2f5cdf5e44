"""Flow matching: noise levels, the straight path from data to noise, its velocity, Euler steps and the loss.

x_s = (1 - s) x1 + s x0 with data x1 and Gaussian noise x0; the network predicts v = dx/ds = x0 - x1 at timestep
t = 1000 s. Decoding starts at s = 1 (noise) and steps down to s = 0. Video latents are (..., F, h, w), memory frames
first; memory frames are never denoised and always carry timestep 0.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from wav.errors import ConfigError

TRAINING_LEVELS = 1000


def inference_sigmas(steps: int) -> Tensor:
    """Levels of an Euler loop, (steps + 1,) float32, from 1 down to 0 (the reference scheduler, no shift).

    Raises:
        ConfigError: ``steps`` is not positive.

    >>> inference_sigmas(4).tolist()
    [1.0, 0.75, 0.5, 0.25, 0.0]
    """
    if steps < 1:
        raise ConfigError(f"denoise steps = {steps}: must be at least 1; raise planner.denoise_steps")
    return (torch.arange(steps, -1, -1, dtype=torch.float64) / steps).float()


def training_sigmas() -> Tensor:
    """Levels that training draws from, (1000,) float32: 1, ..., 0.002, 0.001."""
    return inference_sigmas(TRAINING_LEVELS)[:-1]


def timesteps(sigma: Tensor) -> Tensor:
    """What the network is told about levels ``sigma`` of any shape: sigma * 1000, float32."""
    return sigma.float() * 1000.0


def draw_sigmas(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Uniformly drawn training levels of ``shape``, from a CPU generator."""
    return training_sigmas()[torch.randint(TRAINING_LEVELS, shape, generator=generator)]


def _like(sigma: Tensor, x: Tensor) -> Tensor:
    """``sigma`` with leading axes of ``x`` to a shape that broadcasts against it."""
    return sigma.to(x).reshape(*sigma.shape, *(1,) * (x.ndim - sigma.ndim))


def mix(clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """x_s = (1 - s) clean + s noise; ``sigma`` has the leading axes of ``clean``.

    >>> mix(torch.zeros(2, 3), torch.ones(2, 3), torch.tensor([1.0, 0.25]))[:, 0].tolist()
    [1.0, 0.25]
    """
    return torch.lerp(clean, noise, _like(sigma, clean))


def velocity_target(clean: Tensor, noise: Tensor) -> Tensor:
    """Velocity v = noise - clean, from data to noise, of two tensors of one shape."""
    return noise - clean


def euler_step(x: Tensor, velocity: Tensor, sigma: float | Tensor, sigma_next: float | Tensor) -> Tensor:
    """Move x, of any shape, to ``sigma_next`` from ``sigma`` along v of that shape: x + (sigma_next - sigma) v."""
    return x + (sigma_next - sigma) * velocity


def join_frames(memory: Tensor, future: Tensor) -> Tensor:
    """Memory (..., Fm, h, w) and future (..., Ff, h, w) latents along the frame axis."""
    return torch.cat([memory, future], dim=-3)


def frame_timesteps(memory_frames: int, future_frames: int, timestep: Tensor) -> Tensor:
    """Timesteps per frame (B, Fm + Ff): 0 for memory, ``timestep`` (B,) for future frames."""
    is_future = torch.arange(memory_frames + future_frames, device=timestep.device) >= memory_frames
    return timestep.unsqueeze(-1) * is_future


def velocity_loss(velocity: Tensor, clean: Tensor, noise: Tensor) -> Tensor:
    """Mean squared error, a float32 scalar, of a velocity shaped as ``noise``; several draws may share ``clean``."""
    return nn.functional.mse_loss(velocity.float(), velocity_target(clean, noise).float())
