"""Ten recorded losses of every training stage, at the sizes and settings of ``presets/smoke.yaml``.

Data and first weights are planted: plain numbers, named by what they are and by the names that checkpoints have on
disk, so that neither a codec, a reward term nor the order in which modules are made decides them. Everything after them
is the real path: windows, draws, objective, DeepSpeed engine, average, the next stage starting from the last one's
output. float32, one thread, one rank, torch's own operations. After a change that is meant to change losses::

    python -m tests.training.golden_losses --write
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from tests.training.conftest import episode
from wav.config import CouplingSettings, Settings, load_settings
from wav.data.conventions import Conventions
from wav.data.statistics import Statistics, compute_statistics
from wav.data.store import EpisodeStore
from wav.data.windows import WindowDataset
from wav.data.writer import EpisodeStoreWriter
from wav.io.storage import open_store
from wav.model import build_model
from wav.seeding import numpy_generator
from wav.training.engine import World, init_world
from wav.training.inputs import Inputs
from wav.training.loop import Trainer
from wav.training.output import save_model
from wav.training.spec import TrainPaths, TrainSpec, make_spec

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "tests" / "losses"
STAGES = ("pretrain_video", "train_value", "train_joint")
STEPS, EPISODES, VALUES = 10, 8, 10
#: What a row of the record holds of a step's metrics.
KEPT = ("loss", "loss_video", "loss_value", "loss_action", "grad_norm")


def planted(name: str, *shape: int) -> NDArray[np.float32]:
    """Standard normal numbers that depend on the name alone."""
    return numpy_generator(0, "golden losses", name).standard_normal(shape, np.float32)


@dataclass(frozen=True)
class Latents:
    """Stands for a :class:`wav.data.latents.LatentStore`."""

    image: NDArray[np.float32]
    clip: NDArray[np.float32]
    text: NDArray[np.float32]
    text_mask: NDArray[np.bool_]
    instructions: tuple[str, ...]
    empty_text: int = 0
    digest: str = "planted"


@dataclass(frozen=True)
class Rewards:
    """Stands for a reward store."""

    values: NDArray[np.float32]
    statistics: Statistics


def settings_of_the_smoke_run() -> Settings:
    """``presets/smoke.yaml`` in the paper's published form: no coupling, AdamW; ten steps, all of them recorded."""
    found = load_settings(ROOT / "presets" / "smoke.yaml")
    changes = {"steps": STEPS, "log_every": 1, "checkpoint_every": STEPS, "validate_every": STEPS, "optimizer": "adamw"}
    published = {name: getattr(found, name).model_copy(update=changes) for name in STAGES}
    return found.model_copy(update={**published, "coupling": CouplingSettings()})


def plant_inputs(folder: Path, settings: Settings) -> None:
    """``folder/episodes``, and ``folder/latents`` with a manifest and nothing else."""
    with EpisodeStoreWriter(folder / "episodes", Conventions.for_simulator(settings.data, {})) as writer:
        for index in range(EPISODES):
            writer.add(episode(index, settings.data))
    (folder / "latents").mkdir()
    (folder / "latents" / "manifest.json").write_text("{}")


def open_planted(spec: TrainSpec, settings: Settings) -> Inputs:
    """Inputs of a stage: the episodes, and planted latents, embeddings and values for them."""
    data, encode = spec.data, settings.encode
    episodes = EpisodeStore.open(spec.paths.episodes)
    texts = ("", *episodes.instructions)
    frames, views = episodes.frames, len(data.views)
    cells = (data.image_height // encode.patch, data.image_width // encode.patch)
    future = 1 + (data.future_frames - 1) // encode.temporal
    length = np.arange(1, len(texts) + 1) % data.text_tokens + 1
    latents = Latents(
        planted("image", frames, views, encode.channels, *cells),
        planted("clip", frames, views, encode.channels, future, *cells),
        planted("text", len(texts), data.text_tokens, encode.text_dim),
        np.arange(data.text_tokens) < length[:, None],
        texts,
    )
    rewards = None
    if spec.stage != "pretrain_video":
        values = planted("values", frames, VALUES)
        statistics = Statistics({"value": compute_statistics(values, "zscore_symlog", "value statistics")})
        rewards = Rewards(values, statistics)
    train, held_out = (
        WindowDataset(episodes, latents, rewards, data, split, spec.train.validation_share)
        for split in ("train", "validation")
    )
    return Inputs(episodes, latents, rewards, train, held_out)  # type: ignore[arg-type]


def plant_weights(folder: Path, settings: Settings) -> None:
    """A model folder of the preset's sizes: every tensor scaled by its fan-in, no tensor zero."""
    model = build_model(settings.model, settings.data, settings.encode.channels, settings.encode.text_dim, VALUES)
    folder.mkdir()
    save_model(model, {name: tensor.float() for name, tensor in model.state_dict().items()}, folder)
    path = folder / "diffusion_pytorch_model.safetensors"
    state = {}
    for name, tensor in load_file(path).items():
        values = torch.from_numpy(planted(name, *tensor.shape))
        if tensor.ndim > 1:
            state[name] = values / tensor.shape[-1] ** 0.5
        else:
            state[name] = 0.05 * values + (1.0 if "norm" in name else 0.0)
    save_file(state, path, metadata={"format": "pt"})


def run_stage(spec: TrainSpec, settings: Settings, world: World) -> dict[str, Any]:
    """Train one stage; what its record holds."""
    trainer = Trainer(spec, world, open_planted(spec, settings), open_store(spec.store))
    trainer.run()
    steps: list[dict[str, float]] = [{} for _ in range(STEPS)]
    validation: dict[str, float] = {}
    for step, row in trainer.recorder.rows:
        steps[step - 1] |= {name: row[name] for name in KEPT if name in row}
        validation |= {name: value for name, value in row.items() if name.startswith("validation/")}
    return {"stage": spec.stage, "steps": steps, "validation": validation}


def record(folder: Path) -> None:
    """Train the three stages, one after another, and write ``folder/STAGE.json`` each."""
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    torch.set_num_threads(1)
    world, settings, init = init_world("cpu"), settings_of_the_smoke_run(), None
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        plant_inputs(root, settings)
        plant_weights(root / "weights", settings)
        settings = settings.model_copy(
            update={"model": settings.model.model_copy(update={"init_from": str(root / "weights")})}
        )
        for stage in STAGES:
            paths = TrainPaths(root / "episodes", root / "latents", root / stage, root / "cache", init=init)
            spec = make_spec(stage, settings, paths, store=(root / "store").as_uri(), device="cpu", threads=1)
            spec.work.mkdir(parents=True)
            found = run_stage(spec, settings, world)
            (folder / f"{stage}.json").write_text(json.dumps(found, indent=1) + "\n")
            init = root / stage


def main() -> None:
    """Write the records of this machine into a folder."""
    os.environ["WAV_NATIVE"] = "0"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, nargs="?", default=FOLDER)
    parser.add_argument("--write", action="store_true", help=f"replace {FOLDER.relative_to(ROOT)}")
    arguments = parser.parse_args()
    if arguments.folder == FOLDER and not arguments.write:
        sys.exit("give a folder, or --write to replace the records in tests/losses")
    record(arguments.folder)


if __name__ == "__main__":
    main()
