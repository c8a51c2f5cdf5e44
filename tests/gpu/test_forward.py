"""The recorded forward passes of the reference on the GPU, in float32 and bfloat16."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.golden.conftest import FOLDER, META, Golden
from tests.golden.test_forward import CASES, Case
from wav.model import WAVTransformer


@pytest.fixture(scope="module")
def golden() -> Golden:
    if not META:
        pytest.skip(f"{FOLDER}: no golden vectors here; set WAV_GOLDEN_DIR to their folder")
    return Golden(FOLDER, META)


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, golden: Golden) -> Case:
    return Case(golden, request.param)


@torch.no_grad()
def passes(model: WAVTransformer, case: Case, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Video, value and action of a recorded case, computed on the device."""

    def there(*tensors: Tensor) -> Any:
        return [tensor.to(device) for tensor in tensors]

    model = model.to(device, dtype)
    video = model.video(*there(case.latents, case.timestep, *case.text))
    value = model.value(*there(*case.value), video.features)
    tokens, level = there(*case.action)
    action = model.action(tokens, level, video.features, value.features, *there(case.history))
    return {"A.video": video.velocity, "B.value": value.velocity, "C.action": action}


def test_float32_meets_the_recorded_passes(golden: Golden, case: Case, device: torch.device) -> None:
    for key, got in passes(golden.transformer(), case, device, torch.float32).items():
        case.check(got.cpu(), key, 5e-5)


def test_bfloat16_stays_close(golden: Golden, case: Case, device: torch.device) -> None:
    from wav.model.video import pack

    for key, got in passes(golden.transformer(), case, device, torch.bfloat16).items():
        wanted = case.data[key]
        got = (pack(got) if got.ndim == 6 else got).float().cpu().reshape(wanted.shape)
        assert (got - wanted).square().mean().sqrt() < 0.1 * wanted.square().mean().sqrt(), key
