"""LIBERO's table: a policy over the four suites, beside the published figures.

It is made from the metrics of an evaluation on some of them: that of stage ``eval_libero``, whose report shows it, or
that of ``wav libero-table [EXPORT]`` (``make libero-table``), which evaluates an exported policy on all four. There,
too, every episode is recorded, and an interrupted evaluation goes on where it stopped.

A published figure is marked where it differs from ours by more than the intervals: zero lies outside Newcombe's
interval of the difference, made from both sides' Wilson intervals.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from wav.config import DataSettings, EvalLiberoSettings, parse_settings
from wav.data.names import in_libero, joined
from wav.errors import ConfigError
from wav.evaluation.act import exported_data, policy_for_suite
from wav.evaluation.evaluate import Progress, Sections, evaluate
from wav.evaluation.extras.published import AVERAGE, EPISODES, PUBLISHED, SUITES, TASKS, Published
from wav.evaluation.intervals import Rate, independent_difference, wilson
from wav.evaluation.records import by_suite
from wav.evaluation.start import check_all, own_store
from wav.evaluation.verdict import refuse_failed
from wav.io.files import read_json, write_json, write_text
from wav.planning import VARIANTS
from wav.policy.export import verify_export
from wav.policy.policy import Policy
from wav.sim.registry import simulator_versions
from wav.sim.workers import SimPool

#: Seconds between two lines of progress.
_TELL = 15.0
_MARKS = {"protocol": "*", "reference": "†"}


@dataclass(frozen=True)
class EvaluationProtocol:
    """How the suites are evaluated; the defaults are the published protocol."""

    suites: tuple[str, ...] = tuple(SUITES)
    tasks: tuple[str, ...] = ()
    """For a trial, of several suites as SUITE/TASK; empty: all, which alone compares with published figures."""
    episodes: int = EPISODES
    variants: tuple[str, ...] = VARIANTS
    execute_steps: int = 8
    """Actions executed per policy call, at most the policy's chunk."""
    batch_size: int = 8
    budget: str = "protocol"
    """``reference``: each episode goes on to the published code's 1000 steps, reported in rows of its own."""
    seed: int = 7

    def settings(self, data: DataSettings) -> EvalLiberoSettings:
        """Section ``eval_libero``; ConfigError for a value out of range."""
        section = {
            "episodes_per_task": self.episodes,
            "variants": self.variants,
            "execute_steps": min(self.execute_steps, data.action_chunk),
            "batch_size": self.batch_size,
            "budget": self.budget,
            "swapped_episodes": 0,
            "videos": 0,
            "seed": self.seed,
        }
        chunk = {"action_chunk": data.action_chunk}
        return parse_settings({"data": chunk, "eval_libero": section}, "libero-table").eval_libero


@dataclass(frozen=True)
class Row:
    """One of our rows: a variant under a budget of steps."""

    variant: str
    budget: str
    rates: Mapping[str, Rate]
    """Suite, or "average" where all four were evaluated alike, -> success."""

    @property
    def name(self) -> str:
        """Its heading."""
        return f"this policy, {self.variant}" + (", 1000 steps" if self.budget == "reference" else "")


@dataclass(frozen=True)
class Comparison:
    """A published figure against ours; shares in [0, 1], ``difference`` is ours minus theirs."""

    published: str
    column: str
    variant: str
    budget: str
    difference: float
    low: float
    high: float

    @property
    def larger(self) -> bool:
        """Whether the difference is larger than the intervals."""
        return not self.low <= 0 <= self.high


@dataclass(frozen=True)
class Table:
    """Everything the table shows; ``metrics`` holds the sections of each suite."""

    metrics: Mapping[str, Mapping[str, Any]]
    rows: tuple[Row, ...]
    comparisons: tuple[Comparison, ...]
    heading: Mapping[str, Any] = field(default_factory=dict)


def libero_table(
    export: Path,
    out: Path,
    protocol: EvaluationProtocol,
    *,
    workers: int,
    device: str = "auto",
    demonstrations: Path | None = None,
    report: Callable[[str], None],
) -> Table:
    """Evaluate ``export`` over the protocol's suites and write ``out/table.json`` and ``out/table.md``.

    Episodes that are in ``out`` are not repeated. Where the policy was trained on ``demonstrations``, their replay's
    verdict counts, and their pictures are compared with those of the tasks that they are of.

    Raises:
        CheckpointError: the export is missing or damaged.
        ConfigError: it was not trained on LIBERO, or under other conventions than the simulator's, or its
            demonstrations failed their replay or look otherwise; a bad value.
        ServiceError: LIBERO or its assets are missing.
    """
    for suite in protocol.suites:
        if suite not in SUITES:
            raise ConfigError(f"--suite = {suite}: not in the table; its suites are {', '.join(SUITES)}")
    suite, heading = joined(protocol.suites), _heading(export, protocol)
    simulator_versions(suite)
    policy = Policy.load(export, batch_size=protocol.batch_size, device=device)
    store = own_store(policy, demonstrations) if demonstrations is not None else None
    if store is not None:
        refuse_failed(store)
        store.conventions = replace(store.conventions, suite=suite)
    data = exported_data(export, suite, protocol.tasks).model_copy(update={"tasks": protocol.tasks})
    policy_for_suite(policy, data)
    with SimPool(suite, data, workers=workers, slots=protocol.batch_size) as pool:
        metrics = evaluate(
            Sections(data, policy.planner, protocol.settings(data)),
            policy,
            out / suite,
            pool=pool,
            checkpoint=heading["checkpoint"],
            with_value=policy.model.shapes.value is not None,
            start=check_all(policy, data, pool=pool, out=out / suite, store=store).as_dict(),
            progress=_told(suite, report),
        )
    table = make_table(by_suite(metrics), heading, complete=not protocol.tasks)
    write_json(out / "table.json", as_json(table))
    write_text(out / "table.md", markdown(table))
    return table


def _heading(export: Path, protocol: EvaluationProtocol) -> dict[str, Any]:
    """What is evaluated, from a sound export's manifest and settings.

    Raises:
        CheckpointError: it is damaged.
        ConfigError: it was trained on another robot's data.
    """
    manifest = verify_export(export)
    own = read_json(export / "settings.json", "export the policy again (`dvc repro export`)")
    data = exported_data(export)
    if not in_libero(data.suite):
        raise ConfigError(
            f"{export}: trained on {data.suite!r}, whose scenes and conventions are not LIBERO's; "
            "give an export trained on LIBERO data (presets/libero.yaml)"
        )
    return {
        "export": str(export),
        "name": manifest.get("name"),
        "checkpoint": str(manifest["checkpoint"]["digest"]),
        "dtype": manifest.get("dtype"),
        "trained_on": {"suite": data.suite, "tasks": data.tasks},
        "planner": own["planner"],
        "protocol": asdict(protocol),
    }


def _told(suite: str, report: Callable[[str], None]) -> Callable[[Progress], None]:
    """Passes an evaluation's progress on, a line every few seconds and the last one."""
    last = time.monotonic()

    def tell(state: Progress) -> None:
        nonlocal last
        if state.done == state.total or time.monotonic() - last >= _TELL:
            last = time.monotonic()
            report(f"{suite}: {state.message}")

    return tell


def make_table(
    metrics: Mapping[str, Mapping[str, Any]],
    heading: Mapping[str, Any],
    *,
    complete: bool = True,
) -> Table:
    """Rows and comparisons from the suites' metrics.

    ``complete`` says whether all tasks of each suite were evaluated; otherwise nothing is compared.
    """
    rows = []
    for budget, part in (("protocol", lambda m: m), ("reference", lambda m: m.get("reference", {}))):
        for variant in VARIANTS:
            found = {suite: part(m)[variant] for suite, m in metrics.items() if variant in part(m)}
            if found:
                rows.append(Row(variant, budget, _rates(found)))
    comparisons = [c for entry in PUBLISHED for c in _compare(entry, rows)] if complete else []
    return Table(dict(metrics), tuple(rows), tuple(comparisons), dict(heading))


def _rates(found: Mapping[str, Mapping[str, Any]]) -> dict[str, Rate]:
    """Suites' rates, and their average where all four were evaluated with equally many episodes."""
    rates = {s: wilson(round(m["success_rate"] * m["episodes"]), m["episodes"]) for s, m in found.items()}
    episodes = {rate.episodes for rate in rates.values()}
    if set(rates) == set(SUITES) and len(episodes) == 1:
        solved = sum(round(rate.success_rate * rate.episodes) for rate in rates.values())
        rates[AVERAGE] = wilson(solved, sum(rate.episodes for rate in rates.values()))
    return rates


def _compare(entry: Published, rows: Sequence[Row]) -> list[Comparison]:
    """A published row against ours of its variant (unplanned, where the policy cannot plan), under each budget."""
    result = []
    for budget in _MARKS:
        ours = {row.variant: row for row in rows if row.budget == budget}
        row = ours.get(entry.variant) or ours.get("unplanned")
        for column in entry.percent if row else ():
            mine, theirs = row.rates.get(column) if row else None, entry.rate(column)
            if row and mine and theirs:
                low, high = independent_difference(mine, theirs)
                difference = mine.success_rate - theirs.success_rate
                result.append(Comparison(entry.name, column, row.variant, budget, difference, low, high))
    return result


def as_json(table: Table) -> dict[str, Any]:
    """The table as plain data; rates in [0, 1], published figures in percent as printed."""
    return {
        **table.heading,
        "rows": [
            {"variant": row.variant, "budget": row.budget, **{c: r.as_dict() for c, r in row.rates.items()}}
            for row in table.rows
        ],
        "published": [{**asdict(entry), "percent": dict(entry.percent)} for entry in PUBLISHED],
        "comparisons": [{**asdict(c), "larger_than_intervals": c.larger} for c in table.comparisons],
        "paired": {suite: m.get("paired", {}) for suite, m in table.metrics.items()},
        "not_applicable": {suite: m.get("not_applicable", {}) for suite, m in table.metrics.items()},
        "versions": next((m["versions"] for m in table.metrics.values()), {}),
    }


def markdown(table: Table) -> str:
    """The table for people: our rows with intervals, then the published ones, marked where they differ."""
    lines = [
        *(_title(table.heading) if table.heading else ()),
        "| | " + " | ".join([*SUITES.values(), AVERAGE]) + " |",
        "|---" * (len(SUITES) + 2) + "|",
    ]
    ours = len(table.rows)
    for number, (name, *cells) in enumerate(lines_of(table)):
        lines.append(f"| {f'**{name}**' if number < ours else name} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *(f"- {line}" for line in legend(table))]) + "\n"


def _title(heading: Mapping[str, Any]) -> list[str]:
    """What was evaluated, and how."""
    protocol, planner = heading["protocol"], heading["planner"]
    tasks = ", ".join(protocol["tasks"]) or f"all {TASKS} tasks of a suite"
    return [
        f"LIBERO: {heading['name']} ({heading['export']}, weights {heading['checkpoint'][:12]}), trained on "
        f"{heading['trained_on']['suite']}",
        "",
        f"{tasks}, {protocol['episodes']} initial states each, {protocol['execute_steps']} actions per policy call, "
        f"planner K = {planner['iterations']}, M = {planner['video_samples']}, N = {planner['value_samples']}, "
        f"seed {protocol['seed']}; success in %, 95% Wilson intervals.",
        "",
    ]


def lines_of(table: Table) -> list[list[str]]:
    """Name and five cells of each of our rows, then of the published ones, marked where they differ."""
    columns = (*SUITES, AVERAGE)
    marks: dict[tuple[str, str], str] = {}
    for c in table.comparisons:
        if c.larger:
            marks[c.published, c.column] = marks.get((c.published, c.column), "") + _MARKS[c.budget]
    theirs = [
        [
            f"{entry.name} ({entry.date})",
            *(f"{entry.percent[c]:.1f}{marks.get((entry.name, c), '')}" if c in entry.percent else "" for c in columns),
        ]
        for entry in PUBLISHED
    ]
    return [*([row.name, *(_ours(row.rates.get(c)) for c in columns)] for row in table.rows), *theirs]


def _ours(rate: Rate | None) -> str:
    """``94.4 [92.0, 96.1]``; empty for a suite not evaluated."""
    if rate is None:
        return ""
    return f"{100 * rate.success_rate:.1f} [{100 * rate.wilson_low:.1f}, {100 * rate.wilson_high:.1f}]"


def legend(table: Table) -> list[str]:
    """What the marks mean, what planning changed on the same episodes, what could not be evaluated; the sources."""
    if table.comparisons:
        lines = ["`*` differs from this policy (same variant) by more than the intervals of both."]
        if any(row.budget == "reference" for row in table.rows):
            lines.append("`†` the same against the rows with 1000 steps, which is what the published WAV code allows.")
    else:
        lines = ["Nothing is compared: the published figures are over all tasks of a suite."]
    for suite, metrics in table.metrics.items():
        paired = metrics.get("paired", {}).get("planned-unplanned")
        if paired:
            low, high = 100 * paired["low"], 100 * paired["high"]
            lines.append(
                f"{suite}: planned - unplanned on the same episodes {100 * paired['difference']:+.1f} points "
                f"[{low:+.1f}, {high:+.1f}]."
            )
        lines += [f"{suite}: {name}: {why}." for name, why in metrics.get("not_applicable", {}).items()]
    return lines + [f"{entry.name}: {entry.source}." for entry in PUBLISHED]


def evaluated_table(metrics: Mapping[str, Any]) -> Table | None:
    """The table of an evaluation, from the content of its metrics.json; None where it was on other suites."""
    found = by_suite(metrics)
    if not set(found) <= set(SUITES) or not any(variant in metrics for variant in VARIANTS):
        return None
    whole = all(len(own[v]["tasks"]) == TASKS for own in found.values() for v in VARIANTS if v in own)
    return make_table(found, {}, complete=whole)
