"""Latent trajectory planning: the paper's Algorithm 1 with Eq. 4 and 5 (section 4.3); comments give its line numbers.

The planner keeps two Gaussians over *initial noise*, one for the future video and one for the value trajectory, and
moves them toward the noises whose predicted returns score best. It sees the model only through
:class:`~wav.planning.types.PlannerModel`, so that a test can hand it planted scores, and it draws every number from a
:class:`~wav.planning.types.Noise` that depends on the row alone: a row's plan does not depend on what else rides in the
batch. Letters and shapes are those of :mod:`wav.planning.types`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from wav.planning import Variant
from wav.planning.checks import check_finite, check_request
from wav.planning.scores import SCORES, phi
from wav.planning.types import PUBLISHED, Gaussian, Iteration, Levels, Noise, Plan, PlannerModel, Returns, best, pick

if TYPE_CHECKING:
    from wav.config import PlannerSettings


@dataclass(frozen=True)
class Planner:
    """Plans with a world model.

    Args:
        model: the world model behind its protocol.
        settings: section ``planner``; ``iterations`` 0 is no planning.
        returns: normalised value trajectories (..., A, Cv) to returns (..., A) in reward units.
        levels: noise levels of what the experts read; the default is as published.
    """

    model: PlannerModel
    settings: PlannerSettings
    returns: Returns
    levels: Levels = PUBLISHED

    def plan(
        self,
        context: Any,
        noise: Noise,
        *,
        variant: Variant = "planned",
        warm: tuple[Tensor, Tensor] | None = None,
        with_value: bool = False,
    ) -> Plan:
        """Search, then sample both noises once and decode the actions.

        Args:
            context: the model's handle of B observations.
            noise: draws for the B rows.
            variant: "planned"; "unplanned" samples at N(0, I); "temperature" searches too, then samples with mean zero
                and the standard deviation that the search ended with (the control of what the means add). All three
                decode the same standard normal draws.
            warm: previous plan's :attr:`Plan.means`, used when ``settings.warm_start``.
            with_value: also denoise and return the value trajectory of the value noise that is acted on.

        Raises:
            ConfigError: planning, or a value, is asked of a model without value expert; an unknown variant.
            CheckpointError: the model's scores or actions are not finite.
        """
        settings, shapes = self.settings, self.model.shapes
        check_request(shapes, settings, variant, with_value)
        z_vid = noise("act.video", shapes.video)  # the draws of line 13, the same in every variant
        z_val = None if shapes.value is None else noise("act.value", shapes.value)
        history: tuple[Iteration, ...] = ()
        if settings.iterations and variant != "unplanned" and z_val is not None:
            f_vid, f_val = Gaussian.standard(z_vid), Gaussian.standard(z_val)  # 1: f(0)
            if warm is not None and settings.warm_start:
                f_vid, f_val = Gaussian(warm[0], f_vid.std), Gaussian(warm[1], f_val.std)
            history = self.search(context, noise, f_vid, f_val)
            z_vid, z_val = self.choose(history, z_vid, z_val, variant)
        z_act = noise("act.action", shapes.action)
        actions, values = self.decode(context, z_vid, z_val, z_act, with_value)
        check_finite(actions, history)
        return Plan(actions, values, z_vid, z_val, history)

    def search(self, context: Any, noise: Noise, f_vid: Gaussian, f_val: Gaussian) -> tuple[Iteration, ...]:
        """The iterations from the distributions ``f_vid`` and ``f_val`` of video and value noise."""
        model, settings, shapes = self.model, self.settings, self.model.shapes
        M, N = settings.video_samples, settings.value_samples
        history: list[Iteration] = []
        for k in range(settings.iterations):  # 2: for iteration k
            z_vid = f_vid.sample(noise("plan.video", (M, *shapes.video), k))  # 3: (B, M, V, C, Ff, h, w)
            x = model.video_features(context, z_vid, self.levels.video)  # 4: features of all m
            z_val = f_val.sample(noise("plan.value", (M, N, *(shapes.value or ())), k))  # 5, 6: (B, M, N, A, Cv)
            values = model.denoise_value(x, z_val, settings.score_steps or settings.denoise_steps)  # 7: U(m, n)
            scores = self.scores(values)  # 8: SNR(m, n)
            elite_vid = best(phi(scores, settings), settings.video_elites)  # 8, 10: phi(m), top K1
            elite_val = best(scores.flatten(1), settings.value_elites)  # 11: top K2 of all M * N
            f_vid = self.fit(f_vid, pick(z_vid, elite_vid))  # 10: Eq. 4
            f_val = self.fit(f_val, pick(z_val.flatten(1, 2), elite_val))  # 11: Eq. 5
            history.append(Iteration(f_vid, f_val, z_vid, z_val, values, scores, elite_vid, elite_val))
        return tuple(history)

    def choose(
        self, history: Sequence[Iteration], z_vid: Tensor, z_val: Tensor, variant: Variant
    ) -> tuple[Tensor, Tensor]:
        """Noises acted on, from the search and standard normal draws of both: (B, V, C, Ff, h, w) and (B, A, Cv)."""
        last, settings = history[-1], self.settings
        f_vid, f_val = last.video, last.value
        if variant == "temperature":
            f_vid, f_val = (Gaussian(torch.zeros_like(f.mean), f.std) for f in (f_vid, f_val))
        chosen = f_vid.sample(z_vid), f_val.sample(z_val)  # 13: sample z_vid*, z_val*
        if settings.act_on == "winner" and variant == "planned":
            chosen = last.winner
        if settings.gate:  # where candidates do not differ there is nothing to choose
            differ = phi(history[0].scores, settings).std(1, correction=0) >= settings.gate
            pairs = zip(chosen, (z_vid, z_val), strict=True)
            gated_vid, gated_val = (torch.where(differ.view(-1, *(1,) * (z.ndim - 1)), c, z) for c, z in pairs)
            chosen = gated_vid, gated_val
        return chosen

    def decode(
        self, context: Any, z_vid: Tensor, z_val: Tensor | None, z_act: Tensor, with_value: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Actions (B, A, Ca) and, on demand, values (B, A, Cv) of one video and one value noise per row.

        Where training showed the action expert the true values (``levels.value`` below 1), it reads the values that
        the value noise leads to, noised to that level again by the same noise; else the noise itself.
        """
        model, steps, level = self.model, self.settings.denoise_steps, self.levels.value
        x, values, tokens = model.video_features(context, z_vid[:, None], self.levels.video), None, z_val
        if z_val is not None and (with_value or level < 1):
            values = model.denoise_value(x, z_val[:, None, None], steps)[:, 0, 0]
            tokens = torch.lerp(values, z_val, level)
        return model.denoise_action(context, x, tokens, z_act, steps, level), values  # 14: predict action by Eq. 3

    def scores(self, values: Tensor) -> Tensor:
        """Scores (B, M, N) of normalised values (B, M, N, A, Cv)."""
        return SCORES[self.settings.score](self.returns(values), self.settings)

    def fit(self, old: Gaussian, elites: Tensor) -> Gaussian:
        """Eq. 4 or 5 over elites (B, K, *shape), then variance decay and smoothing (alpha, beta: share of the new)."""
        alpha, beta = self.settings.alpha, self.settings.beta
        mean, std = elites.mean(1), self.settings.sigma_decay * elites.std(1, correction=0)
        return Gaussian(alpha * mean + (1 - alpha) * old.mean, beta * std + (1 - beta) * old.std)
