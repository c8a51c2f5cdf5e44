"""The README's table of results, from the JSON that holds them.

    python -m infra.docs.results          # writes it into README.md

``tests/test_docs_made.py`` compares. ``benchmarks/collect.py`` makes the JSON.
"""

from __future__ import annotations

import json
import re
from typing import Any

from wav.config import load_settings
from wav.local import PROJECT
from wav.planning import VARIANTS

SOURCE = "benchmarks/results/tabletop-default.json"
_BETWEEN = re.compile(r"(<!-- results -->\n).*?(<!-- end -->)", re.S)


def rate(row: dict[str, Any]) -> str:
    """A success rate with its 95% Wilson interval, in per cent."""
    return f"{row['success_rate']:.0%} [{row['wilson_low']:.0%}, {row['wilson_high']:.0%}]"


def points(row: dict[str, Any]) -> str:
    """A paired difference with its 95% interval, in points."""
    return f"{100 * row['difference']:+.0f} [{100 * row['low']:+.0f}, {100 * row['high']:+.0f}]"


def table() -> str:
    """Rates of the three variants, the paired differences of planning to its controls, and how they were evaluated."""
    whole = json.loads((PROJECT / SOURCE).read_text())
    found, settings = whole["evaluation"], whole["parameters"]["eval_libero"]
    limits = " or ".join(f"{steps}" for steps in sorted(set(found["within"].values())))
    longest, default = settings["within"], load_settings(PROJECT / "params.yaml").eval_libero.episodes_per_task
    more = (
        ""
        if (n := settings["episodes_per_task"]) == default
        else (f"Of each task {n} initial states; `make repro` evaluates the first {default}. ")
    )
    lines = [
        f"| {found['suite']}, {found['planned']['episodes']} episodes each | planned | unplanned | temperature alone "
        "| planned - unplanned | planned - temperature |",
        "|---|---|---|---|---|---|",
    ]
    pairs = ("planned-unplanned", "planned-temperature")
    soon = [rate(found[variant]["within"]) for variant in VARIANTS]
    ever = [rate(found[variant]) for variant in VARIANTS]
    steps = [f"{found[variant]['median_steps_to_success']:.0f}" for variant in VARIANTS]
    rows = (
        (f"solved within {limits} steps", [*soon, *(points(found["paired_within"][pair]) for pair in pairs)]),
        ("solved at all", [*ever, *(points(found["paired"][pair]) for pair in pairs)]),
        ("median steps of the solved ones", [*steps, "", ""]),
    )
    lines += [f"| {name} | {' | '.join(cells)} |" for name, cells in rows]
    lines += [
        "",
        f"Rates with 95% Wilson intervals, paired differences in points with 95% bootstrap intervals; "
        f"{settings['execute_steps']} actions of a plan are executed before the next one (`execute_steps`); "
        f"{limits} steps are {longest:g} times the direct expert's. "
        f"{more}Numbers: [{SOURCE.rpartition('/')[2]}]({SOURCE}).",
    ]
    return "\n".join(lines) + "\n"


def put_in(text: str) -> str:
    """A README's text with the table between its marks."""
    return _BETWEEN.sub(lambda match: match[1] + table() + match[2], text)


def main() -> None:
    """Write it."""
    path = PROJECT / "README.md"
    path.write_text(put_in(path.read_text()))


if __name__ == "__main__":
    main()
