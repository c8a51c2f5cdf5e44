"""Charts of the report as SVG text; matplotlib without a display, no state between calls."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.ndimage import uniform_filter1d

#: One colour per variant, everywhere.
COLOURS = {"planned": "#2563eb", "unplanned": "#6b7280", "temperature": "#d97706"}
_CYCLE = ("#2563eb", "#d97706", "#059669", "#db2777", "#6b7280", "#7c3aed")
_INK = "#1f2937"


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty chart in the report's style; sizes in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=_INK, labelsize=8)
    axes.grid(axis="y", color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def _svg(figure: Figure) -> str:
    """The figure as SVG text, without date or random identifiers so that equal data gives equal pictures."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "wav"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _labelled(figure: Figure, axes: Axes, xlabel: str, ylabel: str = "") -> str:
    """The finished chart with its legend."""
    axes.set_xlabel(xlabel, fontsize=8)
    axes.set_ylabel(ylabel, fontsize=8)
    axes.legend(fontsize=8, frameon=False)
    return _svg(figure)


def success_rates(metrics: Mapping[str, Any], variants: Sequence[str]) -> str:
    """Success rates with Wilson intervals, per task (or suite, of several) and overall, one colour per variant."""
    suites = metrics.get("suites", {})
    tasks = [*(suites or metrics[variants[0]]["tasks"]), "all"]
    figure, axes = _figure(1.6 + 1.5 * len(tasks), 2.8)
    width = 0.8 / len(variants)
    for c, variant in enumerate(variants):
        parts = [own[variant] for own in suites.values()] or list(metrics[variant]["tasks"].values())
        rates = [*parts, metrics[variant]]
        x = np.arange(len(tasks)) + (c - (len(variants) - 1) / 2) * width
        mid = np.array([100 * r["success_rate"] for r in rates])
        low = mid - [100 * r["wilson_low"] for r in rates]
        high = np.array([100 * r["wilson_high"] for r in rates]) - mid
        axes.bar(x, mid, 0.9 * width, color=COLOURS.get(variant, _CYCLE[c % len(_CYCLE)]), label=variant)
        axes.errorbar(x, mid, [low.clip(0), high.clip(0)], fmt="none", ecolor=_INK, elinewidth=1, capsize=3)
    axes.set_xticks(range(len(tasks)), [task.replace("_", " ") for task in tasks], fontsize=8)
    axes.set_ylim(0, 105)
    axes.set_ylabel("success, %", fontsize=8)
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return _svg(figure)


def along(steps: Sequence[int], lines: Mapping[str, Sequence[float]], xlabel: str, ylabel: str) -> str:
    """Named values at the same steps; empty ones are left out, the first one is blue."""
    figure, axes = _figure(5.2, 2.6)
    for (name, values), colour in zip(lines.items(), (COLOURS["planned"], _INK), strict=False):
        if values:
            axes.plot(steps, values, color=colour, marker="o", markersize=3, label=name)
    return _labelled(figure, axes, xlabel, ylabel)


def training_curves(curves: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> str:
    """Losses over steps: name -> (steps, values); logarithmic where all values are positive."""
    figure, axes = _figure(5.2, 2.6)
    for i, (name, (steps, values)) in enumerate(curves.items()):
        colour = _CYCLE[i % len(_CYCLE)]
        if len(values) > 60:
            axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
            values = uniform_filter1d(np.asarray(values, float), len(values) // 20, mode="nearest")
        axes.plot(steps, values, color=colour, linewidth=1.3, marker="." if len(values) < 20 else "", label=name)
    if all(v > 0 for _, values in curves.values() for v in values):
        axes.set_yscale("log")
    return _labelled(figure, axes, "step")


def values_by_outcome(groups: Mapping[str, Sequence[Sequence[float]]]) -> str:
    """Predicted value per policy call: one thin line per episode, a thick mean per outcome."""
    figure, axes = _figure(5.2, 2.6)
    for i, (name, rows) in enumerate(groups.items()):
        colour = ("#059669", "#dc2626")[i % 2]
        for row in rows[:25]:
            axes.plot(range(len(row)), row, color=colour, alpha=0.15, linewidth=0.8)
        longest = max((len(row) for row in rows), default=0)
        mean = [float(np.mean([row[k] for row in rows if len(row) > k])) for k in range(longest)]
        if mean:
            axes.plot(range(longest), mean, color=colour, linewidth=1.8, label=f"{name} ({len(rows)})")
    return _labelled(figure, axes, "policy call", "predicted return")
