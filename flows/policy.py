"""What evaluation and export share: the policy folder put together from the stages' outputs."""

from __future__ import annotations

from pathlib import Path

from flows.common import StageRun
from wav.data.conventions import Conventions
from wav.data.files import read_json
from wav.export import assemble_policy_folder


def assemble(run: StageRun) -> Path:
    """Model, codec, text encoder, statistics and conventions in one scratch folder that ``Policy.load`` reads.

    Raises:
        DataError, CheckpointError: a part is missing or parts do not belong together.
    """
    joint = run.path("models/joint")
    conventions = Conventions.from_json(read_json(joint / "conventions.json", "run dvc repro train_joint"))
    return assemble_policy_folder(
        run.scratch("policy") / run.stage,
        model=joint / "model",
        codec=run.path("data/latents/codec"),
        text_encoder=run.path("data/latents/text_encoder"),
        statistics=[joint / "episodes_statistics.json", joint / "rewards_statistics.json"],
        conventions=conventions,
        settings=run.settings,
    )
