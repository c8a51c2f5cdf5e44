"""A very small model and one batch of inputs for it."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from wav.config import DataSettings, ModelSettings
from wav.model import WAVTransformer, build_model

B, V, C, F, H, W, A, L = 2, 2, 6, 3, 2, 3, 5, 4


def small(**changes: object) -> WAVTransformer:
    sizes = {"layers": 4, "heads": 2, "head_dim": 8, "value_heads": 2, "value_head_dim": 6, "action_heads": 2}
    settings = ModelSettings(**{**sizes, "action_head_dim": 8, **changes})
    return build_model(settings, DataSettings(action_chunk=A), latent_channels=C, caption_channels=7, seed=3).eval()


def _randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@dataclass(frozen=True)
class Inputs:
    latents: Tensor = field(default_factory=lambda: _randn(B, V, C, F, H, W))
    timestep: Tensor = field(default_factory=lambda: torch.tensor([[0.0, 0.0, 700.0], [0.0, 0.0, 300.0]]))
    text: Tensor = field(default_factory=lambda: _randn(B, L, 7))
    text_mask: Tensor = field(default_factory=lambda: torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]).bool())
    value: Tensor = field(default_factory=lambda: _randn(B, A, 10))
    action: Tensor = field(default_factory=lambda: _randn(B, A, 15))
    history: Tensor = field(default_factory=lambda: _randn(B, 1, 15))
    expert_timestep: Tensor = field(default_factory=lambda: torch.tensor([900.0, 100.0]))


@pytest.fixture(scope="session")
def model() -> WAVTransformer:
    return small()


@pytest.fixture(scope="session")
def inputs() -> Inputs:
    return Inputs()
