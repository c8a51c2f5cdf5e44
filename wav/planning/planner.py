"""Latent trajectory planning: the paper's Algorithm 1 with Eq. 4 and 5 (section 4.3).

The planner keeps two Gaussians over *initial noise*, one for the future video and one for the value trajectory,
and moves them toward the noises whose predicted returns score best. It sees the model only through
:class:`PlannerModel`, so that a test can hand it planted scores, and it draws every number from a :class:`Noise`
that is a function of the row alone: a row's plan does not depend on what else rides in the batch.

Shapes: B rows (observations), M video candidates, N value samples of each, K1/K2 elites, V views, C channels,
Ff future latent frames, A action chunk, Cv value channels (the last one is the return).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

import torch
from torch import Tensor

from wav.errors import CheckpointError, ConfigError
from wav.planning import shortcuts
from wav.seeding import torch_generator

if TYPE_CHECKING:
    from wav.config import PlannerSettings

Variant = Literal["planned", "unplanned", "temperature"]
VARIANTS: tuple[Variant, ...] = ("planned", "unplanned", "temperature")

#: (..., A, Cv) normalised value trajectories -> (..., A) returns in reward units.
Returns = Callable[[Tensor], Tensor]


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

    def video_features(self, context: Any, noise: Tensor, steps: int) -> Any:
        """Features x(m) of noises (B, M, V, C, Ff, h, w); ``steps`` > 1 denoises before the features are read."""
        ...

    def denoise_value(self, features: Any, noise: Tensor, steps: int, **options: Any) -> Tensor:
        """Normalised value trajectories of noises (B, M, N, A, Cv), row (m, n) on candidate m's features.

        ``options``: ``reuse``, where ``planner.reuse_reads`` is above 1.
        """
        ...

    def denoise_action(self, context: Any, features: Any, value: Tensor | None, noise: Tensor, steps: int) -> Tensor:
        """Actions (B, A, Ca) of noise of that shape, on one candidate's features and pure value noise (B, A, Cv)."""
        ...


class StaleValueModel(PlannerModel, Protocol):
    """What :attr:`Compat.stale_value` needs beyond that (:mod:`wav.inference.reference`)."""

    def stale_value(self, features: Any, noise: Tensor, steps: int) -> Tensor:
        """Values (B, A, Cv) as the reference reports them beside actions."""
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

    def __init__(self, keys: Sequence[RowKey], device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32):
        self.keys, self.device, self.dtype = tuple(keys), torch.device(device), dtype

    def __call__(self, purpose: str, shape: tuple[int, ...], iteration: int = 0) -> Tensor:
        """Standard normal (B, *shape); equal keys share their draws."""
        drawn = {
            key: torch.randn(shape, generator=torch_generator(key.seed, purpose, key.episode, key.call, iteration))
            for key in dict.fromkeys(self.keys)
        }
        return torch.stack([drawn[key] for key in self.keys]).to(self.device, self.dtype)


@dataclass(frozen=True)
class Compat:
    """Where the reference implementation departs from the paper; every switch off is the paper."""

    tiled_attribution: bool = False  #: candidate j is denoised on video j % M but credited to video j // N
    pooled_views: bool = False  #: elites of all views share one mean and standard deviation
    unbiased_std: bool = False  #: 1/(K-1) in the elites' and the score's standard deviation (NaN with one elite)
    normalised_returns: bool = False  #: scores on z-scored, symlogged returns
    stale_value: bool = False  #: the value reported beside an action is read from pure noise's features throughout


PAPER = Compat()
REFERENCE = Compat(True, True, True, True, True)


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
        groups = noise.ndim - self.mean.ndim
        index = (slice(None), *(None,) * groups)
        return self.mean[index] + self.std[index] * noise

    def toward(self, elites: Tensor, settings: PlannerSettings, compat: Compat, over: tuple[int, ...]) -> Gaussian:
        """Eq. 4/5 over elites (B, K, *shape), then variance decay and smoothing (alpha, beta: share of the new)."""
        mean = elites.mean(over, keepdim=True)
        std = elites.std(over, correction=int(compat.unbiased_std), keepdim=True)
        mean, std = mean.squeeze(1).expand_as(self.mean), std.squeeze(1).expand_as(self.std)
        return Gaussian(
            settings.alpha * mean + (1 - settings.alpha) * self.mean,
            settings.beta * (settings.sigma_decay * std) + (1 - settings.beta) * self.std,
        )


@dataclass(frozen=True)
class Iteration:
    """One iteration k: the distributions after it, and what moved them."""

    video: Gaussian
    value: Gaussian
    values: Tensor  #: (B, M, N, A, Cv) normalised
    scores: Tensor  #: (B, M, N)
    video_elites: Tensor  #: (B, K1) candidates, best first
    value_elites: Tensor  #: (B, K2) flat index m * N + n, best first


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
        """Means of the last iteration, to warm-start the next plan; None without planning."""
        return (self.history[-1].video.mean, self.history[-1].value.mean) if self.history else None


def score_returns(returns: Tensor, settings: PlannerSettings, compat: Compat = PAPER) -> Tensor:
    """Scores (...) of returns (..., A): the paper's SNR, or the shift-invariant lower bound mean - c std."""
    mean, std = returns.mean(-1), returns.std(-1, correction=int(compat.unbiased_std))
    if settings.score == "lower_bound":
        return mean - settings.lower_bound_c * std
    return mean / (std + settings.epsilon)


def best(scores: Tensor, count: int) -> Tensor:
    """Indices (B, count) of the highest scores (B, n), best first; ties keep their order."""
    return scores.sort(dim=1, descending=True, stable=True).indices[:, :count]


def pick(samples: Tensor, index: Tensor) -> Tensor:
    """Rows (B, K, ...) of samples (B, n, ...) at index (B, K)."""
    return samples[torch.arange(len(samples), device=samples.device)[:, None], index]


def tiled(samples: Tensor) -> Tensor:
    """Reorder (B, M, N, ...) so that position (m, n) holds flat candidate j = n * M + m: the reference's tiling."""
    B, M, N = samples.shape[:3]
    return samples.reshape(B, N, M, *samples.shape[3:]).transpose(1, 2)


def untiled(samples: Tensor) -> Tensor:
    """Inverse of :func:`tiled`."""
    return samples.transpose(1, 2).reshape(samples.shape)


def search(
    model: PlannerModel,
    context: Any,
    settings: PlannerSettings,
    noise: Noise,
    returns: Returns,
    start: tuple[Gaussian, Gaussian],
    compat: Compat = PAPER,
) -> tuple[Iteration, ...]:
    """Algorithm 1, lines 2-12: K iterations from the ``start`` distributions of video and value noise.

    The approximations (``settings.survivors``, ``settle``, ``score_steps``, ``reuse_reads``) are
    :mod:`wav.planning.shortcuts`.
    """
    video, value = start
    history: list[Iteration] = []
    M, N, shapes = settings.video_samples, settings.value_samples, model.shapes
    video_over = (1, 2) if compat.pooled_views else (1,)
    steps = settings.score_steps or settings.denoise_steps
    reuse = {"reuse": settings.reuse_reads} if settings.reuse_reads > 1 else {}

    def evaluate(features: Any, z: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        if compat.tiled_attribution:
            values = untiled(model.denoise_value(features, tiled(z), steps, **reuse))
        else:
            values = model.denoise_value(features, z, steps, **reuse)
        return values, score_returns(returns(values), settings, compat)  # (B, M, N)

    for k in range(settings.iterations):
        done = shortcuts.settled(history, settings.settle)
        if done is not None and bool(done.all()):
            break
        z_vid = video.sample(noise("plan.video", (M, *shapes.video), k))  # (B, M, V, C, Ff, h, w)
        features = model.video_features(context, z_vid, settings.video_denoise_steps)
        z_val = value.sample(noise("plan.value", (M, N, *(shapes.value or ())), k))  # (B, M, N, A, Cv)
        if settings.survivors:
            selecting = cast(shortcuts.SelectingModel, model)
            values, scores = shortcuts.evaluate_survivors(
                selecting, features, z_val, settings.survivors, steps, evaluate
            )
        else:
            values, scores = evaluate(features, z_val, steps)
        elite_vid = best(scores.amax(2), settings.video_elites)  # by phi(m) = max_n score(m, n)
        elite_val = best(scores.flatten(1), settings.value_elites)  # of all M * N
        found = (
            video.toward(pick(z_vid, elite_vid), settings, compat, video_over),
            value.toward(pick(z_val.flatten(1, 2), elite_val), settings, compat, (1,)),
        )
        if done is not None:
            found = shortcuts.hold(done, video, found[0]), shortcuts.hold(done, value, found[1])
        video, value = found
        history.append(Iteration(video, value, values, scores, elite_vid, elite_val))
    return tuple(history)


def plan(
    model: PlannerModel,
    context: Any,
    settings: PlannerSettings,
    noise: Noise,
    returns: Returns,
    *,
    variant: Variant = "planned",
    warm: tuple[Tensor, Tensor] | None = None,
    with_value: bool = False,
    compat: Compat = PAPER,
) -> Plan:
    """Algorithm 1: search (lines 2-12), then sample z_vid, z_val once and decode the actions (13-14).

    Args:
        model: the world model behind its protocol.
        context: the model's handle of B observations.
        settings: planner section; ``iterations`` 0 is no planning.
        noise: draws for the B rows.
        returns: normalised value trajectories (..., A, Cv) to returns (..., A) in reward units.
        variant: "planned"; "unplanned" samples at N(0, I); "temperature" searches too, then samples with mean
            zero and the standard deviation that the search ended with (the control of what the means add).
            All three decode the same standard normal draws.
        warm: previous plan's :attr:`Plan.means`, used when ``settings.warm_start``.
        with_value: also denoise and return the value trajectory of z_val.
        compat: the reference's departures from the paper.

    Raises:
        ConfigError: planning, or a value, is asked of a model without value expert; an unknown variant.
        CheckpointError: the model's scores or actions are not finite.
    """
    shapes = model.shapes
    _check_request(shapes, settings, variant, with_value)
    eps_vid = noise("act.video", shapes.video)
    eps_val = None if shapes.value is None else noise("act.value", shapes.value)
    history: tuple[Iteration, ...] = ()
    z_vid, z_val = eps_vid, eps_val
    if settings.iterations and variant != "unplanned" and eps_val is not None:
        start = (Gaussian.standard(eps_vid), Gaussian.standard(eps_val))
        if warm is not None and settings.warm_start:
            start = (Gaussian(warm[0], start[0].std), Gaussian(warm[1], start[1].std))
        scored = (lambda values: values[..., -1]) if compat.normalised_returns else returns
        history = search(model, context, settings, noise, scored, start, compat)
        video, value = history[-1].video, history[-1].value
        if variant == "temperature":
            video, value = (Gaussian(torch.zeros_like(g.mean), g.std) for g in (video, value))
        z_vid, z_val = video.sample(eps_vid), value.sample(eps_val)
    features = model.video_features(context, z_vid[:, None], settings.video_denoise_steps)
    values = None
    if with_value and z_val is not None:
        if compat.stale_value:
            values = cast(StaleValueModel, model).stale_value(features, z_val, settings.denoise_steps)
        else:
            values = model.denoise_value(features, z_val[:, None, None], settings.denoise_steps)[:, 0, 0]
    eps_act = noise("act.action", shapes.action)
    actions = model.denoise_action(context, features, z_val, eps_act, settings.denoise_steps)
    _check_finite(actions, history)
    return Plan(actions, values, z_vid, z_val, history)


def _check_request(shapes: NoiseShapes, settings: PlannerSettings, variant: str, with_value: bool) -> None:
    """Refuse what the model or the planner cannot do."""
    if variant not in VARIANTS:
        raise ConfigError(f"variant = {variant!r}: unknown; use one of {', '.join(VARIANTS)}")
    if shapes.value is not None:
        return
    if settings.iterations and variant != "unplanned":
        raise ConfigError(
            f"planner.iterations = {settings.iterations}: the model has no value expert to plan with; "
            "set planner.iterations: 0 or act unplanned"
        )
    if with_value:
        raise ConfigError("with_value = True: the model has no value expert; leave it False")


def _check_finite(actions: Tensor, history: Sequence[Iteration]) -> None:
    """One check after the loop, so that the loop never waits for the device."""
    finite = [(step.scores.isfinite() | step.scores.isneginf()).all() for step in history] + [
        torch.isfinite(actions).all()
    ]
    if not bool(torch.stack(finite).all()):
        bad = next(i for i, ok in enumerate(finite) if not bool(ok))
        what = f"scores of iteration {bad + 1}" if bad < len(history) else "actions"
        raise CheckpointError(f"planner: the {what} are not finite; check the checkpoint and the value statistics")


def spread(history: Sequence[Iteration]) -> dict[str, Tensor]:
    """Per row and iteration, (B, K): best score, mean standard deviation and root-mean-square mean of both noises."""
    if not history:
        return {}
    return {
        "score": torch.stack([step.scores.flatten(1).amax(1) for step in history], 1),
        **{
            f"{name}_{kind}": torch.stack([_size(getattr(getattr(step, kind), name)) for step in history], 1)
            for name in ("mean", "std")
            for kind in ("video", "value")
        },
    }


def _size(tensor: Tensor) -> Tensor:
    """Root mean square per row (B,)."""
    return tensor.flatten(1).square().mean(1).sqrt()
