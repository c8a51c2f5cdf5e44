"""The small set in the tree: it is never skipped, and it is a part of the larger one."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.golden.conftest import FOLDER, META, SMALL

FILES = ("transformer_weights", "forward_v2", "plan_v2_explore")


def test_it_is_whole_and_small() -> None:
    meta = json.loads((SMALL / "meta.json").read_text())
    assert [f"forward_v{case['n_view']}" for case in meta["cases"]] == ["forward_v2"]
    assert list(meta["plans"]) == ["v2_explore"]
    assert {path.name for path in SMALL.iterdir()} == {"meta.json", *(f"{name}.safetensors" for name in FILES)}
    assert sum(path.stat().st_size for path in SMALL.iterdir()) < 5_000_000


@pytest.mark.skipif(FOLDER == SMALL, reason="no larger golden set here; set WAV_GOLDEN_DIR to its folder")
@pytest.mark.parametrize("name", FILES)
def test_it_is_part_of_the_larger_set(name: str) -> None:
    small, whole = (load_file(folder / f"{name}.safetensors") for folder in (SMALL, FOLDER))
    assert small.keys() == whole.keys()
    assert all(torch.equal(small[key], whole[key]) for key in small)
    meta = json.loads((SMALL / "meta.json").read_text())
    assert meta["config"] == META["config"]
