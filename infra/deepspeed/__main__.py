"""Write ``zero1.json`` to ``zero3.json``: section ``train_joint`` of presets/libero.yaml with each ZeRO stage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from wav.config import load_settings
from wav.local import PROJECT
from wav.training.engine import deepspeed_config, plan_batch

FOLDER = Path(__file__).parent


def configuration(stage: int) -> dict[str, Any]:
    """The configuration of joint training on one node of eight GPUs with ZeRO ``stage``."""
    settings = load_settings(PROJECT / "presets" / "libero.yaml").train_joint.model_copy(update={"zero_stage": stage})
    return deepspeed_config(settings, plan_batch(settings, settings.ranks * settings.nodes), "cuda")


def main() -> None:
    """Write the files."""
    for stage in (1, 2, 3):
        (FOLDER / f"zero{stage}.json").write_text(json.dumps(configuration(stage), indent=2) + "\n")


if __name__ == "__main__":
    main()
