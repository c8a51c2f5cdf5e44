"""What one retrain costs at the paper's size: GPU hours, and gigabytes in S3. A projection, not a measurement.

Operations and parameters come from the parameter file (``wav summary``). Bytes per parameter of a checkpoint and bytes
per frame of the stores are measured on a workspace that ran and scaled up. Its model should have millions of
parameters, or what does not grow with them (rows, names, code) counts: ``presets/smoke.yaml`` with ``layers: 4``,
``heads: 4``, ``head_dim: 64``, and ``precision: bf16``, ``zero_stage: 2`` in ``pretrain_video``, gives 18.1 bytes per
parameter, and with its own model 22.

    python benchmarks/cost.py --workspace workspaces/smoke --json benchmarks/results/cost.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from wav.config import Settings, load_settings
from wav.io.files import MANIFEST
from wav.io.storage.commit import read_manifest
from wav.summary import summarise

STAGES = ("pretrain_video", "train_value", "train_joint")
#: LIBERO-10: 500 demonstrations, about 276 steps each; a policy call moves 8 steps, an episode has 520
FRAMES, EPISODE_STEPS, EPISODES = 138_000, 520, 500
UTILISATIONS, A100 = (0.3, 0.4, 0.5), 312e12
GB = 1e9


def checkpoint_bytes(folder: Path) -> tuple[str, float]:
    """Precision of a checkpoint, and its bytes per trained parameter (the average's length says how many)."""
    import torch

    manifest = read_manifest(folder)
    trained = 0
    for path in sorted(folder.glob("rank-*.pt")):
        average = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["ema"]
        trained += sum(tensor.numel() for tensor in tensors(average))
    # rows, random states and names do not grow with the model: the tensors' bytes do
    return str(manifest.meta["precision"]), sum(entry.size for entry in manifest.files) / max(1, trained)


def tensors(tree: Any) -> list[Any]:
    """Every tensor in nested containers."""
    if hasattr(tree, "numel"):
        return [tree]
    values = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (list, tuple)) else ()
    return [tensor for value in values for tensor in tensors(value)]


def frame_bytes(workspace: Path) -> dict[str, float]:
    """Measured bytes per stored latent value and per stored pixel value (should be 4 and 1)."""
    settings = load_settings(workspace / "params.yaml")
    latents = [np.load(workspace / "data/latents" / f"{name}.npy", mmap_mode="r") for name in ("image", "clip")]
    frames, data = len(latents[0]), settings.data
    size = sum((workspace / "data/latents" / f"{name}.npy").stat().st_size for name in ("image", "clip"))
    values = sum(int(array.size) for array in latents)
    pixels = frames * len(data.views) * data.image_height * data.image_width * 3
    stored = sum(path.stat().st_size for path in (workspace / "data/episodes").rglob("*") if path.is_file())
    return {"latent_value": size / values, "pixel_value": stored / pixels}


def storage(
    settings: Settings, facts: dict[str, Any], per_value: dict[str, float], per_parameter: float
) -> dict[str, float]:
    """Gigabytes that one retrain adds to S3, by what they are."""
    sizes, data = facts["sizes"], settings.data
    cells = sizes["views"] * sizes["latent_channels"] * sizes["height"] * sizes["image_width"]
    latents = FRAMES * cells * (1 + sizes["future"]) * per_value["latent_value"]
    episodes = FRAMES * len(data.views) * data.image_height * data.image_width * 3 * per_value["pixel_value"]
    total, weights, kept, sent = facts["parameters"]["total"], 0.0, 0.0, 0.0
    for stage in STAGES:
        train, trained = getattr(settings, stage), facts["stages"][stage]["trained_parameters"]
        checkpoint = trained * per_parameter + (total - trained) * 2  # frozen weights lie in it too, as bf16
        weights += 4 * total
        kept += (train.keep_last + train.keep_best) * checkpoint
        sent += train.steps / train.checkpoint_every * checkpoint
    export = total * (2 if settings.export.dtype == "bfloat16" else 4)
    parts = {
        "episodes, DVC remote (once per dataset)": episodes,
        "latents, DVC remote (once per dataset and codec)": latents,
        "weights of three stages, DVC remote": weights,
        "weights of three stages, run's prefix": weights,
        "resume checkpoints kept": kept,
        "exported policy: DVC remote, and once more if promoted": 2 * export,
        "checkpoint traffic of the run (not kept)": sent,
    }
    return {name: round(value / GB, 1) for name, value in parts.items()}


def compute(settings: Settings, facts: dict[str, Any]) -> dict[str, float]:
    """Operations of one retrain, in EFLOP: three stages, and planning in every call of every episode at full length."""
    found = {stage: facts["stages"][stage]["flops"] / 1e18 for stage in STAGES}
    calls = EPISODES * EPISODE_STEPS / settings.eval_libero.execute_steps
    plan = facts["plan"]
    found["evaluation, planned (at most)"] = calls * plan["total"] / 1e18
    return {name: round(value, 2) for name, value in found.items()}


def main() -> None:
    """Measure, project, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--workspace", type=Path, default=Path(), help="a workspace that ran the pipeline")
    parser.add_argument("--params", type=Path, default=Path("presets/libero.yaml"))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    settings = load_settings(arguments.params)
    facts = summarise(settings, 8)
    sealed = sorted((arguments.workspace / ".wav/training").glob(f"*/*/checkpoints/*/{MANIFEST}"))
    if not sealed:
        parser.error(f"{arguments.workspace}: no checkpoints in .wav/training; run the pipeline there first")
    measured = [checkpoint_bytes(path.parent) for path in sealed]
    precision = settings.train_joint.precision
    same = [size for name, size in measured if name == precision]
    if not same:
        parser.error(f"{arguments.workspace}: no {precision} checkpoint; train one stage with precision: {precision}")
    per_value, per_parameter = frame_bytes(arguments.workspace), min(same)
    work = compute(settings, facts)
    hours = {f"MFU {share:.0%}": round(sum(work.values()) * 1e18 / (A100 * share) / 3600) for share in UTILISATIONS}
    record = {
        "what": "projection from measured bytes and counted operations; no run of this size was made",
        "params": str(arguments.params),
        "assumed": {"frames": FRAMES, "episodes": EPISODES, "A100 peak, FLOP/s": A100},
        "measured": {"bytes per trained parameter of a checkpoint": round(per_parameter, 2), "precision": precision}
        | {f"bytes per {name}": round(value, 3) for name, value in per_value.items()},
        "EFLOP": work,
        "A100 hours": hours,
        "hours on 8 A100": {name: round(value / 8) for name, value in hours.items()},
        "GB in S3": storage(settings, facts, per_value, per_parameter),
    }
    print(json.dumps(record, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
