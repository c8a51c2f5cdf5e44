"""The output folder of a training stage: weights, metrics, curves and where everything is kept.

It is assembled beside its final name and renamed at the end, so it is complete or absent. Every stage leaves the files
that dvc.yaml declares, also the one that has nothing to train.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from wav.data.statistics import Statistics
from wav.io.files import MANIFEST, atomic_folder, canonical_digest, file_records, write_json
from wav.io.storage.base import ObjectStore, disk_errors
from wav.io.storage.commit import Manifest, publish, seal
from wav.model import WAVTransformer
from wav.model.loading import save_model as save_weights
from wav.training.ema import Ema
from wav.training.inputs import Inputs
from wav.training.spec import CHECKPOINT_FILE, TrainSpec

FORMAT = 1
Metrics = dict[str, float | int | str]


def collect_state(model: torch.nn.Module, ema: Ema | None, prefix: str) -> dict[str, torch.Tensor]:
    """Whole float32 weights on the CPU: averaged where they were trained, as they are where frozen.

    A collective: every rank calls it. ``prefix`` is what ``ema``'s names have in front of the model's.
    """
    averaged = ema.names() if ema is not None else set()
    state = {name: tensor.detach().float().cpu() for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        if ema is not None and prefix + name in averaged:
            state[name] = ema.full(prefix + name).cpu().clone()
        elif hasattr(parameter, "ds_tensor"):
            from deepspeed.runtime.zero import GatheredParameters

            with GatheredParameters([parameter]):
                state[name] = parameter.detach().float().cpu().clone()
    return state


def save_model(model: WAVTransformer, state: dict[str, torch.Tensor], folder: Path) -> None:
    """Write whole float32 weights of ``model`` as diffusers does (config.json and safetensors)."""
    with disk_errors(folder):
        save_weights(model, folder, state)


def publish_model(spec: TrainSpec, store: ObjectStore, folder: Path) -> Manifest:
    """Upload a folder of weights as ``<prefix>/model``; returns the manifest with version ids."""
    seal(folder, {"stage": spec.stage, "key": spec.key})
    manifest = publish(store, folder, f"{spec.prefix}/model")
    (folder / MANIFEST).unlink()
    return manifest


def write_output(
    spec: TrainSpec, inputs: Inputs, model_folder: Path, curves: Path | None, metrics: Metrics, uploaded: Manifest
) -> None:
    """Assemble the output folder; ``model_folder`` is moved into it.

    Statistics and conventions are copied from ``inputs``; ``curves`` is dvclive's folder ``plots``, where there is one.
    Where the disk is full (StorageError), the old output folder, if any, stays.
    """
    with atomic_folder(spec.paths.output) as folder:
        shutil.move(str(model_folder), str(folder / "model"))
        (folder / "plots").mkdir()
        if curves is not None and curves.is_dir():
            shutil.copytree(curves, folder / "plots", dirs_exist_ok=True)
        inputs.episodes.statistics.save(folder / "episodes_statistics.json")
        if spec.stage != "pretrain_video":  # without a value expert: of nothing
            values = inputs.rewards.statistics if inputs.rewards is not None else Statistics({})
            values.save(folder / "rewards_statistics.json")
        conventions = inputs.episodes.conventions.to_json()
        write_json(folder / "conventions.json", conventions)
        write_json(folder / "metrics.json", metrics)
        write_json(
            folder / CHECKPOINT_FILE,
            {
                "format": FORMAT,
                "stage": spec.stage,
                "key": spec.key,
                "steps": metrics["steps"],
                "store": spec.store,
                "prefix": spec.prefix,
                "objects": [
                    {
                        "key": f"{spec.prefix}/model/{entry.path}",
                        "version": entry.version,
                        "size": entry.bytes,
                        "sha256": entry.sha256,
                    }
                    for entry in uploaded.files
                ],
                "model_digest": model_digest(folder / "model"),
                "inputs": spec.inputs,
                "latents": inputs.latents.digest,
                "statistics": inputs.statistics,
                "conventions": conventions,
                "coupling": spec.coupling.model_dump(mode="json"),
            },
        )


def model_digest(folder: Path) -> str:
    """Digest of a model folder's files."""
    return canonical_digest({record.path: record.sha256 for record in file_records(folder)})
