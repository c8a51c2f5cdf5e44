"""One JSON file per episode, written atomically, and the metrics that are made from them.

``<out>/episodes/<variant>/<task>-<index>.json`` (swapped probes under ``swapped-<variant>``). A record holds what
is needed to run the episode again and see whether it came out the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from wav.errors import DataError
from wav.evaluation.intervals import paired_difference, wilson
from wav.evaluation.protocol import EpisodeSpec
from wav.io.files import read_json, write_json
from wav.planning import VARIANTS

_REMEDY = "remove the file to run the episode again"
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
    """Read one record.

    Raises:
        DataError: missing, truncated, or of other fields than this version writes.
    """
    value = read_json(path, _REMEDY)
    if not isinstance(value, dict):
        raise DataError(f"{path}: holds a {type(value).__name__} instead of a record; {_REMEDY}")
    expected = {field.name for field in fields(EpisodeRecord)}
    wrong = sorted(expected ^ set(value))
    if wrong:
        raise DataError(f"{path}: field {wrong[0]!r} is missing or unknown; {_REMEDY}")
    return EpisodeRecord(**value)


def write_record(path: Path, record: EpisodeRecord) -> None:
    """Write one record atomically, making its folder.

    Raises:
        StorageError: the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, asdict(record))


def finished_record(path: Path, key: str) -> EpisodeRecord | None:
    """The record at ``path`` if it belongs to this run; a record of another run or format is to be replaced."""
    if not path.exists():
        return None
    value = read_json(path, _REMEDY)
    return read_record(path) if isinstance(value, dict) and value.get("key") == key else None


def _rates(
    records: Sequence[EpisodeRecord], tasks: Sequence[str], counts: Callable[[EpisodeRecord], bool]
) -> dict[str, Any]:
    """A variant's entry in metrics.json; ``counts`` says what a success is."""

    def rate(chosen: Iterable[EpisodeRecord]) -> dict[str, Any]:
        outcomes = [counts(record) for record in chosen]
        return dict(wilson(sum(outcomes), len(outcomes)).as_dict())

    by_task = {task: rate(r for r in records if r.task == task) for task in tasks}
    steps = [record.steps for record in records if counts(record)]
    mean_steps = sum(steps) / len(steps) if steps else None
    return {**rate(records), "tasks": by_task, "mean_steps_to_success": mean_steps}


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


def summarise(records: Sequence[EpisodeRecord], timing: Mapping[str, float]) -> dict[str, Any]:
    """The content of metrics.json: a section per variant, swapped probes, paired differences, timing.

    Everything is about success within the protocol's limits, whatever the budget, so that it compares; under
    ``budget: reference`` section ``reference`` holds in addition, per variant, success within the longer limit.

    Raises:
        DataError: no records at all.
    """
    if not records:
        raise DataError("no episodes to summarise: eval_libero.variants and episodes_per_task must ask for some")
    own = [record for record in records if not record.swapped]
    tasks = list(dict.fromkeys(record.task for record in own))
    variants = list(dict.fromkeys(record.variant for record in own))
    by_variant = {c: {(r.task, r.init_index): r for r in own if r.variant == c} for c in variants}
    metrics: dict[str, Any] = {"suite": records[0].suite, "seed": records[0].seed, "checkpoint": records[0].checkpoint}
    metrics |= {c: _rates(list(found.values()), tasks, lambda r: r.solved) for c, found in by_variant.items()}
    if any(record.max_steps > record.protocol_steps for record in own):
        longer = {c: _rates(list(found.values()), tasks, lambda r: r.success) for c, found in by_variant.items()}
        metrics["reference"] = {"max_steps": max(record.max_steps for record in own), **longer}
    paired = {}
    for first, second in PAIRS:
        if first in by_variant and second in by_variant:
            common = sorted(by_variant[first].keys() & by_variant[second].keys())
            a = [by_variant[first][cell].solved for cell in common]
            b = [by_variant[second][cell].solved for cell in common]
            paired[f"{first}-{second}"] = paired_difference(a, b).as_dict()
    probes = [record for record in records if record.swapped]
    swapped = {c: _swapped([r for r in probes if r.variant == c]) for c in dict.fromkeys(r.variant for r in probes)}
    conventions = records[0].conventions
    return metrics | {
        "paired": paired,
        "swapped": swapped,
        "timing": dict(timing),
        "budget": records[0].budget,
        "versions": records[0].versions,
        "statistics": records[0].statistics,
        "render": records[0].render,
        "image_size": [conventions.get("image_height"), conventions.get("image_width")],
    }


def columns(metrics: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Columns of every results table, (heading, rates) each: the variants, then those of the reference's budget."""
    variants = [name for name in VARIANTS if name in metrics]
    longer = metrics.get("reference")
    if not longer:
        return [(name, metrics[name]) for name in variants]
    heading = f"reference's {longer['max_steps']} steps"
    within = [(f"{name}, protocol's limit", metrics[name]) for name in variants]
    return within + [(f"{name}, {heading}", longer[name]) for name in variants]


def metrics_table(metrics: Mapping[str, Any]) -> str:
    """Markdown table of success rates with 95% Wilson intervals; the suite stands in its heading row."""
    shown = columns(metrics)
    if not shown:
        return "\n\n".join(f"{metrics['suite']}: {name}: {why}." for name, why in metrics["not_applicable"].items())
    head = [f"{metrics['suite']} (success, 95% interval)", *(heading for heading, _ in shown)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]

    def cell(rate: Mapping[str, Any]) -> str:
        return (
            f"{100 * rate['success_rate']:.0f}% of {rate['episodes']} "
            f"[{100 * rate['wilson_low']:.0f}, {100 * rate['wilson_high']:.0f}]"
        )

    for task in shown[0][1]["tasks"]:
        lines.append("| " + " | ".join([task, *(cell(rates["tasks"][task]) for _, rates in shown)]) + " |")
    lines.append("| " + " | ".join(["**all**", *(f"**{cell(rates)}**" for _, rates in shown)]) + " |")
    for variant, reason in metrics.get("not_applicable", {}).items():
        lines.append(f"\n{variant}: {reason}.")
    if ranked := metrics.get("ranking"):
        lines.append(
            f"\nScores beside realised returns, {ranked['candidates']} candidates of {ranked['states']} states: "
            f"Spearman {ranked['spearman']:.2f} within a state, the chosen one above the median in "
            f"{100 * ranked['beats_median']:.0f}%, regret {ranked['regret']:.3f} of a deviation of "
            f"{ranked['deviation']:.3f}."
        )
    for what, shares in metrics.get("use", {}).items():
        parts = ", ".join(f"{100 * share:.0f}% by the {noise} noise" for noise, share in shares.items())
        lines.append(f"\nVariance of the {what} when one noise alone is drawn again: {parts}.")
    for variant, probe in metrics.get("swapped", {}).items():
        lines.append(
            f"\nInstruction swapped ({variant}): went for the instructed object in {probe['instructed']} of "
            f"{probe['episodes']} episodes, for the other one in {probe['original']}, neither in {probe['neither']}."
        )
    return "\n".join(lines)
