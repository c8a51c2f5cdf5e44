"""Tables and plots of a planning study, and the tables of docs/planning-study.md.

    python -m benchmarks.studies.show reports/study benchmarks/results/planning-study.json docs/planning-study.md

puts a finished study into one committed JSON and fills the page's tables from it. A table stands between
``<!-- study: AXIS [AXIS ...] -->`` and ``<!-- end -->``; what was not measured is said, never invented.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from wav.io.files import read_json, write_bytes, write_json, write_text
from wav.plots import COLOURS, png

REMEDY = "run `make study` again"
PICTURES = ("plots/value-truth.png", "truth/*/predictions/*-imagined.png", "plots/futures-*.png")
UNMEASURED = "Not measured yet: `make study`."


def rate(found: Mapping[str, Any]) -> str:
    """A success rate with its interval, in percent."""
    low, high = found["wilson_low"], found["wilson_high"]
    return f"{100 * found['success_rate']:.0f} [{100 * low:.0f}, {100 * high:.0f}]"


def difference(found: Mapping[str, Any]) -> str:
    """A paired difference with its interval, in points."""
    return f"{100 * found['difference']:+.0f} [{100 * found['low']:+.0f}, {100 * found['high']:+.0f}]"


def within(found: Mapping[str, Any]) -> Mapping[str, Any]:
    """A variant's success within the time limit; at all where no demonstration is known to be direct."""
    return found.get("within", found)  # type: ignore[no-any-return]


def controls(cell: Mapping[str, Any]) -> list[str]:
    """What planning was compared with, of the variants that the study was asked for."""
    return [name for name in cell["variants"] if name != "planned"]


def row(cell: Mapping[str, Any]) -> list[str]:
    """A cell's line of the table."""
    variants, paired = cell["variants"], cell["paired_within"]
    planned, steps = variants["planned"], [found["median_steps_to_success"] for found in variants.values()]
    use, ranked = cell.get("use", {}).get("action"), cell.get("ranking")
    return [
        cell["axis"] if cell["value"] == cell["axis"] else f"{cell['axis']} {cell['value']}",
        *(rate(within(found)) for found in variants.values()),
        *(difference(paired[f"planned-{name}"]) for name in controls(cell)),
        difference(cell["base"]["within"]),
        " / ".join(f"{100 * found['success_rate']:.0f}" for found in variants.values()),
        " / ".join("-" if count is None else f"{count:.0f}" for count in steps),
        " / ".join(f"{found['seconds_a_call']:.2f}" for found in variants.values()),
        f"{planned['peak_memory_gib']:.2f}",
        f"{cell['training_minutes']:.0f}",
        f"{100 * use.get('video', 0):.0f} + {100 * use.get('value', 0):.0f}" if use else "",
        f"{ranked['spearman']:.2f}" if ranked else "",
    ]


def table(study: Mapping[str, Any], axes: Sequence[str] = ()) -> str:
    """Markdown table of the cells of ``axes`` (all, where none is named), or that they are not measured."""
    cells = [cell for cell in study.get("cells", ()) if not axes or cell["axis"] in axes]
    if not cells:
        return UNMEASURED
    planned = cells[0]["variants"]["planned"]
    names = list(cells[0]["variants"])
    head = ["setting", *names, *(f"less {name}" for name in controls(cells[0])), "less base's"]
    head += ["at all", "median steps", "s a call", "GiB", "training", "use", "rank"]
    lines = [" | ".join(head), "|".join("---" for _ in head), *(" | ".join(row(cell)) for cell in cells)]
    limits = ", ".join(f"{task} {steps}" for task, steps in cells[0]["steps"].items()) or "the protocol's"
    note = (
        f"{study['suite']}, {planned['episodes']} paired episodes a row. Success in percent within a time limit ("
        f"{limits} steps), planned less the controls' and less the base's, 95% intervals; at all: the protocol's limit "
        f"({' / '.join(names)}); steps: of successes; a call: one full batch (in the same order); "
        "training: minutes of the value and joint stages; "
        "use: percent of the action's variance by video + value noise; rank: Spearman's correlation of scores with "
        "realised returns within a state."
    )
    return "\n".join(f"| {line} |" for line in lines) + f"\n\n{note}"


def plot(study: Mapping[str, Any], axis: str) -> bytes:
    """Success within the time limit and at all, and what a planned call costs, over the values of an axis."""
    cells = [cell for cell in study["cells"] if cell["axis"] == axis]
    figure = Figure(figsize=(11, 3.2), dpi=110, layout="constrained")
    x, (soon, ever, costs) = range(len(cells)), figure.subplots(1, 3)
    for axes, title, find in ((soon, "success within the time limit, %", within), (ever, "success at all, %", dict)):
        for name in cells[0]["variants"]:
            rates = [find(cell["variants"][name]) for cell in cells]
            middle = [100 * r["success_rate"] for r in rates]
            low = [max(0, m - 100 * r["wilson_low"]) for m, r in zip(middle, rates, strict=True)]
            high = [max(0, 100 * r["wilson_high"] - m) for m, r in zip(middle, rates, strict=True)]
            axes.errorbar(x, middle, [low, high], label=name, color=COLOURS[name], marker="o", markersize=3, capsize=3)
        axes.set(title=title, ylim=(-3, 103))
    soon.legend(fontsize=7)
    planned, memory = [cell["variants"]["planned"] for cell in cells], costs.twinx()
    costs.plot(x, [found["seconds_a_call"] for found in planned], color="#2563eb", marker="o", markersize=3)
    memory.plot(x, [found["peak_memory_gib"] for found in planned], color="#6b7280", marker=".", linestyle=":")
    costs.set(title="a planned call: seconds (blue), GiB (grey)", ylim=(0, None))
    memory.set(ylim=(0, None))
    for axes in (soon, ever, costs):
        axes.set_xticks(x, [cell["value"] for cell in cells], fontsize=8)
        axes.set_xlabel(axis)
        axes.grid(alpha=0.3)
    return png(figure)


def write_summary(out: Path, head: Mapping[str, Any], names: Sequence[str]) -> None:
    """``study.json`` of the named cells that are there, a plot per axis, and ``summary.md`` with table and plots."""
    paths = [path for path in (out / "cells" / f"{name}.json" for name in names) if path.exists()]
    study = {
        **head,
        "cells": [read_json(path, REMEDY) for path in paths],
        "truth": read_json(out / "truth.json", REMEDY),
    }
    write_json(out / "study.json", study)
    axes = list(dict.fromkeys(cell["axis"] for cell in study["cells"]))
    for axis in axes:
        write_bytes(out / "plots" / f"{axis}.png", plot(study, axis))
    found = (path.relative_to(out) for pattern in PICTURES for path in sorted(out.glob(pattern)))
    pictures = [*(Path("plots") / f"{axis}.png" for axis in axes), *found]
    ranks = ", ".join(f"{row['task']} ({row['style']}) {row['spearman']:.2f}" for row in study["truth"])
    text = (
        f"# Planning study: {head['suite']}\n\n{table(study)}\n\nSpearman's correlation of predicted with real return "
    )
    text += f"along held-out demonstrations: {ranks}. Imagined below real frames: `truth/`.\n\n"
    write_text(out / "summary.md", text + "\n\n".join(f"![{path.stem}]({path})" for path in pictures) + "\n")


def fill(text: str, study: Mapping[str, Any]) -> str:
    """A page's text with its tables made from ``study``."""

    def made(found: re.Match[str]) -> str:
        return f"{found[1]}\n{table(study, found[2].split())}\n{found[3]}"

    return re.sub(r"(<!-- study: ([\w ]+) -->)\n.*?\n(<!-- end -->)", made, text, flags=re.S)


def main() -> None:
    """Write the committed JSON and fill the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("study", type=Path, help="folder of a finished study")
    parser.add_argument("json", type=Path, help="file to write")
    parser.add_argument("page", type=Path, nargs="?", help="page whose tables are filled")
    chosen = parser.parse_args()
    study = read_json(chosen.study / "study.json", REMEDY)
    write_json(chosen.json, study)
    if chosen.page:
        write_text(chosen.page, fill(chosen.page.read_text(), study))


if __name__ == "__main__":
    main()
