"""Open what a training run reads, check that it belongs together, and build the model it starts from."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from wav.data.latents import LatentStore
from wav.data.reward_store import RewardStore
from wav.data.store import EpisodeStore
from wav.data.windows import WindowDataset
from wav.errors import CheckpointError, DataError
from wav.model import WAVTransformer, build_model
from wav.model.build import value_channels
from wav.model.loading import init_from, load_model
from wav.training.spec import TrainSpec, read_checkpoint_file

LOG = logging.getLogger("wav.training")


@dataclass(frozen=True)
class Inputs:
    """Opened stores and the two splits made of them; ``validation`` is None where nothing is held out."""

    episodes: EpisodeStore
    latents: LatentStore
    rewards: RewardStore | None
    train: WindowDataset
    validation: WindowDataset | None

    @property
    def statistics(self) -> dict[str, str]:
        """Digests of the normalisation statistics, by store."""
        digests = {"episodes": self.episodes.statistics.digest}
        if self.rewards is not None:
            digests["rewards"] = self.rewards.statistics.digest
        return digests


def open_inputs(spec: TrainSpec) -> Inputs:
    """Open episodes, latents and (where the stage reads them) rewards.

    Raises:
        DataError: a store is missing, damaged or made from another one.
        CheckpointError: the initial weights were trained on other data.
    """
    episodes = EpisodeStore.open(spec.paths.episodes)
    latents = LatentStore.open(spec.paths.latents, episodes, spec.data)
    rewards = None
    if spec.stage != "pretrain_video" and spec.model.value_expert:
        if spec.paths.rewards is None:
            raise DataError(f"{spec.stage}: no rewards given; make them with `dvc repro label_rewards`")
        rewards = RewardStore.open(spec.paths.rewards, episodes)
    splits = [
        WindowDataset(episodes, latents, rewards, spec.data, split, spec.train.validation_share)
        for split in (("train", "validation") if spec.train.validation_share > 0 else ("train",))
    ]
    inputs = Inputs(episodes, latents, rewards, splits[0], splits[1] if len(splits) > 1 else None)
    if spec.paths.init is not None:
        check_init(spec, inputs)
    return inputs


def check_init(spec: TrainSpec, inputs: Inputs) -> None:
    """Refuse initial weights that were trained with other statistics, conventions or latents.

    Raises:
        CheckpointError: names what differs, the weights' and the data's.
    """
    assert spec.paths.init is not None
    trained: dict[str, Any] = read_checkpoint_file(spec.paths.init)
    told, conventions = trained["conventions"], inputs.episodes.conventions.to_json()
    pairs = [("latents", trained["latents"], inputs.latents.digest)]
    pairs += [(f"conventions.{name}", told.get(name), value) for name, value in conventions.items()]
    for name, digest in inputs.statistics.items():  # the first stage had no rewards
        pairs.append((f"statistics.{name}", trained["statistics"].get(name) or digest, digest))
    for name, known, found in pairs:
        if known != found:
            raise CheckpointError(
                f"{spec.paths.init / 'checkpoint.json'}: {name} = {known!r}, the data's is {found!r}; train the "
                "previous stage again on these data (`dvc repro` does)"
            )


def initial_model(spec: TrainSpec, inputs: Inputs) -> WAVTransformer:
    """The model a stage starts from, in float32 on the CPU.

    The first stage builds it from the settings (and loads ``model.init_from``); later ones load the previous stage's.
    The first stage knows no rewards: where they have other channels than it assumed, the value expert begins anew.
    CheckpointError: the previous stage's model has other sizes than the settings say.
    """
    channels = value_channels(spec.data) if inputs.rewards is None else inputs.rewards.values.shape[1]
    sizes = (inputs.latents.image.shape[2], inputs.latents.text.shape[-1], channels)
    if spec.paths.init is None:
        model = build_model(spec.model, spec.data, *sizes, seed=spec.train.seed)
        if spec.model.init_from:
            report = init_from(model, spec.model.init_from)
            LOG.info("started from %s (%d tensors are new)", spec.model.init_from, len(report.missing))
        return model
    folder = spec.paths.init / "model"
    model = load_model(folder, torch.float32)
    if spec.stage == "train_value" and model.config.value_in_channels != channels:
        known = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("value")}
        model = build_model(spec.model, spec.data, *sizes, seed=spec.train.seed)
        model.load_state_dict(known, strict=False)
    model.train()
    with torch.device("meta"):
        wanted = build_model(spec.model, spec.data, *sizes).config
    for name, value in wanted.items():
        found = model.config.get(name)
        written = list(value) if isinstance(value, tuple) else value  # as it is read again
        if not name.startswith("_") and (list(found) if isinstance(found, tuple) else found) != written:
            raise CheckpointError(
                f"{folder}: config {name} = {found!r}, the settings mean {value!r}; train the previous stage again"
            )
    return model


def passes_through(spec: TrainSpec) -> bool:
    """Whether the stage has nothing to train: the value stage of a model without a value expert."""
    return spec.stage == "train_value" and not spec.model.value_expert


def prune_work(spec: TrainSpec, keep: int = 1) -> list[Path]:
    """Work folders of the stage's other runs beyond the newest ``keep``, which may go to free the disk."""
    others = [p for p in spec.work.parent.glob("*") if p.is_dir() and p != spec.work]
    return sorted(others, key=lambda p: p.stat().st_mtime)[: max(0, len(others) - keep)]
