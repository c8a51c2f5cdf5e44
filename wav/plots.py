"""Pictures of flows and reports, drawn with matplotlib: no display, no global pyplot state; PNG but for bars (SVG)."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from wav.codec.base import psnr
from wav.errors import DataError
from wav.rewards.terms import RewardTerms

#: One colour per variant, everywhere.
COLOURS = {"planned": "#2563eb", "unplanned": "#6b7280", "temperature": "#d97706"}
_DPI = 110
_MAX_STRIP = 12


def png(figure: Figure) -> bytes:
    """A figure as PNG bytes; equal figures give equal bytes."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": ""})  # no version: equal pictures, equal bytes
    return buffer.getvalue()


def _figure(width: float, height: float, title: str) -> Figure:
    """Empty figure of this size in inches."""
    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    if title:
        figure.suptitle(title, fontsize=11)
    return figure


def _chart(xlabel: str, ylabel: str, title: str = "", width: float = 7.5) -> tuple[Figure, Axes]:
    """Empty chart with a grid."""
    figure = _figure(width, 3.8, title)
    axes = figure.add_subplot()
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.3)
    return figure, axes


def read_curve(path: Path) -> tuple[list[float], list[float]]:
    """Steps and values of a dvclive TSV; the value is its last column. DataError where a row is not numbers."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    try:
        name = [key for key in rows[0] if key not in ("step", "timestamp")][-1] if rows else ""
        steps = [float(row.get("step") or i) for i, row in enumerate(rows)]
        return steps, [float(row[name]) for row in rows]
    except (ValueError, TypeError, IndexError) as error:
        raise DataError(f"{path}: not a curve ({error}); run the training stage again") from None


def curves(
    columns: Mapping[str, ArrayLike],
    x: ArrayLike | None = None,
    title: str = "",
    xlabel: str = "step",
    ylabel: str = "",
) -> bytes:
    """Line plot of named columns of values (n,), where NaN breaks a line, at positions ``x`` (n,), else from 0 on.

    Raises:
        DataError: there is no column.
    """
    if not columns:
        raise DataError("curves: no column to draw; pass at least one")
    figure, axes = _chart(xlabel, ylabel, title)
    for name, values in columns.items():
        y = np.asarray(values, dtype=np.float64)
        axes.plot(np.arange(len(y)) if x is None else np.asarray(x)[: len(y)], y, label=name, linewidth=1.4)
    if len(columns) > 1 or not ylabel:
        axes.legend(fontsize=8, ncols=1 + len(columns) // 8)
    return png(figure)


def training_curves(curves: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> bytes:
    """Losses over steps: name -> (steps, values); many are smoothed, and logarithmic where all are positive."""
    from scipy.ndimage import uniform_filter1d  # slow to import, and every stage imports this module

    figure, axes = _chart("step", "")
    for name, (steps, values) in curves.items():
        (line,) = axes.plot(steps, values, linewidth=1.3, marker="." if len(values) < 20 else "", label=name)
        if len(values) > 60:
            axes.plot(steps, values, color=line.get_color(), alpha=0.25, linewidth=0.8)
            line.set_ydata(uniform_filter1d(np.asarray(values, float), len(values) // 20, mode="nearest"))
    if all(value > 0 for _, values in curves.values() for value in values):
        axes.set_yscale("log")
    axes.legend(fontsize=8)
    return png(figure)


def success_rates(metrics: Mapping[str, Any], variants: Sequence[str]) -> str:
    """SVG of success rates with Wilson intervals, per task (or suite, of several) and overall, a colour per variant."""
    suites = metrics.get("suites", {})
    tasks = [*(suites or metrics[variants[0]]["tasks"]), "all"]
    figure, axes = _chart("", "success, %", width=1.6 + 1.5 * len(tasks))
    width = 0.8 / len(variants)
    for number, variant in enumerate(variants):
        parts = [own[variant] for own in suites.values()] or metrics[variant]["tasks"].values()
        names = ("wilson_low", "success_rate", "wilson_high")
        low, rate, high = (100 * np.array([rates[name] for rates in (*parts, metrics[variant])]) for name in names)
        x = np.arange(len(tasks)) + (number - (len(variants) - 1) / 2) * width
        axes.bar(x, rate, 0.9 * width, color=COLOURS[variant], label=variant)
        axes.errorbar(x, rate, np.maximum([rate - low, high - rate], 0), fmt="none", ecolor="black", capsize=3)
    axes.set_xticks(range(len(tasks)), [task.replace("_", " ") for task in tasks])
    axes.set_ylim(0, 105)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "wav"}):  # neither date nor chance: equal numbers, equal text
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def image_strip(
    rows: Sequence[Sequence[NDArray[np.uint8]]],
    labels: Sequence[str] = (),
    title: str = "",
    names: Sequence[str] = (),
) -> bytes:
    """Rows of images (H, W, 3) uint8 side by side, ``labels`` below the columns and ``names`` left of the rows.

    Raises:
        DataError: there is no image.
    """
    columns = max((len(images) for images in rows), default=0)
    if not columns:
        raise DataError("image_strip: no image to draw; pass at least one")
    first = next(image for images in rows for image in images)
    height = 1.3 * first.shape[0] / first.shape[1]
    figure = _figure(0.4 + 1.35 * columns, 0.6 + (height + 0.15) * len(rows), title)
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    for line, name in zip(grid, names, strict=False):
        line[0].set_ylabel(name, fontsize=8)
    for line, images in zip(grid, rows, strict=True):
        for axes, image in zip(line, images, strict=False):
            axes.imshow(np.asarray(image), interpolation="nearest")
    for axes, text in zip(grid[-1], labels, strict=False):
        axes.set_xlabel(text, fontsize=8)
    return png(figure)


def reward_terms(terms: RewardTerms, title: str = "") -> bytes:
    """Weighted terms of an episode over time, in one plot of similarities and one of motions, with their sum."""
    figure = _figure(8.0, 6.0, title)
    upper, lower = figure.subplots(2, 1, sharex=True)
    for name, values, weight in zip(terms.names, terms.weighted.T, terms.weights, strict=True):
        (upper if weight > 0 else lower).plot(values, label=name, linewidth=1.2)
    upper.plot(terms.reward, label="reward", color="black", linewidth=2)
    upper.set_ylabel("similarity x weight")
    lower.set(ylabel="motion x weight", xlabel="environment step")
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7, ncols=2)
    return png(figure)


def spearman(values: ArrayLike) -> float:
    """Spearman correlation of values (T,) with time; NaN where they are constant or fewer than two."""
    from scipy.stats import spearmanr  # a sixth of the time in which a stage starts, and one picture needs it

    x = np.asarray(values, dtype=np.float64)
    if len(x) < 2 or np.ptp(x) == 0:
        return float("nan")
    return float(spearmanr(np.arange(len(x)), x).statistic)


def returns_over_time(returns: Sequence[ArrayLike], title: str = "") -> bytes:
    """Returns (T_i,) of several episodes against the share of the episode done; the title gives the median Spearman.

    Raises:
        DataError: there is no episode.
    """
    if not returns:
        raise DataError("returns_over_time: no episode to draw; pass at least one")
    correlations = [spearman(value) for value in returns]
    known = [c for c in correlations if np.isfinite(c)]
    median = f"median Spearman with time {np.median(known):.2f}" if known else "constant returns"
    figure, axes = _chart("share of the episode", "return", f"{title} ({median}, {len(returns)} episodes)".strip())
    for value in returns:
        y = np.asarray(value, dtype=np.float64)
        axes.plot(np.linspace(0, 1, len(y)), y, linewidth=1, alpha=0.6)
    return png(figure)


def reconstruction(images: NDArray[np.uint8], decoded: NDArray[np.uint8], title: str = "") -> bytes:
    """Images (N, H, W, 3) above their reconstructions, with the PSNR (dB) of each; at most twelve, evenly spaced."""
    chosen = np.unique(np.linspace(0, len(images) - 1, min(len(images), _MAX_STRIP)).round().astype(int))
    below = [f"{psnr(decoded[i : i + 1], images[i : i + 1]):.1f} dB" for i in chosen]
    rows = [[images[i] for i in chosen], [decoded[i] for i in chosen]]
    title = f"{title} (PSNR {psnr(decoded, images):.1f} dB)".strip()
    return image_strip(rows, below, title, ("frame", "decoded"))
