"""What an evaluation found, in words and tables: for the report, the model card and Prefect's artefacts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from wav.planning import VARIANTS


def columns(metrics: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Columns of every results table, (heading, rates) each: the variants, then those of the reference's budget."""
    variants = [name for name in VARIANTS if name in metrics]
    longer = metrics.get("reference")
    if not longer:
        return [(name, metrics[name]) for name in variants]
    heading = f"reference's {longer['max_steps']} steps"
    within = [(f"{name}, protocol's limit", metrics[name]) for name in variants]
    return within + [(f"{name}, {heading}", longer[name]) for name in variants]


def rows(metrics: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """Rows of the results table, (heading, a cell per column) each: every task, every suite, all, and how soon."""
    shown = [rates for _, rates in columns(metrics)]
    found = [(task, [_rate(rates["tasks"][task]) for rates in shown]) for task in shown[0]["tasks"]]
    for suite, own in metrics.get("suites", {}).items():
        found.append((f"all of {suite}", [_rate(rates) for _, rates in columns(own)]))
    found.append(("all", [_rate(rates) for rates in shown]))
    if "within" in metrics:
        cells = [_rate(rates["within"]) if "within" in rates else "" for rates in shown]
        found.append((f"all, {_within(metrics)}", cells))
    return [*found, ("steps to success, median (mean)", [_steps(rates) for rates in shown])]


def differences(metrics: Mapping[str, Any]) -> list[tuple[str, str, Mapping[str, Any]]]:
    """Differences over the same episodes: (success or how soon, pair of variants, difference) each."""
    found = [("success", metrics.get("paired", {})), (_within(metrics), metrics.get("paired_within", {}))]
    return [
        (what, pair.replace("-", " \N{MINUS SIGN} "), each) for what, pairs in found for pair, each in pairs.items()
    ]


def markdown_rows(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]


def metrics_table(metrics: Mapping[str, Any]) -> str:
    """Markdown of all that was found; success rates with 95% Wilson intervals, the suite in the heading row."""
    shown = columns(metrics)
    if not shown:
        reasons = [f"{metrics['suite']}: {name}: {why}." for name, why in metrics["not_applicable"].items()]
        return "\n\n".join([*reasons, *findings(metrics)])
    found = []
    for heading, cells in rows(metrics):
        bold = "**" if heading.startswith("all") else ""
        found.append([f"{bold}{cell}{bold}" if cell else "" for cell in (heading, *cells)])
    lines = markdown_rows([f"{metrics['suite']} (success, 95% interval)", *(heading for heading, _ in shown)], found)
    lines += [f"\n{variant}: {reason}." for variant, reason in metrics.get("not_applicable", {}).items()]
    if compared := differences(metrics):
        found = []
        for what, pair, d in compared:
            interval = f"{100 * d['difference']:+.0f} [{100 * d['low']:+.0f}, {100 * d['high']:+.0f}]"
            found.append([f"{what}, {pair}", interval, f"{d['wins']} : {d['losses']}", f"{d['mcnemar_p']:.3g}"])
        head = ("difference over the same episodes", "[95% bootstrap]", "only one solved", "McNemar p")
        lines += ["", *markdown_rows(head, found)]
    lines += [f"\n{sentence}" for sentence in findings(metrics)]
    for variant, probe in metrics.get("swapped", {}).items():
        lines.append(
            f"\nInstruction swapped ({variant}): went for the instructed object in {probe['instructed']} of "
            f"{probe['episodes']} episodes, for the other one in {probe['original']}, neither in {probe['neither']}."
        )
    return "\n".join(lines)


def findings(metrics: Mapping[str, Any]) -> Iterator[str]:
    """Sentences for the instruments' numbers (:mod:`wav.evaluation.instruments`)."""
    if (apart := metrics.get("futures")) and "distance" in apart:
        yield _apart(apart)
        yield from _ahead(apart.get("direct_ahead", {}))
    for what, shares in metrics.get("use", {}).items():
        parts = ", ".join(f"{100 * shares[noise]:.0f}% by the {noise} noise" for noise in _NOISES if noise in shares)
        yield f"Variance of the {what} when one noise alone is drawn again: {parts}."
    for whose, shares in metrics.get("swap", {}).items():
        parts = ", ".join(f"{100 * shares[what]:.0f}% on its {name}" for what, name in _GIVEN.items() if what in shares)
        yield f"Share of the way to another {whose}'s action when decoded on what is imagined for that: {parts}."
    if found := metrics.get("oracle"):
        parts = ", ".join(f"{found[what]:.3f} {name}" for what, name in _ERRORS.items() if what in found)
        yield f"Error of the action against held-out demonstrations (root mean square, normalised): {parts}."
    if ranked := metrics.get("ranking"):
        yield (
            f"Scores beside realised returns, {ranked['candidates']} candidates of {ranked['states']} states: "
            f"Spearman {ranked['spearman']:.2f} within a state ({ranked['by_video']:.2f} by the video's score), "
            "the chosen one above the median in "
            f"{100 * ranked['beats_median']:.0f}%, regret {ranked['regret']:.3f} of a deviation of "
            f"{ranked['deviation']:.3f}."
        )
        parts = ", ".join(
            f"{search['gain']:+.3f} ({100 * search['false_choices']:.0f}%) with M={search['M']} N={search['N']}"
            for search in ranked["searches"]
        )
        yield f"Realised return of the chosen candidate over the mean one (how often it is below): {parts}."


#: in the order of the sentences; JSON's is the alphabet's
_NOISES = ("video", "value", "action")
_GIVEN = {"future": "future", "values": "values", "both": "future and values"}
_ERRORS = {
    "truth": "on the true future and values",
    "future": "on the true future",
    "values": "on the true values",
    "imagined": "as imagined",
    "none": "on pure noise",
}


def _apart(found: Mapping[str, float]) -> str:
    """Whether there is anything to choose."""
    pairs = (
        "of other styles lie, beyond those of the same one," if "other" in found else "of no known style lie at most"
    )
    text = (
        f"Futures of like states {pairs} D = {found['distance']:.1f} apart in latents: they can be told apart at noise "
        f"levels below D/(D+2) = {found['level']:.2f}, and planning reads them at {found['read_at']:.2f}."
    )
    if found["distance"] < _LITTLE:
        return f"{text} They are so close that there is little to choose."
    return text if found["read_at"] < found["level"] else f"{text} What it reads of a future tells nothing."


def _ahead(shares: Mapping[str, float]) -> Iterator[str]:
    """Whether the return prefers what takes less time."""
    for style, share in shares.items():
        text = f"From like states the direct style's return is higher than the {style} one's in {100 * share:.0f}%."
        wrong = f" A search for returns prefers the {style} ones: raise label_rewards.horizon."
        yield text if share > 0.5 else text + wrong


#: distance of futures below which even half noise hides the difference
_LITTLE = 2.0


def _rate(rate: Mapping[str, Any]) -> str:
    return (
        f"{100 * rate['success_rate']:.0f}% of {rate['episodes']} "
        f"[{100 * rate['wilson_low']:.0f}, {100 * rate['wilson_high']:.0f}]"
    )


def _steps(rates: Mapping[str, Any]) -> str:
    middle, mean = rates.get("median_steps_to_success"), rates.get("mean_steps_to_success")
    return "" if middle is None else f"{middle:.0f} ({mean:.0f})"


def _within(metrics: Mapping[str, Any]) -> str:
    limits = sorted(set(metrics.get("within", {}).values()))
    return (
        f"within {' to '.join(str(steps) for steps in dict.fromkeys((limits[0], limits[-1])))} steps" if limits else ""
    )
