"""The sections of ``params.yaml``, one frozen class each: a parameter's type, default and range.

What it means stands in params.yaml, behind its value. A new parameter is a field here and a line there.
:mod:`wav.config` puts the sections together.
"""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Annotated, ClassVar, Literal

from pydantic import AliasChoices, Field, field_validator, model_validator

from wav.data.names import LIBERO_SUITES, full_name, joined, own_task
from wav.data.sources import SOURCES
from wav.data.sources.options import AlohaHdf5Options, LeRobotOptions, LiberoHdf5Options, RobomimicHdf5Options
from wav.errors import shown
from wav.planning import VARIANTS, Variant
from wav.planning.scores import SCORES
from wav.section import Name, Section, Switch


class DataSettings(Section):
    """What a sample is: shared by every stage. Times are in environment steps (20 Hz), sizes in pixels."""

    suites: tuple[Name, ...] = Field(("tabletop",), min_length=1, validation_alias=AliasChoices("suites", "suite"))
    tasks: tuple[str, ...] = ("lift_red_cube", "lift_green_cube")
    views: tuple[Name, ...] = Field(("agentview", "wrist"), min_length=1, max_length=3)
    image_height: int = Field(64, ge=16, le=512)
    image_width: int = Field(64, ge=16, le=512)
    render: Literal["fast", "full"] = "fast"
    state_dim: int = Field(8, ge=1, le=1000)
    action_dim: int = Field(7, ge=1, le=1000)
    control_hz: int = Field(20, ge=1, le=10000)
    memory_frames: int = Field(2, ge=1, le=1000)
    memory_horizon: int = Field(60, ge=1)
    future_frames: int = Field(5, ge=1, le=1000)
    frame_stride: int = Field(3, ge=1, le=1000)
    action_chunk: int = Field(15, ge=1, le=10000)
    text_tokens: int = Field(16, ge=4, le=10000)

    @property
    def suite(self) -> str:
        """The suite, or what the suites are together (:mod:`wav.data.names`)."""
        return joined(self.suites)

    @field_validator("suites", mode="before")
    @classmethod
    def _one(cls, value: object) -> object:
        """One suite's name alone, as ``data.suite`` held it."""
        return tuple(value) if isinstance(value, (list, tuple)) else (value,)

    @model_validator(mode="after")
    def _fit_together(self) -> DataSettings:
        odd = next((name for name in self.suites if name not in LIBERO_SUITES), None)
        if odd is not None and len(self.suites) > 1:
            raise ValueError(
                f"suites = {list(self.suites)}: {odd!r} is none of LIBERO's suites ({', '.join(LIBERO_SUITES)}), which "
                "alone share robot, cameras and conventions; name one suite, or several of these"
            )
        for task in self.tasks if len(self.suites) > 1 else ():
            if own_task("", task)[0] not in self.suites:
                raise ValueError(
                    f"tasks: {shown(task)}: of several suites a task is named with its own, such as "
                    f"{full_name(self.suites[0], task)!r}"
                )
        return self


class ModelSettings(Section):
    """Sizes of the WAV transformer (spec: video DiT, value expert, action expert)."""

    layers: int = Field(4, ge=1, le=1000)
    heads: int = Field(4, ge=1, le=1000)
    head_dim: int = Field(32, ge=2, le=4096)
    value_expert: bool = True
    value_heads: int = Field(4, ge=1, le=1000)
    value_head_dim: int = Field(16, ge=2, le=4096)
    action_heads: int = Field(4, ge=1, le=1000)
    action_head_dim: int = Field(24, ge=2, le=4096)
    action_kind: str = "paper"
    max_views: int = Field(3, ge=1, le=100)
    rope_scale: tuple[float, float, float] = (8 / 30, 32.0, 32.0)
    init_from: str = ""


class IngestSettings(Section):
    """Where demonstrations come from."""

    source: str = Field("scripted", description=", ".join(SOURCES))
    path: str = ""
    episodes_per_task: int = Field(60, ge=1)
    first_index: int = Field(1000, ge=1000)
    noise: float = Field(0.15, ge=0, le=1)
    detour: float = Field(0.5, ge=0, le=1)
    styles: dict[
        Literal["direct", "slow", "hesitant", "detour", "fumble", "recover"], Annotated[float, Field(gt=0)]
    ] = Field({"direct": 1.0}, min_length=1)
    min_length: int = Field(8, ge=2)
    seed: int = 0
    libero_hdf5: LiberoHdf5Options = LiberoHdf5Options()
    lerobot: LeRobotOptions = LeRobotOptions()
    robomimic_hdf5: RobomimicHdf5Options = RobomimicHdf5Options()
    aloha_hdf5: AlohaHdf5Options = AlohaHdf5Options()

    @model_validator(mode="after")
    def _known_source(self) -> IngestSettings:
        if self.source not in SOURCES and not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", self.source):
            raise ValueError(
                f"source = {self.source!r}: unknown; use one of {', '.join(SOURCES)}, or module:Class of your own"
            )
        return self


class LabelRewardsSettings(Section):
    """Table 2 and the return."""

    gamma: float = Field(0.99, gt=0, le=1)
    horizon: int = Field(0, ge=0)
    to_end: bool = False
    weight: Literal["1/9", "1/16"] = "1/9"
    arms: Literal[1, 2] = 1


class EncodeSettings(Section):
    """Frames to latents, instructions to embeddings."""

    codec: Literal["pca", "ltx"] = "pca"
    path: str = ""
    patch: int = Field(16, ge=2, le=1024)
    temporal: int = Field(4, ge=1, le=1024)
    channels: int = Field(48, ge=1, le=100000)
    fit_frames: int = Field(4000, ge=10)
    coordinates: bool = True
    text: str = "builtin-small"
    text_dim: int = Field(64, ge=8, le=100000)
    seed: int = 0


class TrainSettings(Section):
    """One training stage (DeepSpeed). ``stage`` names it, so that code which must not import this module can tell."""

    stage: ClassVar[str] = ""
    steps: int = Field(1000, ge=1)
    batch_size: int = Field(32, ge=1, le=100000)
    micro_batch_size: int = Field(0, ge=0)
    streams: int = Field(0, ge=0)
    optimizer: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = Field(1e-3, gt=0)
    muon_learning_rate: float = Field(0.02, gt=0)
    schedule: Literal["constant", "cosine"] = "cosine"
    warmup_steps: int = Field(100, ge=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    weight_decay: float = Field(1e-5, ge=0)
    clip: float = Field(1.0, gt=0)
    ema_decay: float = Field(0.995, ge=0, lt=1)
    caption_dropout: float = Field(0.0, ge=0, le=1)
    memory_noise: float = Field(0.01, ge=0, le=1)
    precision: Literal["fp32", "bf16"] = "fp32"
    zero_stage: Literal[0, 1, 2, 3] = 0
    ranks: int = Field(1, ge=1, le=10000)
    nodes: int = Field(1, ge=1, le=10000, description="machines (WAV_LAUNCHER)")
    gradient_checkpointing: Switch = "off"
    compile: Switch = "auto"
    checkpoint_every: int = Field(500, ge=1)
    keep_last: int = Field(2, ge=1)
    keep_best: int = Field(0, ge=0)
    keep_every: int = Field(0, ge=0)
    log_every: int = Field(20, ge=1)
    validate_every: int = Field(0, ge=0)
    validation_share: float = Field(0.05, ge=0, lt=0.5)
    spike_factor: float = Field(10.0, ge=0)
    max_skipped_steps: int = Field(0, ge=0)
    seed: int = 0

    @model_validator(mode="after")
    def _optimizer_fits(self) -> TrainSettings:
        if self.optimizer == "muon" and (self.zero_stage or self.precision != "fp32"):
            raise ValueError(
                f"optimizer = muon with zero_stage = {self.zero_stage} and precision = {self.precision}: a partition "
                "holds no whole matrix; use adamw, or zero_stage 0 with fp32"
            )
        return self


class PretrainVideoSettings(TrainSettings):
    """Stage 1: the video DiT on future frames."""

    stage: ClassVar[str] = "pretrain_video"
    caption_dropout: float = Field(0.06, ge=0, le=1)
    memory_noise: float = Field(0.1, ge=0, le=1)


class TrainValueSettings(TrainSettings):
    """Stage 2: the value expert on frozen video features."""

    stage: ClassVar[str] = "train_value"
    value_draws: int = Field(4, ge=1, le=1000)


class TrainJointSettings(TrainSettings):
    """Stage 3: everything, with three explicit loss weights."""

    stage: ClassVar[str] = "train_joint"
    action_probability: float = Field(0.7, ge=0, le=1)
    weight_action: float = Field(1.0, ge=0)
    weight_value: float = Field(0.1, ge=0)
    weight_video: float = Field(0.1, ge=0)
    action_draws: int = Field(4, ge=1, le=1000)
    value_draws: int = Field(4, ge=1, le=1000)


#: Noise level: 0 is clean, 1 is pure noise.
Level = Annotated[float, Field(gt=0, le=1)]


class CouplingSettings(Section):
    """What training lets the experts read of the future, and the noise levels at which planning shows it to them.

    Training and planning read the same section, so they cannot disagree; a checkpoint carries it.
    """

    mode: Literal["none", "future", "value", "both"] = "none"
    future_levels: tuple[Level, Level] = (0.35, 0.65)
    value_levels: tuple[Level, Level] = (0.02, 0.3)
    pure_noise: float = Field(0.15, ge=0, le=1)
    video_schedule: tuple[Level, ...] = Field((1.0,), min_length=1)
    value_level: Level = 0.1

    @property
    def future(self) -> bool:
        """Whether value and action samples see the true future."""
        return self.mode in ("future", "both")

    @property
    def value(self) -> bool:
        """Whether the action expert reads the true values."""
        return self.mode in ("value", "both")

    @model_validator(mode="after")
    def _consistent(self) -> CouplingSettings:
        for name in ("future_levels", "value_levels"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name} = [{low:g}, {high:g}]: the lower level comes first")
        levels, (low, high) = self.video_schedule, self.future_levels
        if levels[0] != 1.0 or any(a <= b for a, b in pairwise(levels)):
            raise ValueError(f"video_schedule = {list(levels)}: must begin at 1.0 and fall")
        if not self.future and len(levels) > 1:
            raise ValueError(
                f"video_schedule = {list(levels)}: experts trained with mode = {self.mode} read features of pure noise "
                "alone; set video_schedule to [1.0], or mode to future or both"
            )
        if levels[-1] != 1.0 and not low <= levels[-1] <= high:
            raise ValueError(
                f"video_schedule = {list(levels)}: features are read at {levels[-1]:g}, training shows "
                f"future_levels = [{low:g}, {high:g}]; end the schedule there or widen future_levels"
            )
        if self.mode != "none" and self.pure_noise == 1:
            raise ValueError(f"pure_noise = 1: training shows nothing of mode = {self.mode}; set mode to none")
        if self.future and levels[-1] == 1.0 and high < 1 and not self.pure_noise:
            raise ValueError(
                "pure_noise = 0: training never shows features of pure noise, where video_schedule = [1] reads them; "
                f"end the schedule in future_levels = [{low:g}, {high:g}] or raise pure_noise"
            )
        low, high = self.value_levels
        if self.value and not low <= self.value_level <= high:
            raise ValueError(
                f"value_level = {self.value_level:g}: training shows value_levels = [{low:g}, {high:g}]; "
                "choose it there or widen value_levels"
            )
        return self


class PlannerSettings(Section):
    """Algorithm 1. ``alpha``/``beta`` follow the paper's formula: the share of the NEW elites' statistics."""

    iterations: int = Field(3, ge=0, le=1000)
    video_samples: int = Field(8, ge=1, le=10000)
    value_samples: int = Field(4, ge=1, le=10000)
    video_elites: int = Field(4, ge=1)
    value_elites: int = Field(8, ge=1)
    alpha: float = Field(0.5, ge=0, le=1)
    beta: float = Field(0.5, ge=0, le=1)
    sigma_decay: float = Field(0.9, gt=0, le=1)
    score: str = "snr"
    score_penalty: float = Field(1.0, ge=0)
    phi: Literal["max", "mean"] = "max"
    epsilon: float = Field(1e-6, gt=0)
    denoise_steps: int = Field(10, ge=1, le=10000)
    act_on: Literal["sample", "winner"] = "sample"
    gate: float = Field(0.0, ge=0)
    warm_start: bool = False
    score_steps: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _consistent(self) -> PlannerSettings:
        if self.video_elites > self.video_samples:
            raise ValueError(
                f"video_elites = {self.video_elites}: must be at most video_samples = {self.video_samples}; "
                "lower video_elites or raise video_samples"
            )
        if self.value_elites > self.video_samples * self.value_samples:
            raise ValueError(
                f"value_elites = {self.value_elites}: must be at most video_samples * value_samples = "
                f"{self.video_samples * self.value_samples}; lower value_elites or raise the samples"
            )
        if self.score_steps > self.denoise_steps:
            raise ValueError(
                f"score_steps = {self.score_steps}: must be at most denoise_steps = {self.denoise_steps}; "
                "lower score_steps or raise denoise_steps"
            )
        if self.score not in SCORES:
            raise ValueError(f"score = {self.score!r}: unknown; use one of {', '.join(SCORES)}")
        return self


class EvalLiberoSettings(Section):
    """Closed-loop evaluation (on data.suites)."""

    episodes_per_task: int = Field(25, ge=1, le=50)
    first_state: int = Field(0, ge=0, le=950)  # no demonstration begins below 1000
    variants: tuple[Variant, ...] = Field(VARIANTS, min_length=1)
    execute_steps: int = Field(8, ge=1, le=10000)
    batch_size: int = Field(8, ge=1, le=100000)
    budget: Literal["protocol", "reference"] = "protocol"
    within: float = Field(1.5, ge=0)
    within_steps: int = Field(0, ge=0)
    swapped_episodes: int = Field(10, ge=0, le=50)
    ranked_states: int = Field(2, ge=0, le=50)
    ranked_candidates: int = Field(32, ge=2)
    videos: int = Field(4, ge=0)
    video_chunks: int = Field(2, ge=1, le=1000)
    seed: int = 7

    def states(self, count: int) -> range:
        """The first ``count`` initial states of an evaluation."""
        return range(self.first_state, self.first_state + count)


class ExportSettings(Section):
    """The self-contained policy folder."""

    name: str = Field("wav-tabletop", pattern=r"^[A-Za-z0-9._-]+$")
    dtype: Literal["float32", "bfloat16"] = "float32"
    compile: Switch = "auto"
    encoders: Literal["named", "copied"] = "named"
    license: str = Field("apache-2.0", pattern=r"^[a-z0-9][a-z0-9.-]*$")
    datasets: tuple[Annotated[str, Field(pattern=r"^[\w-][\w.-]*/[\w.-]+$")], ...] = ()
