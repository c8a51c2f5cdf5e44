"""What one forward of training needs: samples by role, and every random number, drawn beforehand on the CPU.

The generators are named by (seed, purpose, step, micro-batch of the global batch), so a run that is killed and
resumed, on as many ranks or others, repeats exactly what it would have drawn. :mod:`wav.training.objectives` computes
the losses from what is drawn here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from wav.cuda_graphs import mapped
from wav.data.windows import WindowBatch
from wav.flow_matching import draw_sigmas
from wav.seeding import torch_generator

if TYPE_CHECKING:
    from wav.config import CouplingSettings, TrainSettings
    from wav.data.windows import WindowDataset


@dataclass(frozen=True)
class Roles:
    """How many samples of a micro-batch play each role; rows are ordered action, value, video."""

    action: int
    value: int
    video: int


@dataclass(frozen=True)
class Draws:
    """Every random number of one forward: B samples, n of a role, Rv and Ra draws per sample, A chunk steps.

    A level of 1 is pure noise, which is what planning starts from. Below it the sample sees its true future, and what
    it decodes can follow it (section ``coupling``). A role without samples has empty tensors.
    """

    memory_rate: Tensor  #: (B,)
    memory_noise: Tensor  #: (B, V, C, Fm, h, w)
    video_level: Tensor  #: (B,)
    video_noise: Tensor  #: (B, V, C, Ff, h, w)
    value_level: Tensor  #: (n, Rv), of value samples
    value_noise: Tensor  #: (n, Rv, A, Cv)
    condition_level: Tensor  #: (n,), of the value tokens that action samples read
    condition_noise: Tensor  #: (n, A, Cv)
    action_level: Tensor  #: (n, Ra), of action samples
    action_noise: Tensor  #: (n, Ra, A, Ca)


@dataclass(frozen=True)
class StepInputs:
    """One micro-batch: windows (their captions already dropped), draws and roles."""

    batch: WindowBatch
    draws: Draws
    roles: Roles

    def to(self, device: torch.device) -> StepInputs:
        """The same on ``device``; the host waits for no copy from page-locked memory."""
        return cast(StepInputs, mapped(self, lambda value: value.to(device, non_blocking=True)))

    def pin_memory(self) -> StepInputs:
        """The same in page-locked memory."""
        return cast(StepInputs, mapped(self, torch.Tensor.pin_memory))


class SeededRandom:
    """Random numbers of one micro-batch: a CPU generator per purpose, whose calls follow one another.

    It is named by (seed, purpose, *name); ``name`` is (step, micro-batch, 0).
    """

    def __init__(self, seed: int, *name: int | str) -> None:
        self._seed, self._name = seed, name
        self._generators: dict[str, torch.Generator] = {}

    def _of(self, purpose: str) -> torch.Generator:
        if purpose not in self._generators:
            self._generators[purpose] = torch_generator(self._seed, purpose, *self._name)
        return self._generators[purpose]

    def uniform(self, purpose: str, shape: tuple[int, ...]) -> Tensor:
        """Uniform in [0, 1)."""
        return torch.rand(shape, generator=self._of(purpose))

    def normal(self, purpose: str, shape: tuple[int, ...]) -> Tensor:
        """Standard normal."""
        return torch.randn(shape, generator=self._of(purpose))

    def levels(self, purpose: str, shape: tuple[int, ...]) -> Tensor:
        """Uniform over the training levels (:func:`wav.flow_matching.draw_sigmas`)."""
        return draw_sigmas(shape, self._of(purpose))


def share(index: int, size: int, probability: float) -> int:
    """How many of the ``size`` samples of micro-batch ``index`` fall on a role of this probability.

    Running totals are rounded, so the share over a run is exact even where one micro-batch holds one sample, and
    it is the same on every rank (which sharded gradients need).
    """
    return round((index + 1) * size * probability) - round(index * size * probability)


def drop_captions(batch: WindowBatch, drop: Tensor, captions: WindowDataset) -> WindowBatch:
    """Replace embedding AND mask of the samples in ``drop`` (B,) by those of the empty instruction."""
    if not bool(drop.any()):
        return batch
    chosen = drop.view(-1, 1)
    text = torch.where(chosen.unsqueeze(-1), captions.empty_text.to(batch.text.dtype), batch.text)
    mask = torch.where(chosen, captions.empty_text_mask.to(batch.text_mask.dtype), batch.text_mask)
    return replace(batch, text=text, text_mask=mask)


def coupled_levels(
    count: int, levels: tuple[float, float], pure_noise: float, random: SeededRandom, purpose: str
) -> Tensor:
    """Levels (count,) of what samples are shown of the truth: uniform in ``levels``, or 1 (pure noise).

    A share ``pure_noise`` of the samples is shown pure noise all the same.
    """
    low, high = levels
    level = low + (high - low) * random.uniform(purpose, (count,))
    return torch.where(random.uniform(purpose, (count,)) < pure_noise, 1.0, level)


def draw(
    batch: WindowBatch,
    roles: Roles,
    settings: TrainSettings,
    coupling: CouplingSettings | None,
    random: SeededRandom,
    *,
    has_value: bool,
) -> Draws:
    """Draw the random numbers of a micro-batch on the CPU.

    Without ``coupling`` samples are shown nothing of the truth; ``has_value`` says whether action samples read the
    tokens of a value expert.
    """
    size, (chunk, channels) = len(batch), batch.actions.shape[1:]
    value_channels = batch.values.shape[-1] if batch.values is not None else 0
    value_draws, action_draws = getattr(settings, "value_draws", 1), getattr(settings, "action_draws", 1)
    condition = roles.action if has_value else 0
    seen, read = torch.ones(size - roles.video), torch.ones(condition)
    if coupling is not None and coupling.future:
        seen = coupled_levels(len(seen), coupling.future_levels, coupling.pure_noise, random, "future_level")
    if coupling is not None and coupling.value:
        read = coupled_levels(len(read), coupling.value_levels, coupling.pure_noise, random, "condition_level")
    return Draws(
        memory_rate=random.uniform("memory_noise", (size,)) * settings.memory_noise,
        memory_noise=random.normal("memory_noise", batch.memory.shape),
        video_level=torch.cat([seen, random.levels("video_level", (roles.video,))]),
        video_noise=random.normal("video_noise", batch.future.shape),
        value_level=random.levels("value_level", (roles.value, value_draws)),
        value_noise=random.normal("value_noise", (roles.value, value_draws, chunk, value_channels)),
        condition_level=read,
        condition_noise=random.normal("value_noise", (condition, chunk, value_channels)),
        action_level=random.levels("action_level", (roles.action, action_draws)),
        action_noise=random.normal("action_noise", (roles.action, action_draws, chunk, channels)),
    )
