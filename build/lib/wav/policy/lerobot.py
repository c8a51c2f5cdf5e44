"""Exports that LeRobot loads as well: ``wav export EXPORT --lerobot FOLDER``.

The folder is the export with LeRobot's own files beside it: ``config.json`` for the plug-in
(``clients/lerobot_policy_wav``) and the processors with the export's statistics. LeRobot is not needed to write them.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from wav.config import DataSettings
from wav.data.conventions import wrist_views
from wav.data.statistics import KeyStatistics, Statistics
from wav.errors import CheckpointError, DataError
from wav.io.files import atomic_folder, read_json, write_json, write_manifest
from wav.io.readers import understood
from wav.policy.export import CARD, FORMAT, VERSION, verify_export
from wav.policy.results import Results

STATE, ACTION = "observation.state", "action"
_NORMS = {"VISUAL": "IDENTITY", "STATE": "QUANTILES", "ACTION": "QUANTILES"}
_USAGE = """
## LeRobot

With the plug-in `lerobot_policy_wav` of wav beside LeRobot:

    lerobot-eval --policy.path=USER/NAME --env.type=libero --env.task=libero_10
"""


def export_lerobot(export: Path, out: Path) -> Path:
    """Write an export with LeRobot's files beside its own; the folder stays an export.

    Raises:
        DataError: ``out`` exists. CheckpointError: the export is damaged.
    """
    manifest = verify_export(export)
    if out.exists():
        raise DataError(f"{out}: exists; name a new folder")
    path = export / "settings.json"
    settings = read_json(path, "export the policy again", CheckpointError)
    with understood(path, "export the policy again", CheckpointError):
        data = DataSettings.model_validate(settings["data"])
        variant = "planned" if settings["model"]["value_expert"] else "unplanned"
    statistics, steps = Statistics.load(export / "statistics.json"), Results.load(export).execute_steps
    with atomic_folder(out) as folder:
        for name in [*(record["path"] for record in manifest["files"]), CARD]:
            if (export / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(export / name, folder / name)
        if (folder / CARD).is_file() and _USAGE not in (card := (folder / CARD).read_text()):
            (folder / CARD).write_text(card.replace("tags: [", "tags: [lerobot, ", 1) + _USAGE)
        write_json(folder / "config.json", _config(data, variant, steps))
        _write_processors(folder, data, statistics)
        content = {key: value for key, value in manifest.items() if key not in ("format", "version", "files")}
        write_manifest(folder, FORMAT, VERSION, content, exclude=(CARD,))
    return out


def features(data: DataSettings) -> dict[str, str]:
    """LeRobot's feature -> view. The first views are named as LeRobot's LIBERO environment and datasets name theirs."""
    wrists = wrist_views(data.views)
    firsts = dict.fromkeys(wrists[:1], "image2")
    firsts |= dict.fromkeys([view for view in data.views if view not in wrists][:1], "image")
    return {f"observation.images.{firsts.get(view, view)}": view for view in data.views}


def _shapes(data: DataSettings) -> tuple[dict[str, Any], dict[str, Any]]:
    """Features that go in, and the one that comes out."""
    size = [3, data.image_height, data.image_width]
    images = {name: {"type": "VISUAL", "shape": size} for name in features(data)}
    taken = {STATE: {"type": "STATE", "shape": [data.state_dim]}, **images}
    return taken, {ACTION: {"type": "ACTION", "shape": [data.action_dim]}}


def _config(data: DataSettings, variant: str, execute_steps: int) -> dict[str, Any]:
    """Content of ``config.json``; what is left out has the plug-in's defaults."""
    taken, made = _shapes(data)
    return {
        "type": "wav",
        "input_features": taken,
        "output_features": made,
        "normalization_mapping": _NORMS,
        "chunk_size": data.action_chunk,
        "n_action_steps": min(execute_steps, data.action_chunk),
        "views": features(data),
        "variant": variant,
        "push_to_hub": False,
    }


def _write_processors(folder: Path, data: DataSettings, statistics: Statistics) -> None:
    """LeRobot's default processors, each a JSON file and the state of its normaliser."""
    taken, made = _shapes(data)
    stats = {STATE: _quantiles(statistics.key("state")), ACTION: _quantiles(statistics.key("action"))}
    flat = {f"{key}.{name}": row for key, rows in stats.items() for name, row in rows.items()}
    rename: dict[str, Any] = {"registry_name": "rename_observations_processor", "config": {"rename_map": {}}}
    batch: dict[str, Any] = {"registry_name": "to_batch_processor", "config": {}}
    device = {"registry_name": "device_processor", "config": {"device": "cpu", "float_dtype": None}}
    processors = {
        "policy_preprocessor": [rename, batch, device, _normaliser("normalizer_processor", taken | made)],
        "policy_postprocessor": [_normaliser("unnormalizer_processor", made), device],
    }
    for name, steps in processors.items():
        for number, step in enumerate(steps):
            if "normalizer" in step["registry_name"]:
                step["state_file"] = f"{name}_step_{number}_{step['registry_name']}.safetensors"
                save_file(flat, folder / step["state_file"])
        write_json(folder / f"{name}.json", {"name": name, "steps": steps})


def _normaliser(name: str, shapes: dict[str, Any]) -> dict[str, Any]:
    return {"registry_name": name, "config": {"eps": 1e-8, "features": shapes, "norm_map": _NORMS}}


def _quantiles(key: KeyStatistics) -> dict[str, Any]:
    """The quantiles between which LeRobot's mode QUANTILES does what :meth:`KeyStatistics.normalize` does.

    They are the key's own, but for dimensions that hardly move, which are not stretched.
    """
    low, high = (key.denormalize(np.full(key.dimension, sign, np.float64)) for sign in (-1, 1))
    rows = {"q01": low, "q99": high, "mean": key.mean, "std": key.std, "min": key.min, "max": key.max}
    return {name: np.asarray(row, np.float32) for name, row in rows.items()}
