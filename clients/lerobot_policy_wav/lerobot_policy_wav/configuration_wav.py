"""What LeRobot knows of a policy of wav; ``wav export --lerobot`` writes it as ``config.json``."""

from dataclasses import dataclass, field

from lerobot.configs import NormalizationMode, PreTrainedConfig

TRAINING = "a policy of wav is trained by wav's own pipeline (`dvc repro`), and then exported again"


@PreTrainedConfig.register_subclass("wav")
@dataclass
class WavConfig(PreTrainedConfig):
    """Settings of a policy of wav.

    Args:
        chunk_size: actions of a chunk.
        n_action_steps: actions executed of each chunk; as in the evaluation unless changed.
        views: feature -> view of the policy.
        image_rotation: of the images that come in, ``none`` (as a simulator renders) or ``180``; empty: as trained on,
            which is what LeRobot's LIBERO environment and wav's datasets give.
        variant: planned, unplanned or temperature.
        seed: of the policy's noise.
        batch_size: environments planned together; fewer are padded.
    """

    chunk_size: int = 15
    n_action_steps: int = 8
    views: dict[str, str] = field(default_factory=dict)
    image_rotation: str = ""
    variant: str = "planned"
    seed: int = 7
    batch_size: int = 8
    normalization_mapping: dict[str, NormalizationMode] = field(
        default_factory=lambda: {
            "VISUAL": NormalizationMode.IDENTITY,
            "STATE": NormalizationMode.QUANTILES,
            "ACTION": NormalizationMode.QUANTILES,
        }
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.n_action_steps <= self.chunk_size:
            raise ValueError(f"n_action_steps = {self.n_action_steps}: must lie between 1 and {self.chunk_size}")

    def validate_features(self) -> None:
        """Raise ValueError where an image of the policy is missing."""
        if missing := set(self.views) - set(self.image_features):
            raise ValueError(f"input_features: lack {sorted(missing)}; rename yours with --rename_map")

    def get_optimizer_preset(self) -> None:
        """There is none."""
        raise NotImplementedError(TRAINING)

    def get_scheduler_preset(self) -> None:
        """There is none."""

    @property
    def observation_delta_indices(self) -> None:
        """The current observation alone: the policy keeps its own memory."""

    @property
    def action_delta_indices(self) -> list[int]:
        """A chunk."""
        return list(range(self.chunk_size))

    @property
    def reward_delta_indices(self) -> None:
        """No rewards."""
