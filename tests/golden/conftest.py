"""Golden vectors: numbers that the reference implementation (Win-commit/WAV at 6acac5b) produced on a CPU.

``data/`` holds a small set: the weights, one forward pass and one planning run; its tests always run. The larger set
is in the folder WAV_GOLDEN_DIR, or ``shared/golden`` beside the project. Every size comes from a set's ``meta.json``,
so that one recorded at other sizes can be checked as it is. What a set does not hold is skipped by name.
"""

from __future__ import annotations

import json
import os
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from wav.model import WAVTransformer
from wav.model.loading import load_state

SMALL = Path(__file__).with_name("data")


def _folder() -> Path:
    """Where the vectors are read from."""
    if given := os.environ.get("WAV_GOLDEN_DIR"):
        return Path(given)
    beside = Path(__file__).resolve().parents[3] / "shared" / "golden"
    return beside if (beside / "meta.json").is_file() else SMALL


FOLDER = _folder()
META: dict[str, Any] = json.loads((FOLDER / "meta.json").read_text()) if (FOLDER / "meta.json").is_file() else {}


def known(recorded: dict[str, Any], *names: str) -> list[str]:
    """The cases that a full set holds, and whatever else this one recorded; absent ones are skipped when they run."""
    return list(dict.fromkeys([*names, *recorded]))


class VAE:
    """The recorded LTX VAE, with normalised latents."""

    def __init__(self, config: dict[str, Any], state: dict[str, Tensor]) -> None:
        from diffusers import AutoencoderKLLTXVideo  # three seconds, and few tests need it

        self.model = AutoencoderKLLTXVideo(**config)
        self.model.load_state_dict(state)
        self.model.eval()
        self.mean = self.model.latents_mean.view(1, -1, 1, 1, 1)
        self.std = self.model.latents_std.view(1, -1, 1, 1, 1) / self.model.config.scaling_factor

    @torch.no_grad()
    def encode(self, frames: Tensor, noise: Tensor) -> Tensor:
        """Latents (N, C, f, h, w) of clips (N, 3, F, H, W) in [-1, 1], sampled with ``noise``."""
        posterior = self.model.encode(frames).latent_dist
        return (posterior.mean + posterior.std * noise - self.mean) / self.std

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Clips (N, 3, F, H, W) in [-1, 1] of latents (N, C, f, h, w)."""
        return self.model.decode(latents * self.std + self.mean, None).sample.clamp(-1, 1)


class Golden:
    """Reads golden files by name."""

    def __init__(self, folder: Path, meta: dict[str, Any]) -> None:
        self.folder, self.meta = folder, meta

    def tensors(self, name: str) -> dict[str, Tensor]:
        path = self.folder / f"{name}.safetensors"
        if not path.is_file():
            pytest.skip(f"{name}: not in the golden set {self.folder}")
        return load_file(path)

    def recorded(self, section: str, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """A case's description in ``meta.json`` and its tensors."""
        file = f"{section.removesuffix('s')}_{name}"
        if name not in self.meta.get(section, {}):
            pytest.skip(f"{file}: not in the golden set {self.folder}")
        return self.meta[section][name], self.tensors(file)

    def transformer(self) -> WAVTransformer:
        model = WAVTransformer(**self.meta["config"], rope_interpolation_scale=self.meta["rope_interpolation_scale"])
        report = load_state(model, self.tensors("transformer_weights"))
        assert not report.missing
        assert not report.extra
        return model.eval()

    @cached_property
    def vae(self) -> VAE:
        return VAE(self.meta["vae_config"], self.tensors("vae_weights"))


@pytest.fixture(scope="session")
def golden() -> Golden:
    if not META:
        pytest.skip(f"{FOLDER}: no golden vectors here; set WAV_GOLDEN_DIR to their folder")
    return Golden(FOLDER, META)


@pytest.fixture(scope="session")
def transformer(golden: Golden) -> WAVTransformer:
    return golden.transformer()
