"""Sizes that the benchmarks run, as plain data: a machine with torch, diffusers, safetensors and numpy needs no more.

``default`` is params.yaml, ``medium`` the size at which training is compared besides, ``full`` presets/libero.yaml
(2.3 billion parameters) planning as the paper does, ``tiny`` a trial; a test compares them with the files.
Attributes carry the names of the parameter files' sections, which is all that :mod:`wav` reads of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Model:
    """Section ``model``."""

    layers: int
    heads: int
    head_dim: int
    value_heads: int
    value_head_dim: int
    action_heads: int
    action_head_dim: int
    value_expert: bool = True
    action_kind: str = "paper"
    max_views: int = 3
    rope_scale: tuple[float, float, float] = (8 / 30, 32.0, 32.0)

    @property
    def width(self) -> int:
        """Inner width of the video part."""
        return self.heads * self.head_dim


@dataclass(frozen=True)
class Planner:
    """Section ``planner``."""

    iterations: int
    video_samples: int
    value_samples: int
    video_elites: int
    value_elites: int
    alpha: float = 0.5
    beta: float = 0.5
    sigma_decay: float = 0.9
    score: str = "snr"
    score_penalty: float = 1.0
    phi: str = "max"
    act_on: str = "sample"
    gate: float = 0.0
    epsilon: float = 1e-6
    denoise_steps: int = 10
    warm_start: bool = False
    score_steps: int = 0


@dataclass(frozen=True)
class Train:
    """A training stage's section, as far as the losses read it."""

    stage: str
    batch_size: int
    caption_dropout: float = 0.0
    memory_noise: float = 0.01
    learning_rate: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 1e-5
    clip: float = 1.0
    precision: str = "fp32"
    zero_stage: int = 0
    optimizer: str = "adamw"
    schedule: str = "constant"
    warmup_steps: int = 0
    micro_batch_size: int = 0
    gradient_checkpointing: str = "off"
    action_probability: float = 0.8
    weight_action: float = 1.0
    weight_value: float = 0.1
    weight_video: float = 0.1
    action_draws: int = 1
    value_draws: int = 1
    seed: int = 0


@dataclass(frozen=True)
class Sizes:
    """A model, what it looks at, and how it plans."""

    name: str
    model: Model
    planner: Planner
    views: int
    grid: tuple[int, int]  #: latent rows and columns
    memory: int  #: memory frames
    future: int  #: future latent frames
    chunk: int
    latent: int  #: latent channels
    text_tokens: int
    caption: int  #: width of text embeddings
    batch: int  #: training samples of a step
    action_dim: int = 7
    state_dim: int = 8
    value_channels: int = 10

    @property
    def tokens(self) -> int:
        """Video tokens of a sample."""
        return self.views * (self.memory + self.future) * self.grid[0] * self.grid[1]

    @property
    def action_channels(self) -> int:
        """Channels of an action token: action and state."""
        return self.action_dim + self.state_dim


_SMALL_PLANNER = Planner(1, 8, 4, 3, 6, alpha=1.0, beta=0.2, sigma_decay=1.0, score="mean", phi="mean")
_DEFAULT = Sizes(
    name="default",
    model=Model(4, 4, 32, 4, 16, 4, 24),
    planner=_SMALL_PLANNER,
    views=2,
    grid=(4, 4),
    memory=2,
    future=2,
    chunk=15,
    latent=48,
    text_tokens=16,
    caption=64,
    batch=32,
)
SIZES = {
    "tiny": replace(
        _DEFAULT,
        name="tiny",
        model=Model(2, 2, 16, 2, 8, 2, 8),
        planner=Planner(1, 2, 2, 1, 2, denoise_steps=2),
        grid=(2, 2),
        chunk=4,
        latent=6,
        batch=4,
    ),
    "default": _DEFAULT,
    "medium": replace(_DEFAULT, name="medium", model=Model(12, 8, 64, 8, 32, 8, 32), batch=8),
    "full": Sizes(
        name="full",
        model=Model(28, 32, 64, 16, 32, 16, 32),
        planner=Planner(3, 30, 5, 27, 15, alpha=0.1, beta=0.1, sigma_decay=0.5),
        views=2,
        grid=(8, 8),
        memory=4,
        future=2,
        chunk=36,
        latent=128,
        text_tokens=128,
        caption=4096,
        batch=128,
    ),
}
