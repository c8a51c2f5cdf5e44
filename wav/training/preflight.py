"""What is found out before a run starts: whether it fits this machine, and whether its inputs are what was made."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING

import psutil
import torch
from torch import nn

from wav.errors import CheckpointError, TrainingError
from wav.io.files import require_free_space
from wav.io.storage.commit import Retention
from wav.training.activations import Sizes, activation_bytes
from wav.training.output import model_digest
from wav.training.spec import read_checkpoint_file
from wav.training.universal import Layout

if TYPE_CHECKING:
    from wav.config import TrainSettings
    from wav.model import WAVTransformer
    from wav.training.engine import World
    from wav.training.inputs import Inputs
    from wav.training.objectives.base import Objective
    from wav.training.spec import TrainSpec


def verify_inputs(spec: TrainSpec, inputs: Inputs) -> None:
    """Compare what the run reads with the digests that its makers wrote down.

    A disk or a cable that flips a bit says nothing, and DVC goes by a file's time and size. The pages are read anyway.
    DataError or CheckpointError where a file changed since it was made.
    """
    inputs.latents.verify()
    inputs.episodes.verify(images=False)
    if inputs.rewards is not None:
        inputs.rewards.verify()
    if spec.paths.init is None:
        return
    folder, made = spec.paths.init / "model", read_checkpoint_file(spec.paths.init)["model_digest"]
    if (found := model_digest(folder)) != made:
        raise CheckpointError(
            f"{folder}: its files have digest {found[:12]}, checkpoint.json says {made[:12]}; remove {folder}, then "
            "train the previous stage again (`dvc repro` does)"
        )


def preflight(spec: TrainSpec, module: nn.Module, layout: Layout, device: torch.device, checkpoint_bytes: int) -> None:
    """Refuse a run that cannot finish on this machine: disk for its checkpoints and weights, memory for its state.

    ``module`` is what is trained, on the CPU, before DeepSpeed has it. The estimate counts what is certain: weights,
    gradients, two moments and the average, cut as ZeRO cuts them; activations are not in it. StorageError: the disk has
    too little room. TrainingError: the memory has.
    """
    every, trained = count_parameters(module)
    keep = Retention(spec.train.keep_last, spec.train.keep_best, spec.train.keep_every)
    kept = min(keep.last + keep.best + 1, 1 + spec.train.steps // spec.train.checkpoint_every)
    if keep.every:
        kept += spec.train.steps // keep.every
    present = len(list((spec.work / "checkpoints").glob("step-*")))
    require_free_space(spec.work, max(1, kept - present) * trained * checkpoint_bytes + 2 * 4 * every)
    needed = state_bytes(every, trained, layout)
    local = 1
    if device.type == "cuda":
        free, where = torch.cuda.mem_get_info(device)[0], f"GPU {device.index}"
    else:
        free, where = psutil.virtual_memory().available, "this machine"
        local = int(os.environ.get("LOCAL_WORLD_SIZE", layout.ranks))  # ranks of this machine share it
    if needed * local > free:
        raise TrainingError(
            f"{spec.stage}: {trained / 1e6:.0f} million parameters on {layout.text} need {needed * local / 2**30:.1f} "
            f"GiB besides activations, {where} has {free / 2**30:.1f} GiB free; use more ranks with a higher "
            "zero_stage, or a smaller model"
        )


def state_bytes(parameters: int, trained: int, layout: Layout) -> int:
    """Bytes that a rank holds between steps: weights, gradients, moments, average (and bf16's master weights)."""
    weight = 2 if layout.precision == "bf16" else 4
    weights = parameters * weight // (layout.ranks if layout.partitioned else 1)
    gradients = trained * weight // (layout.ranks if layout.zero_stage >= 2 else 1)
    moments = trained * (8 if weight == 4 else 12) // (layout.ranks if layout.zero_stage >= 1 else 1)
    return weights + gradients + moments + 4 * trained // layout.ranks


def recorded_bytes(trained: int, ranks: int, settings: TrainSettings) -> int:
    """Bytes that recorded passes need beside :func:`state_bytes`: gradients stay whole, and ZeRO copies them to update.

    ZeRO 1 and 2 lay a rank's part of them in a row, and then in float32 (DeepSpeed 0.19.8).
    """
    weight = 2 if settings.precision == "bf16" else 4
    whole = weight * (trained - trained // ranks) if settings.zero_stage == 2 else 0
    row = (weight if weight == 4 else weight + 4) * trained // ranks if settings.zero_stage else 0
    return whole + row


def layers_to_recompute(
    spec: TrainSpec, inputs: Inputs, objective: Objective, micro: int, world: World
) -> tuple[int, str]:
    """Layers that a pass over ``micro`` samples must recompute to fit beside weights, gradients and moments, and why.

    Between none and all layers the activations shrink by the same amount for each
    (:func:`~wav.training.activations.activation_bytes`, an estimate). The weights are on the CPU still, so what is free
    now is free for all of it; a tenth is left for what is not counted: buffers, fragmentation, the libraries' own.
    Recorded passes keep their memory while the optimiser takes its own, which gradients and activations else leave it.
    A collective: every rank recomputes what the fullest one must, because ZeRO-3 gathers weights in every pass.
    """
    every, trained = count_parameters(objective)
    state = state_bytes(every, trained, Layout(world.ranks, spec.train.zero_stage, spec.train.precision))
    if objective.graphs is not None:
        state += recorded_bytes(trained, world.ranks, spec.train)
    if world.device.type == "cuda":
        free = torch.cuda.mem_get_info(world.device)[0]
    else:
        free = psutil.virtual_memory().available // world.ranks
    sizes = sizes_of(spec, inputs, objective.model)
    kept, least = (
        activation_bytes(sizes, spec.train.model_copy(update={"gradient_checkpointing": switch}), micro)
        for switch in ("off", "on")
    )
    room, most = 0.9 * free - state, spec.model.layers
    too_many = math.ceil(max(0.0, kept - room) / max(1.0, (kept - least) / most))
    layers = world.most(min(most, too_many))
    why = f"{layers} of {most} layers are recomputed: {free / 2**30:.1f} GiB free, about {state / 2**30:.1f} for "
    why += f"weights and optimiser, {least / 2**30:.1f} to {kept / 2**30:.1f} for {micro} samples' activations"
    return layers, why


def count_parameters(module: nn.Module) -> tuple[int, int]:
    """Parameters of a module, all and trained ones."""
    sizes = [(p.numel(), p.requires_grad) for p in module.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, trains in sizes if trains)


def sizes_of(spec: TrainSpec, inputs: Inputs, model: WAVTransformer) -> Sizes:
    """Sizes of a built model and the latents it trains on."""
    _, _, channels, future, height, width = inputs.latents.clip.shape
    channels_of = channels, inputs.latents.text.shape[2], model.config.value_in_channels
    return Sizes.on((future, height, width), channels_of, spec.model, spec.data)
