"""The three stages' losses are the recorded ones: no change of code may change what training computes.

A change that only rounds otherwise moves the last digits, and ten steps of AdamW make more of them: :data:`RTOL` allows
that and no more. ``python -m tests.training.golden_losses --write`` records the losses anew.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.training.golden_losses import FOLDER, ROOT, STAGES, STEPS

RTOL = 1e-5


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Records of a run of this code, in a process of its own."""
    folder: Path = tmp_path_factory.mktemp("losses")
    environment = {**os.environ, "WAV_NATIVE": "0", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", "tests.training.golden_losses", str(folder)],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return {stage: json.loads((folder / f"{stage}.json").read_text()) for stage in STAGES}


@pytest.mark.parametrize("stage", STAGES)
def test_losses_are_the_recorded_ones(stage: str, found: dict[str, Any]) -> None:
    recorded = json.loads((FOLDER / f"{stage}.json").read_text())
    assert len(recorded["steps"]) == STEPS
    for step, (ours, theirs) in enumerate(zip(found[stage]["steps"], recorded["steps"], strict=True), 1):
        assert ours == pytest.approx(theirs, rel=RTOL), f"step {step}"
    assert found[stage]["validation"] == pytest.approx(recorded["validation"], rel=RTOL)
