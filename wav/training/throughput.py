"""What a run costs: its tokens and operations per sample, the peak of the device, and the memory it took."""

from __future__ import annotations

import resource
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from wav.config import TrainSettings
    from wav.training.engine import World
    from wav.training.inputs import Inputs
    from wav.training.spec import TrainSpec

#: Dense bf16 peak of a GPU in operations per second, by a part of its name (vendors' data sheets).
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}


def tokens_per_sample(spec: TrainSpec, inputs: Inputs) -> int:
    """Video tokens of a sample: views x latent frames (memory and future) x cells."""
    _, views, _, height, width = inputs.latents.image.shape
    frames = spec.data.memory_frames + inputs.latents.clip.shape[3]
    return int(views * frames * height * width)


def operations_per_sample(spec: TrainSpec, inputs: Inputs, module: nn.Module) -> float:
    """Operations of a training sample by the 6 N D rule (2 forward, 4 backward where trained), attention left out.

    The video transformer sees every video token once, an expert its action tokens once per draw.
    """
    tokens = {"video": float(tokens_per_sample(spec, inputs))}
    for expert in ("value", "action"):
        tokens[expert] = float(spec.data.action_chunk * getattr(spec.train, f"{expert}_draws", 0))
    total = 0.0
    for name, parameter in module.named_parameters():
        expert = name.removeprefix("model.").split(".", 1)[0]
        total += (6 if parameter.requires_grad else 2) * parameter.numel() * tokens[expert]
    return total


def peak_operations(device: torch.device, settings: TrainSettings) -> float | None:
    """Known peak of the device for the run's precision; None for CPUs, fp32 and GPUs not in the table."""
    if device.type != "cuda" or settings.precision != "bf16":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def peak_memory(world: World) -> dict[str, float]:
    """GiB at the peak (a collective): resident on all ranks together, and of the fullest GPU where there are GPUs.

    Each rank counts its own peak, pages that ranks share once per rank.
    """
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    peak: dict[str, float] = {"peak_memory_gib": round(world.mean([resident])[0] * world.ranks, 3)}
    if world.device.type == "cuda":
        peak["peak_gpu_memory_gib"] = round(world.most(torch.cuda.max_memory_allocated(world.device)) / 2**30, 3)
    return peak
