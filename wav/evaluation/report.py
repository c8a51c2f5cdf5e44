"""``reports/index.html``: everything the pipeline found, in one self-contained page that needs no network.

It is made from whatever lies in the workspace; a part that is not there is named on the page, never invented.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2

from wav import plots
from wav.evaluation import tables
from wav.evaluation.extras import table
from wav.evaluation.records import EpisodeRecord, read_record
from wav.io.files import read_json, write_text
from wav.planning import VARIANTS
from wav.stages import STAGES, TRAINING

_MIME = {".png": "image/png", ".mp4": "video/mp4", ".svg": "image/svg+xml"}
_MAX_VIDEOS, _MAX_PICTURES = 12, 9
#: Files beyond this size are named instead of embedded, so that the page stays a page.
_MAX_BYTES = 4 * 2**20


@dataclass(frozen=True)
class Item:
    """A picture or video with its caption; ``source`` is a data URI."""

    caption: str
    source: str
    video: bool = False


@dataclass
class Page:
    """What the template shows; ``missing`` collects what was not produced."""

    suite: str
    metrics: dict[str, Any] | None = None  #: Of the closed loop; None where no variant was run in one.
    findings: list[str] = field(default_factory=list)
    success_chart: Item | None = None
    rollouts: list[Item] = field(default_factory=list)
    strips: list[Item] = field(default_factory=list)
    predictions: list[Item] = field(default_factory=list)
    values: list[Item] = field(default_factory=list)
    training: list[dict[str, Any]] = field(default_factory=list)
    pictures: dict[str, list[Item]] = field(default_factory=dict)
    planning: list[dict[str, Any]] = field(default_factory=list)
    timings: list[dict[str, Any]] = field(default_factory=list)
    study: list[list[str]] = field(default_factory=list)  #: Of `make study`, where it was run: heading and rows.
    plots: list[Item] = field(default_factory=list)  #: Of the study's axes.
    missing: list[str] = field(default_factory=list)


def build_report(workspace: Path, settings: Any = None) -> Path:
    """Write ``<workspace>/reports/index.html`` atomically.

    ``settings`` name the suite where nothing was evaluated yet.

    Returns:
        The page's path.

    Raises:
        DataError: a file that is there is damaged.
        StorageError: the disk is full.
    """
    workspace = Path(workspace)
    page = collect(workspace, suite=settings.data.suite if settings is not None else "unknown suite")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("wav.evaluation"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": lambda share: f"{100 * share:.0f}%", "duration": _duration}
    environment.globals |= {"tables": tables, "libero": table}
    path = workspace / "reports" / "index.html"
    text = environment.get_template("report.html.j2").render(page=page)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)
    return path


def collect(workspace: Path, suite: str) -> Page:
    """Read everything the page shows."""
    page = Page(suite)
    evaluation = workspace / "reports" / "eval"
    if (evaluation / "metrics.json").exists():
        metrics = read_json(evaluation / "metrics.json", "run `dvc repro eval_libero`")
        page.suite, page.findings = metrics["suite"], list(tables.findings(metrics))
        page.missing += [f"variant {name}: {why}" for name, why in metrics.get("not_applicable", {}).items()]
        records = _records(evaluation)
        _rollouts(page, evaluation, records)
        if variants := [name for name in VARIANTS if name in metrics]:
            page.metrics = metrics
            page.success_chart = Item("success", _uri(plots.success_rates(metrics, variants).encode(), ".svg"))
            _planning(page, variants, list(records.values()))
    else:
        page.missing.append("closed-loop results: stage eval_libero has not run")
    _held_out(page, evaluation)
    for stage, training in TRAINING.items():
        _training(page, stage, workspace / training.folder)
    for stage, title in (("label_rewards", "Rewards"), ("encode", "Codec"), ("ingest", "Demonstrations")):
        found = sorted((workspace / "reports" / stage).rglob("*.png"))
        if found:
            page.pictures[title] = _items(page, found[:_MAX_PICTURES])
        else:
            page.missing.append(f"{title.lower()} pictures: stage {stage} left none")
    _timings(page, workspace)
    _study(page, workspace / "reports" / "study")
    return page


def _uri(data: bytes, suffix: str) -> str:
    """A data URI."""
    return f"data:{_MIME[suffix]};base64,{base64.b64encode(data).decode()}"


def _items(page: Page, paths: Iterable[Path], captions: Mapping[str, str] | None = None) -> list[Item]:
    """Files embedded; a file too large is listed as missing instead."""
    items = []
    for path in paths:
        data = path.read_bytes()
        if len(data) > _MAX_BYTES:
            page.missing.append(f"{path.name}: {len(data) / 2**20:.0f} MiB, too large to embed; open it in reports/")
            continue
        caption = (captions or {}).get(path.stem, path.stem.replace("_", " "))
        items.append(Item(caption, _uri(data, path.suffix), path.suffix == ".mp4"))
    return items


def _records(evaluation: Path) -> dict[str, EpisodeRecord]:
    """``<suite>-<variant>-<task>-<index>`` -> record."""
    records = {}
    for path in sorted((evaluation / "episodes").rglob("*.json")):
        record = read_record(path)
        group = path.relative_to(evaluation / "episodes").parts[0]
        records[f"{record.suite}-{group}-{path.stem}"] = record
    return records


def _rollouts(page: Page, evaluation: Path, records: Mapping[str, EpisodeRecord]) -> None:
    """Videos, strips and predictions, captioned with what came of the episode."""
    captions = {
        name: f"{r.suite}, {r.variant}: “{r.instruction}” (initial state {r.init_index}), "
        f"{'solved' if r.success else 'not solved'} after {r.steps} steps"
        for name, r in records.items()
    }
    videos = sorted((evaluation / "videos").glob("*.mp4"))
    page.rollouts = _items(page, _per_variant(videos), captions)
    strips = sorted((evaluation / "strips").glob("*.png"))
    page.strips = _items(page, _per_variant(strips)[:6], captions)
    if not videos and not strips:
        page.missing.append("rollout videos: eval_libero.videos is 0")
    pictures = sorted((evaluation / "predictions").glob("*.png"))
    for path in pictures:
        name, _, step = path.stem.partition("-step")
        when = f"predicted at step {int(step)}" if step else "rolled out over several chunks from the first frame"
        captions[path.stem] = f"{captions.get(name, name.replace('_', ' '))}; {when}"
    order = sorted(pictures, key=lambda path: "-held-out-" not in path.name)
    page.predictions = _items(page, order[:_MAX_PICTURES], captions)
    if not pictures:
        page.missing.append("predicted frames: no recorded episode was long enough")


def _per_variant(paths: list[Path]) -> list[Path]:
    """At most :data:`_MAX_VIDEOS` files, shared evenly among the variants."""
    groups: dict[str, list[Path]] = {}
    for path in paths:
        groups.setdefault(next((c for c in VARIANTS if f"-{c}-" in path.stem), ""), []).append(path)
    share = max(1, _MAX_VIDEOS // max(1, len(groups)))
    return [path for variant in (*VARIANTS, "") for path in groups.get(variant, [])[:share]]


def _planning(page: Page, variants: Sequence[str], records: Sequence[EpisodeRecord]) -> None:
    """What the planner did to the noise."""
    for variant in variants:
        chosen = [r for r in records if r.variant == variant and not r.swapped and r.plan]
        row: dict[str, Any] = {"variant": variant, "episodes": len(chosen)}
        for name in ("sigma_video", "sigma_value", "shift_video", "shift_value"):
            values = [v for r in chosen for v in r.plan.get(name, [])]
            row[name] = sum(values) / len(values) if values else None
        if chosen:
            page.planning.append(row)
    if not page.planning:
        page.missing.append("planning diagnostics: no planned episode, or planner.iterations is 0")


def _held_out(page: Page, evaluation: Path) -> None:
    """Predicted against real value, and frame quality, along a held-out demonstration."""
    if not (evaluation / "values.json").exists():
        page.missing.append("value along a held-out episode: reports/eval/values.json is not there")
        return
    found = read_json(evaluation / "values.json", "run `dvc repro eval_libero`")
    where = f"{found['suite']}, {found['task']}, held-out demonstration {found['episode']}"
    if found["predicted_value"]:
        lines = {"predicted": found["predicted_value"], "real return": found["real_value"]}
        picture = plots.curves(lines, found["steps"], xlabel="environment step", ylabel="return")
        page.values.append(Item(f"Predicted and real return ({where})", _uri(picture, ".png")))
    lines = {"predicted frames": found["psnr"], "current frame repeated": found["psnr_copy"]}
    picture = plots.curves(lines, found["steps"], xlabel="environment step", ylabel="PSNR, dB")
    page.values.append(Item(f"Predicted future frames ({where})", _uri(picture, ".png")))


def _training(page: Page, stage: str, folder: Path) -> None:
    """Curves and closing numbers of one training stage."""
    curves = {}
    for path in sorted((folder / "plots").rglob("*.tsv")):
        name = path.relative_to(folder / "plots").with_suffix("").as_posix().removeprefix("metrics/")
        if "loss" in name and (curve := plots.read_curve(path))[0]:
            curves[name] = curve
    path = folder / "metrics.json"
    numbers = read_json(path, f"run `dvc repro {stage}`") if path.exists() else {}
    if not curves and not numbers:
        page.missing.append(f"training curves of {stage}: {folder.name} has neither plots nor metrics")
        return
    chart = Item(f"{stage}: losses", _uri(plots.training_curves(curves), ".png")) if curves else None
    shown = {key: _number(value) for key, value in numbers.items() if isinstance(value, int | float)}
    page.training.append({"stage": stage, "chart": chart, "numbers": shown})


def _timings(page: Page, workspace: Path) -> None:
    """Seconds and peak memory per stage, in the pipeline's order."""
    for stage, row in STAGES.items():
        path = workspace / row.record
        if path.exists():
            facts = read_json(path, f"run `dvc repro {stage}`")
            page.timings.append({"stage": stage, "seconds": facts["seconds"], "memory": facts.get("peak_memory_gib")})
    if not page.timings:
        page.missing.append("timings: reports/stages holds no records")


def _study(page: Page, folder: Path) -> None:
    """Table and plots of a planning study; it is no stage, so that nothing is missing where there is none."""
    if (folder / "summary.md").exists():
        lines = (folder / "summary.md").read_text(encoding="utf-8").splitlines()
        rows = [line[2:-2].split(" | ") for line in lines if line.startswith("| ")]
        page.study = [row for row in rows if row[-1] != "---"]
        page.plots = _items(page, sorted((folder / "plots").glob("*.png")))


def _number(value: float) -> str:
    """Four significant digits, whole numbers with thousands separators."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _duration(seconds: float) -> str:
    """``12 s`` or ``3 min 20 s``."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
