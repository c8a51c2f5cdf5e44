"""The sections of ``params.yaml``, one frozen class each: what a parameter means, its default and its range.

A new parameter is a field here and a line in params.yaml. :mod:`wav.config` puts the sections together.
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

    suites: tuple[Name, ...] = Field(
        ("tabletop",),
        min_length=1,
        validation_alias=AliasChoices("suites", "suite"),
        description="task suites: tabletop, or one or more of libero_spatial, libero_object, ...",
    )
    tasks: tuple[str, ...] = Field(
        ("lift_red_cube", "lift_green_cube"), description="of the suite; of several: SUITE/TASK; empty: all"
    )
    views: tuple[Name, ...] = Field(("agentview", "wrist"), min_length=1, max_length=3)
    image_height: int = Field(64, ge=16, le=512)
    image_width: int = Field(64, ge=16, le=512)
    render: Literal["fast", "full"] = Field(
        "fast", description="fast: decimated visual meshes, no reflections, no MSAA"
    )
    state_dim: int = Field(8, ge=1, le=1000)
    action_dim: int = Field(7, ge=1, le=1000)
    control_hz: int = Field(20, ge=1, le=10000)
    memory_frames: int = Field(2, ge=1, le=1000, description="memory frames, the current one included")
    memory_horizon: int = Field(60, ge=1, description="training memories are drawn from the last this many steps")
    future_frames: int = Field(5, ge=1, le=1000, description="raw future frames: 1 + codec.temporal * k")
    frame_stride: int = Field(3, ge=1, le=1000, description="environment steps between future frames")
    action_chunk: int = Field(15, ge=1, le=10000, description="actions decoded per call")
    text_tokens: int = Field(16, ge=4, le=10000, description="instruction length in tokens, padded")

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
    value_expert: bool = Field(True, description="false: the GE-ACT-like baseline without value and planning")
    value_heads: int = Field(4, ge=1, le=1000)
    value_head_dim: int = Field(16, ge=2, le=4096)
    action_heads: int = Field(4, ge=1, le=1000)
    action_head_dim: int = Field(24, ge=2, le=4096)
    action_kind: str = Field("paper", description="class of the action expert, a name in wav/model/experts.py")
    max_views: int = Field(3, ge=1, le=100)
    rope_scale: tuple[float, float, float] = Field(
        (8 / 30, 32.0, 32.0), description="RoPE position of one latent (frame seconds, pixels, pixels)"
    )
    init_from: str = Field(
        "", description="weights to start from: hub id, folder or file of LTX-Video / GE-Base / WAV; empty: random"
    )


class IngestSettings(Section):
    """Where demonstrations come from."""

    source: str = Field("scripted", description=", ".join(SOURCES))
    path: str = Field("", description="folder of the dataset (all but scripted)")
    episodes_per_task: int = Field(60, ge=1)
    first_index: int = Field(1000, ge=1000, description="first demonstration's initial state; 0-49 are evaluation's")
    noise: float = Field(
        0.15, ge=0, le=1, description="execution noise, as a share of the action range; labels stay clean"
    )
    detour: float = Field(
        0.5, ge=0, le=1, description="share of demonstrations that begin with a detour to a random pose"
    )
    styles: dict[
        Literal["direct", "slow", "hesitant", "detour", "fumble", "recover"], Annotated[float, Field(gt=0)]
    ] = Field({"direct": 1.0}, min_length=1, description="scripted: shares of the ways in which the expert moves")
    min_length: int = Field(8, ge=2, description="shorter episodes are quarantined")
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
    horizon: int = Field(0, ge=0, description="steps summed in a return; 0: data.action_chunk")
    to_end: bool = Field(False, description="sum to the episode's end instead (falls toward success; see docs)")
    weight: Literal["1/9", "1/16"] = "1/9"
    arms: Literal[1, 2] = 1


class EncodeSettings(Section):
    """Frames to latents, instructions to embeddings."""

    codec: Literal["pca", "ltx"] = "pca"
    path: str = Field("", description="ltx: hub id or folder of the VAE; pca: folder of a codec to keep")
    patch: int = Field(16, ge=2, le=1024, description="pca: pixels per latent cell (LTX: 32)")
    temporal: int = Field(4, ge=1, le=1024, description="pca: frames per latent frame (LTX: 8)")
    channels: int = Field(48, ge=1, le=100000, description="latent channels (LTX: 128)")
    fit_frames: int = Field(4000, ge=10, description="pca: frames the bases are fitted on")
    coordinates: bool = Field(True, description="pca: two of the channels carry the cell's position")
    text: str = Field("builtin-small", description="builtin-small, or hub id / folder of a T5 encoder")
    text_dim: int = Field(64, ge=8, le=100000, description="builtin-small: width of the embeddings (T5-XXL: 4096)")
    seed: int = 0


class TrainSettings(Section):
    """One training stage (DeepSpeed). ``stage`` names it, so that code which must not import this module can tell."""

    stage: ClassVar[str] = ""
    steps: int = Field(1000, ge=1)
    batch_size: int = Field(32, ge=1, le=100000, description="global batch: over all ranks and accumulation steps")
    micro_batch_size: int = Field(0, ge=0, description="samples per rank and forward; 0: batch_size / ranks")
    streams: int = Field(
        0, ge=0, description="0: windows of all shards are mixed; else each rank reads shards of its own (streaming)"
    )
    optimizer: Literal["adamw", "muon"] = Field(
        "adamw", description="muon: on the blocks' matrices, AdamW on the rest (zero_stage 0, fp32)"
    )
    learning_rate: float = Field(1e-3, gt=0)
    muon_learning_rate: float = Field(0.02, gt=0, description="muon: of the matrices; learning_rate is the rest's")
    schedule: Literal["constant", "cosine"] = "cosine"
    warmup_steps: int = Field(100, ge=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    weight_decay: float = Field(1e-5, ge=0)
    clip: float = Field(1.0, gt=0)
    ema_decay: float = Field(0.995, ge=0, lt=1)
    caption_dropout: float = Field(0.0, ge=0, le=1)
    memory_noise: float = Field(0.01, ge=0, le=1, description="memory frames: z <- (1-r) z + r noise, r ~ U[0, this]")
    precision: Literal["fp32", "bf16"] = "fp32"
    zero_stage: Literal[0, 1, 2, 3] = 0
    ranks: int = Field(1, ge=1, le=10000, description="processes on this node (GPUs)")
    nodes: int = Field(1, ge=1, le=10000, description="machines (WAV_LAUNCHER)")
    gradient_checkpointing: Switch = Field(
        "off", description="recompute blocks backwards; auto: only as many layers as the free memory asks for"
    )
    compile: Switch = Field(
        "auto", description="blocks by torch.compile; auto: on a GPU (on a CPU it was measured not to pay)"
    )
    checkpoint_every: int = Field(500, ge=1)
    keep_last: int = Field(2, ge=1, description="checkpoints kept: the newest this many,")
    keep_best: int = Field(0, ge=0, description="and the best this many by validation loss,")
    keep_every: int = Field(0, ge=0, description="and those at multiples of this many steps (0: none)")
    log_every: int = Field(20, ge=1)
    validate_every: int = Field(0, ge=0, description="steps between validation losses; 0: a tenth of the run")
    validation_share: float = Field(
        0.05, ge=0, lt=0.5, description="share of episodes held out for the validation loss"
    )
    spike_factor: float = Field(
        10.0, ge=0, description="stop where a recorded loss is this many times the recent rows' median; 0: never"
    )
    max_skipped_steps: int = Field(0, ge=0, description="steps with gradients that are not finite it may drop")
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
    value_draws: int = Field(4, ge=1, le=1000, description="(level, noise) draws per sample and video pass")


class TrainJointSettings(TrainSettings):
    """Stage 3: everything, with three explicit loss weights."""

    stage: ClassVar[str] = "train_joint"
    action_probability: float = Field(0.7, ge=0, le=1, description="share of samples that are action samples")
    weight_action: float = Field(1.0, ge=0)
    weight_value: float = Field(0.1, ge=0)
    weight_video: float = Field(0.1, ge=0)
    action_draws: int = Field(4, ge=1, le=1000, description="(level, noise) draws per action sample and video pass")
    value_draws: int = Field(4, ge=1, le=1000, description="(level, noise) draws per value sample and video pass")


#: Noise level: 0 is clean, 1 is pure noise.
Level = Annotated[float, Field(gt=0, le=1)]


class CouplingSettings(Section):
    """What training lets the experts read of the future, and the noise levels at which planning shows it to them.

    Training and planning read the same section, so they cannot disagree; a checkpoint carries it.
    """

    mode: Literal["none", "future", "value", "both"] = Field(
        "none", description="none: pure noise alone, the paper's published form; else what action and value are tied to"
    )
    future_levels: tuple[Level, Level] = Field(
        (0.35, 0.65), description="range of noise levels of the true future that value and action samples see"
    )
    value_levels: tuple[Level, Level] = Field(
        (0.02, 0.3), description="range of noise levels of the true values that the action expert reads"
    )
    pure_noise: float = Field(0.15, ge=0, le=1, description="share of samples that see pure noise all the same")
    video_schedule: tuple[Level, ...] = Field(
        (1.0,), min_length=1, description="noise levels of planning's video passes; features are read at the last"
    )
    value_level: Level = Field(0.1, description="noise level of the values that planning decodes the action on")

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

    iterations: int = Field(3, ge=0, le=1000, description="K; 0: no planning")
    video_samples: int = Field(8, ge=1, le=10000, description="M")
    value_samples: int = Field(4, ge=1, le=10000, description="N")
    video_elites: int = Field(4, ge=1, description="K1")
    value_elites: int = Field(8, ge=1, description="K2")
    alpha: float = Field(0.5, ge=0, le=1)
    beta: float = Field(0.5, ge=0, le=1)
    sigma_decay: float = Field(0.9, gt=0, le=1)
    score: str = Field("snr", description="how returns are scored, a name in wav/planning/scores.py")
    score_penalty: float = Field(1.0, ge=0, description="standard deviations that lower_bound and ensemble take off")
    phi: Literal["max", "mean"] = Field("max", description="a candidate's score: the best or the mean of its N")
    epsilon: float = Field(1e-6, gt=0)
    denoise_steps: int = Field(10, ge=1, le=10000, description="Euler steps of value and action flows")
    act_on: Literal["sample", "winner"] = Field(
        "sample", description="sample: noises of the refitted Gaussians (the paper's); winner: the best candidate's"
    )
    gate: float = Field(0.0, ge=0, description="act unplanned where candidates' scores deviate by less; 0: never")
    warm_start: bool = False
    score_steps: int = Field(0, ge=0, description="Euler steps of the values that are scored; 0: denoise_steps")

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
    variants: tuple[Variant, ...] = Field(VARIANTS, min_length=1)
    execute_steps: int = Field(8, ge=1, le=10000, description="actions executed per policy call")
    batch_size: int = Field(8, ge=1, le=100000, description="the one padded batch shape the policy is called with")
    budget: Literal["protocol", "reference"] = "protocol"
    within: float = Field(
        1.5, ge=0, description="success is also reported within this many times the direct expert's steps; 0: not"
    )
    within_steps: int = Field(
        0, ge=0, description="the same within this many steps, whoever demonstrated; 0: as the direct expert's"
    )
    swapped_episodes: int = Field(
        10, ge=0, le=50, description="episodes per task with another task's instruction (0: none)"
    )
    ranked_states: int = Field(
        2, ge=0, le=50, description="initial states per task from which candidates are executed to rank scores; 0: none"
    )
    ranked_candidates: int = Field(32, ge=2, description="candidates executed from each of these episodes' states")
    videos: int = Field(4, ge=0, description="episodes per variant written as mp4")
    video_chunks: int = Field(2, ge=1, le=1000, description="chunks rolled out by generate_video for the pictures")
    seed: int = 7


class ExportSettings(Section):
    """The self-contained policy folder."""

    name: str = Field("wav-tabletop", pattern=r"^[A-Za-z0-9._-]+$")
    dtype: Literal["float32", "bfloat16"] = "float32"
    compile: Switch = Field(
        "auto", description="plan on compiled code and CUDA graphs; auto: on a GPU; no effect where CPU kernels run"
    )
    encoders: Literal["named", "copied"] = Field(
        "named", description="frozen encoders of a hub id: named (fetched where the export is loaded) or copied"
    )
    license: str = Field("apache-2.0", pattern=r"^[a-z0-9][a-z0-9.-]*$", description="of the weights, for the card")
    datasets: tuple[Annotated[str, Field(pattern=r"^[\w-][\w.-]*/[\w.-]+$")], ...] = Field(
        (), description="hub ids of what it was trained on, for the card"
    )
