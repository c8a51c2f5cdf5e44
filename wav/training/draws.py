"""What one forward of training needs: samples by role, and every random number, drawn beforehand on the CPU.

The generators are named by (seed, purpose, step, rank, micro-batch), so a run that is killed and resumed repeats
exactly what it would have drawn. :mod:`wav.training.objectives` computes the losses from what is drawn here.

:class:`Compat` names what the reference's trainer does otherwise, for ``tests/golden``; nothing else switches it on.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import Tensor

from wav.data.windows import WindowBatch
from wav.flow_matching import draw_sigmas
from wav.seeding import torch_generator

if TYPE_CHECKING:
    from wav.config import TrainJointSettings, TrainSettings


@dataclass(frozen=True)
class Compat:
    """Where the reference's trainer departs from what inference does or from the paper; every switch off is ours."""

    random_labels: bool = False  #: a random t beside pure noise: the video's in stage 2, the value's in stage 3
    kept_caption_mask: bool = False  #: a dropped caption keeps its own mask
    shared_memory_rate: bool = False  #: one r for the whole micro-batch
    remixed_memory: bool = False  #: memory mixed with noise again by the video's level: the rate is r * s
    integer_timesteps: bool = False  #: levels rounded to the model's dtype, t cut to an integer
    diluted_video_loss: bool = False  #: squared error of the future over the count of all frames


CLEAN = Compat()
REFERENCE = Compat(True, True, True, True, True, True)


@dataclass(frozen=True)
class Roles:
    """How many samples of a micro-batch play each role; rows are ordered action, value, video."""

    action: int
    value: int
    video: int


@dataclass(frozen=True)
class Draws:
    """Every random number of one forward. B samples, Rv and Ra draws per sample, A chunk steps.

    ``memory_rate`` (B,), ``memory_noise`` (B, V, C, Fm, h, w) and ``future_noise`` (B, V, C, Ff, h, w) always;
    ``video_level`` (video rows,); ``value_level`` (value rows, Rv), ``value_noise`` (value rows, Rv, A, Cv);
    ``condition_noise`` (action rows, A, Cv); ``action_level`` (action rows, Ra), ``action_noise`` (.., Ra, A, Ca).
    ``video_label`` (other rows,) and ``condition_label`` (action rows,) are the levels that pure noise carries: 1.
    """

    memory_rate: Tensor
    memory_noise: Tensor
    future_noise: Tensor
    video_label: Tensor
    video_level: Tensor
    value_level: Tensor
    value_noise: Tensor
    condition_label: Tensor
    condition_noise: Tensor
    action_level: Tensor
    action_noise: Tensor


@dataclass(frozen=True)
class StepInputs:
    """One micro-batch: windows (their captions already dropped), draws and roles."""

    batch: WindowBatch
    draws: Draws
    roles: Roles

    def to(self, device: torch.device) -> StepInputs:
        """The same on ``device``."""
        moved = {f.name: getattr(self.draws, f.name).to(device, non_blocking=True) for f in fields(Draws)}
        return StepInputs(self.batch.to(device), Draws(**moved), self.roles)


class Random(Protocol):
    """Source of the random numbers of one micro-batch; calls of one purpose follow one another."""

    def uniform(self, purpose: str, shape: tuple[int, ...]) -> Tensor:
        """Uniform in [0, 1)."""

    def normal(self, purpose: str, shape: tuple[int, ...]) -> Tensor:
        """Standard normal."""

    def levels(self, purpose: str, shape: tuple[int, ...]) -> Tensor:
        """Uniform over the training levels (:func:`wav.flow_matching.draw_sigmas`)."""


class SeededRandom:
    """One CPU generator per purpose, named by (seed, purpose, *name); ``name`` is (step, rank, micro-batch)."""

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
        """Uniform over the training levels."""
        return draw_sigmas(shape, self._of(purpose))


class Captions(Protocol):
    """The encoded empty instruction, for caption dropout (a WindowDataset is one)."""

    @property
    def empty_text(self) -> Tensor:
        """(L, Ct)."""

    @property
    def empty_text_mask(self) -> Tensor:
        """(L,)."""


def share(index: int, size: int, probability: float) -> int:
    """How many of the ``size`` samples of micro-batch ``index`` fall on a role of this probability.

    Running totals are rounded, so the share over a run is exact even where one micro-batch holds one sample, and
    it is the same on every rank (which sharded gradients need).
    """
    return round((index + 1) * size * probability) - round(index * size * probability)


def split_roles(settings: TrainSettings, size: int, index: int, has_value: bool) -> Roles:
    """Roles of micro-batch ``index`` (counted over the whole run); a pure function of its arguments."""
    if settings.stage == "train_joint":
        probability = cast("TrainJointSettings", settings).action_probability
        action = share(index, size, probability)
        rest = size - action
        value = share(index, size, (1 - probability) / 2) if has_value else 0
        value = min(value, rest)
        return Roles(action, value, rest - value)
    if settings.stage == "train_value":
        return Roles(0, size, 0)
    return Roles(0, 0, size)


def drop_captions(batch: WindowBatch, drop: Tensor, captions: Captions, compat: Compat = CLEAN) -> WindowBatch:
    """Replace embedding AND mask of the samples in ``drop`` (B,) by those of the empty instruction."""
    if not bool(drop.any()):
        return batch
    chosen = drop.view(-1, 1)
    text = torch.where(chosen.unsqueeze(-1), captions.empty_text.to(batch.text.dtype), batch.text)
    if compat.kept_caption_mask:
        return replace(batch, text=text)
    mask = torch.where(chosen, captions.empty_text_mask.to(batch.text_mask.dtype), batch.text_mask)
    return replace(batch, text=text, text_mask=mask)


def draw(
    batch: WindowBatch,
    settings: TrainSettings,
    captions: Captions,
    random: Random,
    *,
    has_value: bool,
    index: int,
    compat: Compat = CLEAN,
) -> StepInputs:
    """Draw everything random of one micro-batch.

    Args:
        batch: B windows on the CPU.
        settings: the stage's section.
        captions: the empty instruction.
        random: where the numbers come from.
        has_value: whether the model has a value expert.
        index: micro-batch counter over the run (decides the roles).
        compat: the reference's departures.
    """
    size = len(batch)
    roles = split_roles(settings, size, index, has_value)
    chunk, channels = batch.actions.shape[1:]
    value_channels = batch.values.shape[-1] if batch.values is not None else 0
    value_draws, action_draws = getattr(settings, "value_draws", 1), getattr(settings, "action_draws", 1)
    condition = roles.action if has_value else 0
    draws = Draws(
        memory_rate=random.uniform("memory_noise", (size,)) * settings.memory_noise,
        memory_noise=random.normal("memory_noise", batch.memory.shape),
        future_noise=random.normal("video_noise", batch.future.shape),
        video_label=torch.ones(size - roles.video),
        video_level=random.levels("video_level", (roles.video,)),
        value_level=random.levels("value_level", (roles.value, value_draws)),
        value_noise=random.normal("value_noise", (roles.value, value_draws, chunk, value_channels)),
        condition_label=torch.ones(condition),
        condition_noise=random.normal("value_noise", (condition, chunk, value_channels)),
        action_level=random.levels("action_level", (roles.action, action_draws)),
        action_noise=random.normal("action_noise", (roles.action, action_draws, chunk, channels)),
    )
    if compat is not CLEAN:
        draws = _as_the_reference(draws, settings, random, compat)
    if settings.caption_dropout > 0:
        drop = random.uniform("caption_dropout", (size,)) < settings.caption_dropout
        batch = drop_captions(batch, drop, captions, compat)
    return StepInputs(batch, draws, roles)


def _as_the_reference(draws: Draws, settings: TrainSettings, random: Random, compat: Compat) -> Draws:
    """Apply the departures that concern what is drawn."""
    rate, level = draws.memory_rate, torch.cat([draws.video_label, draws.video_level])
    if compat.shared_memory_rate:
        rate = rate[:1].expand_as(rate)
    if compat.remixed_memory:
        rate = rate * level
    video, condition = draws.video_label, draws.condition_label
    if compat.random_labels and settings.stage == "train_value":
        video = random.levels("video_label", tuple(video.shape))
    if compat.random_labels and settings.stage == "train_joint":
        condition = random.levels("condition_label", tuple(condition.shape))
    return replace(draws, memory_rate=rate, video_label=video, condition_label=condition)
