"""What the reference implementation computes while acting and we do not: kept to meet its recorded runs, nothing else.

The planner's own departures are :class:`wav.planning.planner.Compat`; these two concern the model.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from wav.flow_matching import euler_step, inference_sigmas
from wav.inference.adapter import NOISE_LEVEL, Context, Features, WAVPlannerModel


class ReferencePlannerModel(WAVPlannerModel):
    """A WAVTransformer that also acts the way the reference does."""

    @torch.no_grad()
    def stale_value(self, features: Features, noise: Tensor, steps: int) -> Tensor:
        """Values (B, A, Cv) as the reference reports them beside actions.

        The value expert ran once, on pure ``noise`` (B, A, Cv) at t = 1000; every Euler step reads the head again on
        those same hidden states, told only the step's timestep.
        """
        hidden = self._value_layers(features, noise)[-1]
        expert, values = self.model._expert("value"), self._in(noise)
        for sigma, after, timestep in self._steps(steps, noise.shape[:1]):
            _, _, e = expert.embed(values, timestep, None)
            values = euler_step(values, expert.head(hidden, e), sigma, after)
        return values.float()

    @torch.no_grad()
    def denoise_jointly(
        self, context: Context, video: Tensor, value: Tensor, action: Tensor, steps: int
    ) -> tuple[Tensor, Tensor]:
        """Actions (B, A, Ca) and future latents (B, V, C, Ff, h, w) when both are asked for.

        The action expert then reads the video at each step's own noise level, not at t = 1000; the value features
        stay those of the first pass.
        """
        future, actions = self._in(video), self._in(action)
        conditions = self._value_layers(self.video_features(context, video[:, None], 1), value)
        for sigma, after in pairwise(inference_sigmas(steps).tolist()):
            output = self._video(context, future, sigma)
            level = torch.full(action.shape[:1], sigma * NOISE_LEVEL, device=self.device)
            actions = euler_step(
                actions, self.model.action(actions, level, output.features, conditions, context.history), sigma, after
            )
            assert output.velocity is not None
            future = euler_step(future, output.velocity[:, :, :, -future.shape[3] :], sigma, after)
        return actions.float(), future.float()
