"""A batch planned in lanes: its rows dealt out to threads, each of which plans its own share from start to end.

Splitting every kernel over the threads makes them meet thousands of times in a call; in lanes they meet once. Where
there are more threads than rows (a robot is one row), the candidates of a large model are dealt out too: they meet
twice an iteration (:class:`CandidateLanes`). Torch's own operations run on the thread that calls them: its OpenMP
threads spin for milliseconds after each operation, on the cores that other lanes and the kernels' threads need. No bit
depends on it, because it is done only where each row's numbers depend on that row alone
(:attr:`wav.inference.adapter.WAVPlannerModel.independent_rows`); for the same reason rows that only pad the batch
are not
planned there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from wav.inference import native
from wav.planning import Variant
from wav.planning.planner import Planner
from wav.planning.types import Gaussian, Iteration, NoiseShapes, Plan, Returns, RowKey, SeededNoise

if TYPE_CHECKING:
    from wav.config import PlannerSettings
    from wav.inference.adapter import Context, Features, WAVPlannerModel

WORTH = 1 << 16
"""Numbers that the memory tokens of a share's candidates are, for a share to be worth a thread: with fewer, Python, of
which one thread runs at a time, takes as long as the kernels do (``benchmarks/latency.py``)."""

Result = TypeVar("Result")


@contextlib.contextmanager
def kernel_threads(model: WAVPlannerModel) -> Iterator[None]:
    """Give torch's threads to the compiled kernels, if ``model`` computes with them; else leave them alone."""
    with native.on_threads(native.threads()) if model.independent_rows else contextlib.nullcontext():
        yield


def plan_rows(
    model: WAVPlannerModel,
    context: Context,
    settings: PlannerSettings,
    keys: Sequence[RowKey],
    rows: int,
    returns: Returns,
    *,
    variant: Variant = "planned",
    warm: tuple[Tensor, Tensor] | None = None,
    with_value: bool = False,
) -> Plan:
    """Plan the first ``rows`` rows at least, and all where the rows are not independent.

    Args:
        model: the world model.
        context: its handle of as many observations as there are keys.
        settings: section ``planner``.
        keys: what names the draws of each row.
        rows: rows that are wanted; the others fill the batch's fixed shape.
        returns: as in :func:`wav.planning.planner.Planner.plan`; so are the next three.
        variant: planned, unplanned or temperature.
        warm: means to start from.
        with_value: also denoise and return the values.

    Raises:
        ConfigError, CheckpointError: as :func:`wav.planning.planner.Planner.plan`, from whichever lane is first.
    """

    def work(part: slice) -> Plan:
        noise = SeededNoise(keys[part], model.device)
        means = None if warm is None else (warm[0][part], warm[1][part])
        planner = Planner(CandidateLanes(model, native.threads()), settings, returns)
        return planner.plan(context.rows(part), noise, variant=variant, warm=means, with_value=with_value)

    if not model.independent_rows or settings.video_denoise_steps > 1:
        noise = SeededNoise(keys, model.device)
        planner = Planner(model, settings, returns)
        return planner.plan(context, noise, variant=variant, warm=warm, with_value=with_value)
    return join(run(work, rows, native.threads()))


@dataclass(frozen=True)
class SplitFeatures:
    """Features of consecutive shares of the candidates."""

    parts: list[Features]
    shares: list[slice]


class CandidateLanes:
    """A :class:`wav.planning.types.PlannerModel` that computes the candidates of each row in lanes.

    Args:
        model: the world model, whose rows are independent.
        lanes: shares that the candidates are dealt out to, at most.
    """

    def __init__(self, model: WAVPlannerModel, lanes: int) -> None:
        self.model, self.lanes = model, lanes

    @property
    def shapes(self) -> NoiseShapes:
        """Shapes of the noises."""
        return self.model.shapes

    def video_features(self, context: Context, noise: Tensor, steps: int) -> Features | SplitFeatures:
        """Features of noises (B, M, V, C, Ff, h, w); in shares where there are several candidates."""
        candidates = noise.shape[1]
        parts = shares(candidates, min(self.lanes, candidates * context.memory[0].numel() // WORTH))
        if len(parts) == 1:
            return self.model.video_features(context, noise, steps)

        def share(part: slice) -> Features:
            found = self.model.video_features(context, noise[:, part], steps)
            return replace(found, layers=None)  # kept of a single candidate, which is one that is acted on elsewhere

        return SplitFeatures(run(share, candidates, len(parts)), parts)

    def denoise_value(self, features: Features | SplitFeatures, noise: Tensor, steps: int) -> Tensor:
        """Values of noises (B, M, N, A, Cv), each share on its own features."""
        if not isinstance(features, SplitFeatures):
            return self.model.denoise_value(features, noise, steps)
        of = dict(zip((part.start for part in features.shares), features.parts, strict=True))

        def values(part: slice) -> Tensor:
            return self.model.denoise_value(of[part.start], noise[:, part], steps)

        return torch.cat(run(values, noise.shape[1], len(features.shares)), 1)

    def denoise_action(self, *arguments: Any) -> Tensor:
        """Actions of the one candidate that is acted on."""
        return self.model.denoise_action(*arguments)


def shares(rows: int, lanes: int) -> list[slice]:
    """``rows`` rows in at most ``lanes`` consecutive shares, none empty, their sizes at most one apart."""
    lanes = max(1, min(lanes, rows))
    return [slice(rows * lane // lanes, rows * (lane + 1) // lanes) for lane in range(lanes)]


def run(work: Callable[[slice], Result], rows: int, lanes: int) -> list[Result]:
    """``work`` on each of at most ``lanes`` shares of ``rows`` rows at once, in inference mode; the results in order.

    The lanes share the kernels' threads; a single one runs in the calling thread.
    """
    parts = shares(rows, lanes)
    if len(parts) == 1:
        return [work(parts[0])]
    threads = native.threads() // len(parts)

    def lane(part: slice) -> Result:
        with torch.inference_mode(), native.on_threads(threads):
            return work(part)

    with native.on_threads(1), ThreadPoolExecutor(len(parts), "wav-lane") as pool:
        return list(pool.map(lane, parts))


def join(plans: Sequence[Plan]) -> Plan:
    """Plans of consecutive rows as one; all have searched for the same number of iterations."""
    if len(plans) == 1:
        return plans[0]
    history = tuple(_iteration(steps) for steps in zip(*(plan.history for plan in plans), strict=True))
    values, z_value = ([getattr(plan, name) for plan in plans] for name in ("values", "z_value"))
    return Plan(
        torch.cat([plan.actions for plan in plans]),
        None if values[0] is None else torch.cat(values),
        torch.cat([plan.z_video for plan in plans]),
        None if z_value[0] is None else torch.cat(z_value),
        history,
    )


def _iteration(steps: Sequence[Iteration]) -> Iteration:
    """One iteration of consecutive rows as one."""

    def joined(name: str) -> Tensor | Gaussian:
        found = [getattr(step, name) for step in steps]
        if isinstance(found[0], Gaussian):
            return Gaussian(torch.cat([g.mean for g in found]), torch.cat([g.std for g in found]))
        return torch.cat(found)

    return Iteration(**{field.name: joined(field.name) for field in fields(Iteration)})  # type: ignore[arg-type]
