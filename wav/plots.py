"""Pictures as PNG bytes, drawn with matplotlib's Agg canvas: no display, no global pyplot state.

Shared by flows, reports and evaluation: reward terms, returns over time, reconstruction strips, curves.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from wav.codec.base import psnr
from wav.errors import DataError
from wav.rewards.terms import RewardTerms

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


def read_curve(path: Path) -> tuple[list[float], list[float]]:
    """Steps and values of a dvclive TSV; the value is its last column.

    Raises:
        DataError: a row is not numbers.
    """
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
    figure = _figure(7.5, 3.8, title)
    axes = figure.add_subplot()
    for name, values in columns.items():
        y = np.asarray(values, dtype=np.float64)
        axes.plot(np.arange(len(y)) if x is None else np.asarray(x)[: len(y)], y, label=name, linewidth=1.4)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.3)
    if len(columns) > 1 or not ylabel:
        axes.legend(fontsize=8, ncols=1 + len(columns) // 8)
    return png(figure)


def image_strip(
    rows: Sequence[Sequence[NDArray[np.uint8]]],
    labels: Sequence[str] = (),
    title: str = "",
    names: Sequence[str] = (),
) -> bytes:
    """Rows of images side by side.

    Args:
        rows: rows of images (H, W, 3) uint8.
        labels: one per column, below it.
        title: above the strip.
        names: one per row, left of it.

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
    figure = _figure(7.5, 3.8, f"{title} ({median}, {len(returns)} episodes)".strip())
    axes = figure.add_subplot()
    for value in returns:
        y = np.asarray(value, dtype=np.float64)
        axes.plot(np.linspace(0, 1, len(y)), y, linewidth=1, alpha=0.6)
    axes.set(xlabel="share of the episode", ylabel="return")
    axes.grid(alpha=0.3)
    return png(figure)


def reconstruction(images: NDArray[np.uint8], decoded: NDArray[np.uint8], title: str = "") -> bytes:
    """Images (N, H, W, 3) above their reconstructions, with the PSNR (dB) of each; at most twelve, evenly spaced."""
    chosen = np.unique(np.linspace(0, len(images) - 1, min(len(images), _MAX_STRIP)).round().astype(int))
    below = [f"{psnr(decoded[i : i + 1], images[i : i + 1]):.1f} dB" for i in chosen]
    rows = [[images[i] for i in chosen], [decoded[i] for i in chosen]]
    title = f"{title} (PSNR {psnr(decoded, images):.1f} dB)".strip()
    return image_strip(rows, below, title, ("frame", "decoded"))
