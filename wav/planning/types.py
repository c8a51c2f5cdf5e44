"""What the planner is given and what it returns: shapes, draws, Gaussians over noise, iterations and plans.

Letters: B rows (observations), M video candidates, N value samples of each, K1 and K2 elites, V views, C channels,
Ff future latent frames, h x w latent cells, A action chunk, Cv value channels (the last one is the return), Ca action
channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from wav.seeding import torch_generator

if TYPE_CHECKING:
    from wav.config import CouplingSettings

#: (..., A, Cv) normalised value trajectories -> (..., A) returns in reward units.
Returns = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Levels:
    """Noise levels at which planning reads what the experts were trained to read (section ``coupling``)."""

    video: tuple[float, ...] = (1.0,)  #: Euler steps of the future; features are those of a pass at the last level
    value: float = 1.0  #: of the value tokens that the action is decoded on; 1 is pure noise, as published

    @classmethod
    def of(cls, coupling: CouplingSettings) -> Levels:
        """The levels that section ``coupling`` means."""
        return cls(tuple(coupling.video_schedule), coupling.value_level if coupling.value else 1.0)


#: one pass on pure noise, which is how the published code reads "via flow denoising" (section 4.3)
PUBLISHED = Levels()


@dataclass(frozen=True)
class NoiseShapes:
    """Shape of one noise of each kind: video (V, C, Ff, h, w), value (A, Cv) or None, action (A, Ca)."""

    video: tuple[int, ...]
    value: tuple[int, ...] | None
    action: tuple[int, ...]


class PlannerModel(Protocol):
    """All that planning needs of a world model. ``context`` and ``features`` are the model's own handles."""

    @property
    def shapes(self) -> NoiseShapes:
        """Shapes of the noises; ``value`` is None without a value expert."""
        ...

    def video_features(self, context: Any, noise: Tensor, levels: tuple[float, ...]) -> Any:
        """Features x(m) of noises (B, M, V, C, Ff, h, w), denoised along ``levels`` and read at the last."""
        ...

    def denoise_value(self, features: Any, noise: Tensor, steps: int) -> Tensor:
        """Normalised value trajectories of noises (B, M, N, A, Cv), row (m, n) on candidate m's features."""
        ...

    def denoise_action(
        self, context: Any, features: Any, value: Tensor | None, noise: Tensor, steps: int, value_level: float = 1.0
    ) -> Tensor:
        """Actions (B, A, Ca) of noise of that shape, on one candidate's features and value tokens (B, A, Cv).

        ``value_level``: noise level of the value tokens; 1 is pure noise.
        """
        ...


class Noise(Protocol):
    """Source of standard normal draws."""

    def __call__(self, purpose: str, shape: tuple[int, ...], iteration: int = 0) -> Tensor:
        """Standard normal (B, *shape)."""
        ...


@dataclass(frozen=True)
class RowKey:
    """What names a row's randomness: the seed, the episode and the policy call within it."""

    seed: int
    episode: int | str
    call: int


class SeededNoise:
    """Draws that are a pure function of (seed, purpose, episode, call, iteration), row by row.

    Made on the CPU, so that they are equal on every device.
    """

    def __init__(self, keys: Sequence[RowKey], device: torch.device | str = "cpu"):
        self.keys, self.device = tuple(keys), torch.device(device)

    def __call__(self, purpose: str, shape: tuple[int, ...], iteration: int = 0) -> Tensor:
        """Standard normal (B, *shape); equal keys share their draws."""
        drawn = {
            key: torch.randn(shape, generator=torch_generator(key.seed, purpose, key.episode, key.call, iteration))
            for key in dict.fromkeys(self.keys)
        }
        rows = torch.stack([drawn[key] for key in self.keys])
        if self.device.type == "cuda":  # from page-locked memory the copy waits for nothing that the device still does
            rows = rows.pin_memory()
        return rows.to(self.device, non_blocking=True)


@dataclass(frozen=True)
class Gaussian:
    """Diagonal Gaussian over noise, one per row: mean and std (B, *shape)."""

    mean: Tensor
    std: Tensor

    @classmethod
    def standard(cls, like: Tensor) -> Gaussian:
        """N(0, I) of the shape of ``like``."""
        return cls(torch.zeros_like(like), torch.ones_like(like))

    def sample(self, noise: Tensor) -> Tensor:
        """Map standard normal noise (B, *groups, *shape) to this distribution."""
        index = (slice(None), *(None,) * (noise.ndim - self.mean.ndim))
        return self.mean[index] + self.std[index] * noise


@dataclass(frozen=True)
class Iteration:
    """One iteration k: the distributions after it, and what moved them."""

    video: Gaussian
    value: Gaussian
    z_video: Tensor  #: (B, M, V, C, Ff, h, w), the candidates
    z_value: Tensor  #: (B, M, N, A, Cv), their samples
    values: Tensor  #: (B, M, N, A, Cv) normalised
    scores: Tensor  #: (B, M, N)
    video_elites: Tensor  #: (B, K1) candidates, best first
    value_elites: Tensor  #: (B, K2) flat index m * N + n, best first

    @property
    def winner(self) -> tuple[Tensor, Tensor]:
        """Video and value noise (B, *shape) of the best candidate and its best sample."""
        top = self.video_elites[:, :1]
        z_val, scores = pick(self.z_value, top)[:, 0], pick(self.scores, top)[:, 0]
        return pick(self.z_video, top)[:, 0], pick(z_val, best(scores, 1))[:, 0]


@dataclass(frozen=True)
class Plan:
    """What planning decided for each row, normalised; the value parts are None without a value expert."""

    actions: Tensor  #: (B, A, Ca)
    values: Tensor | None  #: (B, A, Cv), on demand
    z_video: Tensor  #: (B, V, C, Ff, h, w)
    z_value: Tensor | None  #: (B, A, Cv)
    history: tuple[Iteration, ...] = field(default=())

    @property
    def means(self) -> tuple[Tensor, Tensor] | None:
        """Means of the last iteration, shaped as its noises, to warm-start the next plan; None without planning."""
        return (self.history[-1].video.mean, self.history[-1].value.mean) if self.history else None


def best(scores: Tensor, count: int) -> Tensor:
    """Indices (B, count) of the highest scores (B, n), best first; ties keep their order."""
    return scores.sort(dim=1, descending=True, stable=True).indices[:, :count]


def pick(samples: Tensor, index: Tensor) -> Tensor:
    """Rows (B, K, ...) of samples (B, n, ...) at index (B, K)."""
    return samples[torch.arange(len(samples), device=samples.device)[:, None], index]
