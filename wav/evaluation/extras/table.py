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
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from wav.config import parse_settings
from wav.data.names import in_libero, joined
from wav.errors import ConfigError
from wav.evaluation.act import exported_data, policy_for_suite
from wav.evaluation.evaluate import Progress, Sections, evaluate
from wav.evaluation.extras.published import AVERAGE, PUBLISHED, SUITES, TASKS, Published
from wav.evaluation.intervals import Rate, independent_difference, wilson
from wav.evaluation.records import by_suite
from wav.evaluation.start import check_all, own_store
from wav.evaluation.tables import markdown_rows
from wav.evaluation.verdict import replay_verdict
from wav.io.files import write_json, write_text
from wav.planning import VARIANTS
from wav.policy.export import verify_export
from wav.policy.policy import Policy
from wav.sim.registry import simulator_versions
from wav.sim.workers import SimPool

#: Seconds between two lines of progress.
_TELL = 15.0
_MARKS = {"protocol": "*", "reference": "†"}


@dataclass(frozen=True)
class Row:
    """One of our rows: a variant under a budget of steps."""

    variant: str
    budget: str
    rates: Mapping[str, Rate]  #: Suite, or "average" where all four were evaluated alike, -> success.

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
    """Everything the table shows; ``metrics`` holds the sections of each suite, ``heading`` what was evaluated."""

    metrics: Mapping[str, Mapping[str, Any]]
    rows: tuple[Row, ...]
    comparisons: tuple[Comparison, ...]
    heading: Mapping[str, Any]


def libero_table(
    export: Path,
    out: Path,
    suites: Sequence[str],
    tasks: Sequence[str],
    protocol: Mapping[str, Any],
    *,
    workers: int,
    device: str = "auto",
    demonstrations: Path,
    report: Callable[[str], None],
) -> Table:
    """Evaluate ``export`` and write ``out/table.json`` and ``out/table.md``. Episodes that are in ``out`` are kept.

    ``protocol`` holds values of section ``eval_libero``; of ``execute_steps`` at most the policy's chunk is executed.
    ``tasks``, for a trial, are SUITE/TASK of several ``suites``; only all tasks compare with published figures.
    Where the policy was trained on the store ``demonstrations``, its replay's verdict counts, and its pictures are
    compared with those of the tasks that they are of. ``report`` gets a line of progress now and then.

    Raises:
        CheckpointError: the export is missing or damaged.
        ConfigError: it was not trained on LIBERO, or under other conventions than the simulator's, or its
            demonstrations failed their replay or look otherwise; a bad value.
        ServiceError: LIBERO or its assets are missing.
    """
    for suite in suites:
        if suite not in SUITES:
            raise ConfigError(f"--suite = {suite}: not in the table; its suites are {', '.join(SUITES)}")
    manifest, own, suite = verify_export(export), exported_data(export), joined(suites)
    if not in_libero(own.suite):
        raise ConfigError(
            f"{export}: trained on {own.suite!r}, whose scenes and conventions are not LIBERO's; "
            "give an export trained on LIBERO data (presets/libero.yaml)"
        )
    simulator_versions(suite)
    data = exported_data(export, suite).model_copy(update={"tasks": tuple(tasks)})
    section = {**protocol, "execute_steps": min(protocol["execute_steps"], data.action_chunk)}
    whole = {"data": {"action_chunk": data.action_chunk}, "eval_libero": section}
    settings = parse_settings(whole, "libero-table").eval_libero
    policy = policy_for_suite(Policy.load(export, batch_size=settings.batch_size, device=device), data)
    if (store := own_store(policy, demonstrations)) is not None:
        replay_verdict(store)
        store.conventions = replace(store.conventions, suite=suite)
    heading: dict[str, Any] = {
        "export": str(export),
        "name": manifest.get("name"),
        "checkpoint": str(manifest["checkpoint"]["digest"]),
        "dtype": manifest.get("dtype"),
        "trained_on": {"suite": own.suite, "tasks": own.tasks},
        "planner": policy.planner.model_dump(mode="json"),
        "protocol": {"suites": suites, "tasks": tasks, **settings.model_dump(mode="json", include={*section})},
    }
    with SimPool(suite, data, workers=workers, slots=settings.batch_size) as pool:
        metrics = evaluate(
            Sections(data, policy.planner, settings),
            policy,
            out / suite,
            pool=pool,
            checkpoint=heading["checkpoint"],
            start=check_all(policy, data, pool=pool, out=out / suite, store=store),
            progress=_told(suite, report),
        )
    table = make_table(by_suite(metrics), heading, complete=not tasks)
    write_json(out / "table.json", as_json(table))
    write_text(out / "table.md", markdown(table))
    return table


def _told(suite: str, report: Callable[[str], None]) -> Callable[[Progress], None]:
    """Passes an evaluation's progress on, a line every few seconds and the last one."""
    last = time.monotonic()

    def tell(state: Progress) -> None:
        nonlocal last
        if state.done == state.total or time.monotonic() - last >= _TELL:
            last = time.monotonic()
            report(f"{suite}: {state.message}")

    return tell


def make_table(metrics: Mapping[str, Mapping[str, Any]], heading: Mapping[str, Any], *, complete: bool = True) -> Table:
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
    return Table(metrics, tuple(rows), tuple(comparisons), heading)


def _rates(found: Mapping[str, Mapping[str, Any]]) -> dict[str, Rate]:
    """Suites' rates, and their average where all four were evaluated with equally many episodes."""
    solved = {suite: round(m["success_rate"] * m["episodes"]) for suite, m in found.items()}
    rates = {suite: wilson(solved[suite], m["episodes"]) for suite, m in found.items()}
    if set(rates) == set(SUITES) and len({rate.episodes for rate in rates.values()}) == 1:
        rates[AVERAGE] = wilson(sum(solved.values()), sum(rate.episodes for rate in rates.values()))
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
    rows = [
        {"variant": r.variant, "budget": r.budget, **{c: asdict(rate) for c, rate in r.rates.items()}}
        for r in table.rows
    ]
    return {
        **table.heading,
        "rows": rows,
        "published": [asdict(entry) for entry in PUBLISHED],
        "comparisons": [{**asdict(c), "larger_than_intervals": c.larger} for c in table.comparisons],
        **{name: {s: m.get(name, {}) for s, m in table.metrics.items()} for name in ("paired", "not_applicable")},
        "versions": next((m["versions"] for m in table.metrics.values()), {}),
    }


def markdown(table: Table) -> str:
    """The table for people: our rows with intervals, then the published ones, marked where they differ."""
    lines: list[str] = []
    head = table.heading
    if head:
        protocol, planner = head["protocol"], head["planner"]
        tasks = ", ".join(protocol["tasks"]) or f"all {TASKS} tasks of a suite"
        lines += [
            f"LIBERO: {head['name']} ({head['export']}, weights {head['checkpoint'][:12]}), trained on "
            f"{head['trained_on']['suite']}",
            "",
            f"{tasks}, {protocol['episodes_per_task']} initial states each, {protocol['execute_steps']} actions per "
            f"policy call, planner K = {planner['iterations']}, M = {planner['video_samples']}, N = "
            f"{planner['value_samples']}, seed {protocol['seed']}; success in %, 95% Wilson intervals.",
            "",
        ]
    ours, rows = len(table.rows), lines_of(table)
    rows = [[f"**{name}**", *cells] for name, *cells in rows[:ours]] + rows[ours:]
    lines += markdown_rows(["", *SUITES.values(), AVERAGE], rows)
    return "\n".join([*lines, "", *(f"- {line}" for line in legend(table))]) + "\n"


def lines_of(table: Table) -> list[list[str]]:
    """Name and five cells of each of our rows, then of the published ones, marked where they differ."""
    columns = (*SUITES, AVERAGE)
    marks: dict[tuple[str, str], str] = {}
    for c in table.comparisons:
        if c.larger:
            marks[c.published, c.column] = marks.get((c.published, c.column), "") + _MARKS[c.budget]
    lines = [[row.name, *(_ours(row.rates.get(c)) for c in columns)] for row in table.rows]
    for entry in PUBLISHED:
        cells = [
            f"{entry.percent[c]:.1f}{marks.get((entry.name, c), '')}" if c in entry.percent else "" for c in columns
        ]
        lines.append([f"{entry.name} ({entry.date})", *cells])
    return lines


def _ours(rate: Rate | None) -> str:
    """``94.4 [92.0, 96.1]``; empty for a suite not evaluated."""
    if rate is None:
        return ""
    return f"{100 * rate.success_rate:.1f} [{100 * rate.wilson_low:.1f}, {100 * rate.wilson_high:.1f}]"


def legend(table: Table) -> list[str]:
    """What the marks mean, what planning changed on the same episodes, what could not be evaluated; the sources."""
    lines = ["Nothing is compared: the published figures are over all tasks of a suite."]
    if table.comparisons:
        lines = ["`*` differs from this policy (same variant) by more than the intervals of both."]
        if any(row.budget == "reference" for row in table.rows):
            lines.append("`†` the same against the rows with 1000 steps, which is what the published WAV code allows.")
    for suite, metrics in table.metrics.items():
        if paired := metrics.get("paired", {}).get("planned-unplanned"):
            points, low, high = (100 * paired[name] for name in ("difference", "low", "high"))
            same = "planned - unplanned on the same episodes"
            lines.append(f"{suite}: {same} {points:+.1f} points [{low:+.1f}, {high:+.1f}].")
        lines += [f"{suite}: {name}: {why}." for name, why in metrics.get("not_applicable", {}).items()]
    return lines + [f"{entry.name}: {entry.source}." for entry in PUBLISHED]


def evaluated_table(metrics: Mapping[str, Any]) -> Table | None:
    """The table of an evaluation, from the content of its metrics.json; None where it was on other suites."""
    found = by_suite(metrics)
    if not set(found) <= set(SUITES) or not any(variant in metrics for variant in VARIANTS):
        return None
    whole = all(len(own[v]["tasks"]) == TASKS for own in found.values() for v in VARIANTS if v in own)
    return make_table(found, {}, complete=whole)
