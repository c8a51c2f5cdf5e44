"""The evaluation of a suite without simulator, such as a real robot's dataset: nothing runs, and the results say so.

What can be said of such a policy is in the pictures along held-out demonstrations (:mod:`wav.evaluation.held_out`).
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

from wav.evaluation.evaluate import EvaluationSettings
from wav.io.files import write_json

log = logging.getLogger(__name__)


def without_simulator(settings: EvaluationSettings, out: Path, checkpoint: str) -> dict[str, Any]:
    """Write ``metrics.json`` with every variant not applicable, and the empty folders of the stage's outputs.

    Records and pictures of earlier evaluations in ``out`` are removed.

    Returns:
        The content of ``metrics.json``.
    """
    suite = settings.data.suite
    reason = f"not applicable, suite {suite!r} has no simulator"
    log.warning("evaluation: %s; held-out demonstrations are all there is to see", reason)
    for name in ("episodes", "videos", "strips", "predictions"):
        shutil.rmtree(out / name, ignore_errors=True)
        (out / name).mkdir(parents=True)
    metrics = {
        "suite": suite,
        "seed": settings.eval_libero.seed,
        "checkpoint": checkpoint,
        "execute_steps": settings.eval_libero.execute_steps,
        "not_applicable": dict.fromkeys(settings.eval_libero.variants, reason),
    }
    write_json(out / "metrics.json", metrics)
    return metrics
