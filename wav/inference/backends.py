"""From a transformer to what the planner needs: one function that picks a backend by name."""

from __future__ import annotations

import logging
import os
import shutil
from typing import TYPE_CHECKING, Literal, get_args

import torch

from wav.errors import ConfigError
from wav.inference.cpu import kernels
from wav.inference.torch import TorchPlannerModel
from wav.planning.types import NoiseShapes

if TYPE_CHECKING:
    from wav.model.transformer import WAVTransformer

log = logging.getLogger(__name__)

Backend = Literal["auto", "torch", "compiled", "cpu"]


def planner_model(model: WAVTransformer, shapes: NoiseShapes, backend: Backend = "auto") -> TorchPlannerModel:
    """The planner's view of a model in evaluation mode, on its device and in its precision.

    Backend ``torch``: the model's own calls. ``cpu``: kernels in C, for float32 on a CPU. ``compiled``: torch.compile
    and CUDA graphs; where the kernels of ``cpu`` run they are faster, and the log says that they are taken instead.
    ``auto``: ``cpu`` where it can, else ``torch``, and always so for an action expert other than the paper's.

    Raises:
        ConfigError: the backend is unknown or cannot compute this model here.
    """
    if backend not in get_args(Backend):
        raise ConfigError(f"backend = {backend!r}: unknown; use auto, torch, compiled or cpu")
    paper = model.config.action_kind == "paper"  # the other backends compute the paper's experts in their own way
    if not paper and backend in ("compiled", "cpu"):
        raise ConfigError(
            f"backend = {backend!r}: computes the paper's action expert alone, and model.action_kind = "
            f"{model.config.action_kind!r}; use 'torch'"
        )
    weight = next(model.parameters())
    if backend == "torch" or not paper:
        return TorchPlannerModel(model, shapes)
    if weight.device.type == "cpu" and weight.dtype == torch.float32 and kernels.available():
        if backend == "compiled":
            log.info("export.compile = on: no effect here, planning runs on the CPU kernels, which are faster")
        return kernels.CpuPlannerModel(model, shapes)
    if backend == "cpu":
        raise ConfigError(
            f"backend = 'cpu': its kernels do not compute {weight.dtype} on {weight.device.type} here "
            "(the log says why where they could not be compiled); use 'auto'"
        )
    if backend == "auto":
        return TorchPlannerModel(model, shapes)
    from wav.inference.compiled import CompiledPlannerModel  # imports the compiler

    return CompiledPlannerModel(model, shapes)


def compiles_here(model: WAVTransformer) -> bool:
    """Whether ``export.compile: auto`` compiles planning: the paper's experts on a GPU, with the compiler's tools.

    Where a tool is missing the log says so: the first plan is no time to find out.
    """
    if next(model.parameters()).device.type != "cuda" or model.config.action_kind != "paper":
        return False
    from torch.utils._triton import has_triton  # imports the compiler

    missing = [] if has_triton() else ["Triton for this GPU"]
    if not any(shutil.which(name) for name in (os.environ.get("CC") or "cc", "gcc", "clang")):
        missing.append("a C compiler")
    if missing:
        log.warning("export.compile = auto: planning is not compiled, this machine has not %s", " or ".join(missing))
    return not missing


def noise_shapes(
    model: WAVTransformer, views: int, grid: tuple[int, int], future_latents: int, action_chunk: int
) -> NoiseShapes:
    """Noise shapes of a model for V views, latent grid (h, w), Ff future latent frames and A actions."""
    config = model.config
    return NoiseShapes(
        video=(views, config.in_channels, future_latents, *grid),
        value=(action_chunk, config.value_in_channels) if model.has_value else None,
        action=(action_chunk, config.action_in_channels),
    )
