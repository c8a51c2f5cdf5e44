"""One JSON file per episode, written atomically, and the metrics that are made from them.

``<out>/episodes/<variant>/<task>-<index>.json`` (swapped probes under ``swapped-<variant>``). A record holds what
is needed to run the episode again and see whether it came out the same.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

from wav.errors import DataError
from wav.evaluation.intervals import paired_difference, wilson
from wav.evaluation.protocol import EpisodeSpec
from wav.io.files import read_json, write_json

if TYPE_CHECKING:
    from wav.config import EvalLiberoSettings
    from wav.data.store import EpisodeStore

log = logging.getLogger(__name__)

_REMEDY = "remove the file to run the episode again"
#: What a record has of the :class:`EpisodeSpec` that was asked for.
ASKED = ("suite", "task", "init_index", "seed", "variant", "instructed", "instruction", "max_steps")
#: What it has of the :class:`wav.evaluation.rollout.Rollout` that came of it.
REACHED = ("success", "successes", "steps", "values", "plan", "actions_digest", "attempts", "call_digests")
#: Pairs of variants whose difference is reported.
PAIRS = (("planned", "unplanned"), ("planned", "temperature"), ("temperature", "unplanned"))


@dataclass(frozen=True)
class EpisodeRecord:
    """One finished episode. Times in seconds, steps in environment steps, values in units of the return.

    ``successes`` says for every task of the scene whether its predicate was met; ``actions_digest`` is the SHA-256 of
    the executed actions, (steps, 7) float32, ``call_digests`` the same of each policy call's share (16 digits);
    ``plan`` holds, per policy call, what the planner's last iteration reached (sigma and mean shift of the video and
    value noise). ``success`` is within ``max_steps``; ``protocol_steps`` is the suite's published limit, shorter under
    ``budget: reference``. ``batch`` is the policy's padded batch size and the episode's place in it; ``code`` the
    digest of the source files that decide a result.
    """

    key: str
    suite: str
    task: str
    init_index: int
    seed: int
    variant: str
    instructed: str
    instruction: str
    success: bool
    successes: dict[str, bool]
    steps: int
    max_steps: int
    policy_calls: int
    values: list[float]
    plan: dict[str, list[float]]
    actions_digest: str
    wall_seconds: float
    attempts: int
    versions: dict[str, str]
    checkpoint: str
    statistics: str
    conventions: dict[str, Any]
    render: str
    budget: str
    execute_steps: int
    batch: list[int]
    planner: dict[str, Any]
    code: str
    call_digests: list[str]
    protocol_steps: int

    @property
    def solved(self) -> bool:
        """Success within the protocol's limit: an episode ends with its success, so its length tells."""
        return self.success and self.steps <= self.protocol_steps

    @property
    def swapped(self) -> bool:
        """Whether the instruction was another task's."""
        return self.instructed != self.task


def record_path(out: Path, spec: EpisodeSpec) -> Path:
    """Where the episode's record lies under the evaluation folder."""
    return out / "episodes" / spec.group / f"{spec.name}.json"


def read_record(path: Path) -> EpisodeRecord:
    """Read one record; DataError where it is missing, truncated, or of other fields than this version writes."""
    value = read_json(path, _REMEDY)
    if not isinstance(value, dict):
        raise DataError(f"{path}: holds a {type(value).__name__} instead of a record; {_REMEDY}")
    expected = {field.name for field in fields(EpisodeRecord)}
    wrong = sorted(expected ^ set(value))
    if wrong:
        raise DataError(f"{path}: field {wrong[0]!r} is missing or unknown; {_REMEDY}")
    return EpisodeRecord(**value)


def write_record(path: Path, record: EpisodeRecord) -> None:
    """Write one record atomically, making its folder; StorageError where the disk is full."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, asdict(record))


def finished_record(path: Path, key: str) -> EpisodeRecord | None:
    """The record at ``path`` if it belongs to this run; a record of another run or format is to be replaced."""
    if not path.exists():
        return None
    value = read_json(path, _REMEDY)
    return read_record(path) if isinstance(value, dict) and value.get("key") == key else None


def step_limits(store: EpisodeStore | None, settings: EvalLiberoSettings, tasks: Sequence[str]) -> dict[str, int]:
    """Steps by task within which success is reported too: planning shows in the time before it shows in success.

    They are the mean length of the task's demonstrations in style ``direct`` (:mod:`wav.sim.styles`) times
    ``eval_libero.within``, or ``eval_libero.within_steps``. Empty where neither is known, and the log says why.
    """
    if settings.within_steps:
        return dict.fromkeys(tasks, settings.within_steps)
    direct = [] if store is None else [info for info in store.episodes if info.style == "direct" and info.success]
    steps = {task: [info.length - 1 for info in direct if info.task == task] for task in tasks}  # the last: no step
    missing = [task for task, found in steps.items() if not found]
    if settings.within and missing:
        log.info("success within a time: no direct demonstration of %s; set eval_libero.within_steps", missing[0])
    if not settings.within or missing:
        return {}
    return {task: math.ceil(settings.within * fmean(found)) for task, found in steps.items()}


Counts = Callable[[EpisodeRecord], bool]


def _rates(records: Iterable[EpisodeRecord], tasks: Sequence[str], counts: Counts) -> dict[str, Any]:
    """Success over all ``records`` and by task; ``counts`` says what a success is."""
    outcomes = [(record.task, counts(record)) for record in records]

    def rate(task: str | None = None) -> dict[str, Any]:
        chosen = [solved for name, solved in outcomes if task in (None, name)]
        return dict(wilson(sum(chosen), len(chosen)).as_dict())

    return {**rate(), "tasks": {task: rate(task) for task in tasks}}


def _steps(records: Iterable[EpisodeRecord], counts: Counts) -> dict[str, float | None]:
    """Mean and median of the steps that successes took; None without any."""
    steps = [record.steps for record in records if counts(record)]
    return {
        "mean_steps_to_success": fmean(steps) if steps else None,
        "median_steps_to_success": median(steps) if steps else None,
    }


def _swapped(records: Sequence[EpisodeRecord]) -> dict[str, Any]:
    """How often the policy did what it was told instead of what the initial state's own task asks."""
    instructed = sum(r.successes[r.instructed] for r in records)
    original = sum(r.successes[r.task] and not r.successes[r.instructed] for r in records)
    rate = wilson(instructed, len(records))
    return {
        "episodes": len(records),
        "instructed": instructed,
        "original": original,
        "neither": len(records) - instructed - original,
        "instructed_rate": rate.success_rate,
        "wilson_low": rate.wilson_low,
        "wilson_high": rate.wilson_high,
    }


def _paired(by_variant: Mapping[str, Mapping[Any, EpisodeRecord]], counts: Counts) -> dict[str, Any]:
    """Differences of the pairs of variants over the episodes that both ran."""
    paired = {}
    for first, second in PAIRS:
        if first in by_variant and second in by_variant:
            a, b = by_variant[first], by_variant[second]
            common = sorted(a.keys() & b.keys())
            outcomes = [[counts(found[cell]) for cell in common] for found in (a, b)]
            paired[f"{first}-{second}"] = paired_difference(*outcomes).as_dict()
    return paired


def summarise(
    records: Sequence[EpisodeRecord], timing: Mapping[str, float], limits: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """The content of metrics.json: a section per variant, swapped probes, paired differences, timing.

    Everything is about success within the protocol's limits, whatever the budget, so that it compares; under
    ``budget: reference`` section ``reference`` holds in addition, per variant, success within the longer limit. Of
    several suites ``suites`` holds the same sections for each.

    Where every task has a limit (:func:`step_limits`), each variant's section holds ``within``, its success within
    those steps, and ``paired_within`` holds the differences. ``timing``: where the time went.

    Raises:
        DataError: no records at all.
    """
    if not records:
        raise DataError("no episodes to summarise: eval_libero.variants and episodes_per_task must ask for some")
    own = [record for record in records if not record.swapped]
    probes = [record for record in records if record.swapped]
    swapped = {c: _swapped([r for r in probes if r.variant == c]) for c in dict.fromkeys(r.variant for r in probes)}
    suites = list(dict.fromkeys(record.suite for record in own))
    conventions = records[0].conventions
    metrics = {"suite": conventions.get("suite", records[0].suite), "seed": records[0].seed}
    metrics |= {"checkpoint": records[0].checkpoint, "execute_steps": records[0].execute_steps}
    metrics |= _results(own, limits or {})
    if len(suites) > 1:
        metrics["suites"] = {s: _results([r for r in own if r.suite == s], limits or {}) for s in suites}
    return metrics | {
        "swapped": swapped,
        "timing": dict(timing),
        "budget": records[0].budget,
        "versions": records[0].versions,
        "statistics": records[0].statistics,
        "render": records[0].render,
        "image_size": [conventions.get("image_height"), conventions.get("image_width")],
    }


def by_suite(metrics: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Suite -> its sections in the content of a metrics.json, with what holds for all of them."""
    common = {name: metrics[name] for name in ("not_applicable", "versions") if name in metrics}
    return {suite: {**own, **common} for suite, own in (metrics.get("suites") or {metrics["suite"]: metrics}).items()}


def _results(own: Sequence[EpisodeRecord], limits: Mapping[str, int]) -> dict[str, Any]:
    """The sections about success in episodes, none of them swapped."""
    tasks = list(dict.fromkeys(record.task for record in own))
    variants = list(dict.fromkeys(record.variant for record in own))
    by_variant = {c: {(r.task, r.init_index): r for r in own if r.variant == c} for c in variants}

    def solved(record: EpisodeRecord) -> bool:
        return record.solved

    metrics: dict[str, Any] = {}
    for variant, found in by_variant.items():
        metrics[variant] = _rates(found.values(), tasks, solved) | _steps(found.values(), solved)
    if any(record.max_steps > record.protocol_steps for record in own):
        longer = {c: _rates(found.values(), tasks, lambda r: r.success) for c, found in by_variant.items()}
        metrics["reference"] = {"max_steps": max(record.max_steps for record in own), **longer}
    metrics["paired"] = _paired(by_variant, solved)
    if limits and all(task in limits for task in tasks):

        def soon(record: EpisodeRecord) -> bool:
            return record.success and record.steps <= limits[record.task]

        metrics["within"] = {task: limits[task] for task in tasks}
        metrics["paired_within"] = _paired(by_variant, soon)
        for variant, found in by_variant.items():
            metrics[variant]["within"] = _rates(found.values(), tasks, soon)
    return metrics
