"""The reference implementation's departures from the paper, kept to meet its recorded runs; no product code knows them.

The planner: scores reach other videos than those that earned them, elites of all views share one mean and standard
deviation, standard deviations are unbiased, and returns are scored normalised. The model: values reported beside an
action are stale, and actions that are asked for together with a video read the video at each step's own noise level.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from wav.config import PlannerSettings
from wav.flow_matching import euler_step, frame_timesteps, inference_sigmas, join_frames
from wav.model import WAVTransformer
from wav.planning.planner import Planner
from wav.planning.types import Gaussian, PlannerModel


def tiled(samples: Tensor) -> Tensor:
    """Reorder (B, M, N, ...) so that position (m, n) holds flat candidate j = n * M + m: the reference's tiling."""
    B, M, N = samples.shape[:3]
    return samples.reshape(B, N, M, *samples.shape[3:]).transpose(1, 2)


def untiled(samples: Tensor) -> Tensor:
    """Inverse of :func:`tiled`."""
    return samples.transpose(1, 2).reshape(samples.shape)


class _TiledModel:
    """Candidate j is denoised on video j % M but credited to video j // N."""

    def __init__(self, model: PlannerModel) -> None:
        self.model, self.shapes = model, model.shapes

    def video_features(self, context: Any, noise: Tensor, levels: tuple[float, ...]) -> Any:
        return self.model.video_features(context, noise, levels)

    def denoise_value(self, features: Any, noise: Tensor, steps: int) -> Tensor:
        return untiled(self.model.denoise_value(features, tiled(noise), steps))

    def denoise_action(self, *arguments: Any) -> Tensor:
        return self.model.denoise_action(*arguments)


class ReferencePlanner(Planner):
    """Our planner, making the reference's mistakes."""

    def __init__(self, model: PlannerModel, settings: PlannerSettings) -> None:
        super().__init__(_TiledModel(model), settings, lambda values: values[..., -1])

    def scores(self, values: Tensor) -> Tensor:
        """SNR with an unbiased standard deviation."""
        returns = self.returns(values)
        return returns.mean(-1) / (returns.std(-1) + self.settings.epsilon)

    def fit(self, old: Gaussian, elites: Tensor) -> Gaussian:
        """One mean and one unbiased standard deviation for all views; NaN with one elite."""
        over = (1, 2) if elites.ndim == 7 else (1,)  # (B, K, V, C, Ff, h, w), or values
        alpha, beta, decay = self.settings.alpha, self.settings.beta, self.settings.sigma_decay
        mean, std = (x.squeeze(1) for x in (elites.mean(over, keepdim=True), elites.std(over, keepdim=True)))
        return Gaussian(alpha * mean + (1 - alpha) * old.mean, beta * (decay * std) + (1 - beta) * old.std)


class ReferenceModel:
    """What the reference computes with the transformer while acting, and we do not.

    Args:
        model: the transformer.
        memory: clean latents (B, V, C, Fm, h, w).
        text: instruction embeddings (B, L, Ct).
        mask: (B, L), 1 for a token.
        history: (B, 1, Ca), or None.
    """

    def __init__(
        self, model: WAVTransformer, memory: Tensor, text: Tensor, mask: Tensor | None, history: Tensor | None
    ) -> None:
        self.model, self.memory, self.text, self.mask, self.history = model, memory, text, mask, history

    def _video(self, future: Tensor, sigma: float) -> Any:
        level = torch.full((len(future),), sigma * 1000.0)
        timestep = frame_timesteps(self.memory.shape[3], future.shape[3], level)
        return self.model.video(join_frames(self.memory, future), timestep, self.text, self.mask)

    def _value_features(self, video: Tensor, value: Tensor) -> Sequence[Tensor]:
        """The value expert's features of pure noise ``value`` (B, A, Cv) on pure noise ``video``, both at t = 1000."""
        features = self._video(video, 1.0).features
        return self.model.value(value, torch.full((len(value),), 1000.0), features).features  # type: ignore[no-any-return]

    @torch.no_grad()
    def stale_value(self, video: Tensor, value: Tensor, steps: int) -> Tensor:
        """Values (B, A, Cv) as the reference reports them beside actions.

        The value expert ran once, on pure noise; every Euler step reads the head again on those same hidden states,
        told only the step's timestep.
        """
        hidden, expert, values = self._value_features(video, value)[-1], self.model.expert("value"), value
        for sigma, after in pairwise(inference_sigmas(steps).tolist()):
            _, e = expert.time_embed(torch.full((len(value), 1), sigma * 1000.0))
            values = euler_step(values, expert.head(hidden, e), sigma, after)
        return values

    @torch.no_grad()
    def denoise_jointly(self, video: Tensor, value: Tensor, action: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """Actions (B, A, Ca) and future latents (B, V, C, Ff, h, w) when both are asked for.

        The action expert then reads the video at each step's own noise level, not at t = 1000; the value features stay
        those of the first pass.
        """
        future, actions, reads = video, action, self._value_features(video, value)
        for sigma, after in pairwise(inference_sigmas(steps).tolist()):
            output = self._video(future, sigma)
            level = torch.full(action.shape[:1], sigma * 1000.0)
            velocity = self.model.action(actions, level, output.features, reads, self.history)
            actions = euler_step(actions, velocity, sigma, after)
            future = euler_step(future, output.velocity[:, :, :, -future.shape[3] :], sigma, after)
        return actions, future
