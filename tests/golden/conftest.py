"""Golden vectors: numbers that the reference implementation produced on a CPU, in the folder WAV_GOLDEN_DIR."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

from wav.model import WAVTransformer
from wav.model.pretrained import load_state

ROOT = Path(__file__).resolve().parents[2]


class Golden:
    """Reads golden files by name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.meta: dict[str, Any] = json.loads((folder / "meta.json").read_text())

    def tensors(self, name: str) -> dict[str, Tensor]:
        return load_file(self.folder / f"{name}.safetensors")

    def transformer(self) -> WAVTransformer:
        model = WAVTransformer(**self.meta["config"], rope_interpolation_scale=self.meta["rope_interpolation_scale"])
        report = load_state(model, self.tensors("transformer_weights"))
        assert not report.missing
        assert not report.extra
        return model.eval()


@pytest.fixture(scope="session")
def golden() -> Golden:
    folder = Path(os.environ.get("WAV_GOLDEN_DIR") or ROOT.parent / "shared" / "golden")
    if not (folder / "meta.json").is_file():
        pytest.skip(f"{folder}: no golden vectors here; set WAV_GOLDEN_DIR to their folder")
    return Golden(folder)


@pytest.fixture(scope="session")
def transformer(golden: Golden) -> WAVTransformer:
    return golden.transformer()
