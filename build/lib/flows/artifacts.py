"""Prefect artefacts: tables, pictures and a progress bar that moves, on the flow run that publishes them.

Keys are ``<flow>-<name>``; a key's versions are the runs' history in the UI.
"""

from __future__ import annotations

import base64
import logging
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect.artifacts import (
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.context import FlowRunContext

from flows.provenance import object_url
from flows.server import show
from wav import plots
from wav.config import Runtime
from wav.data.store import EpisodeStore
from wav.io.files import read_json

_LOG = logging.getLogger(__name__)
#: tasks of which a stage draws a picture: each takes half a second, and a dataset may have thousands
PICTURED_TASKS = 40
#: seconds between updates of a progress artefact and between log lines
UPDATE_SECONDS, LOG_SECONDS = 2.0, 10.0
#: how long a server that could not be reached is left alone
PAUSE_SECONDS = 60.0
#: pictures in one artefact: the API refuses bodies of many megabytes
MAX_IMAGE_BYTES = 600_000


def _key(name: str) -> str:
    context = FlowRunContext.get()
    prefix = f"{context.flow.name}-" if context and context.flow else ""
    return f"{prefix}{name}".lower().replace("_", "-").replace(".", "-")


def publish_markdown(name: str, text: str, description: str = "") -> None:
    """Markdown on the flow run."""
    show(name, lambda: create_markdown_artifact(text, key=_key(name), description=description or None))


def publish_table(name: str, rows: Sequence[Mapping[str, Any]], description: str = "") -> None:
    """A table, one row per mapping."""
    table = [dict(row) for row in rows]
    show(name, lambda: create_table_artifact(table, key=_key(name), description=description or None))


def publish_numbers(name: str, numbers: Mapping[str, Any], description: str = "") -> None:
    """A two-column table of scalars; nested mappings become dotted names."""
    rows = [{"name": key, "value": value} for key, value in _flatten(numbers)]
    publish_table(name, rows, description)


def _flatten(numbers: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in numbers.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", float(f"{value:.5g}") if isinstance(value, float) else str(value)


def publish_objects(
    name: str, objects: Sequence[tuple[str, str, int]], runtime: Runtime, description: str = ""
) -> None:
    """Links to objects of the store: address, version id and bytes of each."""
    rows = ["| object | version | bytes |", "|---|---|---:|"]
    for uri, version, size in objects:
        short = "/".join(uri.split("/")[-3:])
        link = object_url(uri, version, runtime.s3_endpoint, runtime.s3_region)
        rows.append(f"| [{short}]({link}) | `{version or '-'}` | {size:,} |")
    scheme = objects[0][0].partition("://")[0] if objects else ""
    below = os.path.commonpath([uri.partition("://")[2].rpartition("/")[0] for uri, _, _ in objects] or ["-"])
    publish_markdown(name, "\n".join([f"below `{scheme}://{below}/`\n", *rows]), description)


def publish_images(name: str, images: Mapping[str, bytes | Path], description: str = "") -> None:
    """Pictures (PNG bytes or files) inside one markdown artefact, as data URIs: no server has to hold them."""
    parts: list[str] = []
    total = 0
    for caption, image in images.items():
        data = image.read_bytes() if isinstance(image, Path) else image
        total += len(data)
        if total > MAX_IMAGE_BYTES and parts:
            parts.append(f"*{len(images) - len(parts)} more in the stage's folder under reports/*")
            break
        parts.append(f"**{caption}**\n\n![{caption}](data:image/png;base64,{base64.b64encode(data).decode()})")
    publish_markdown(name, "\n\n".join(parts), description)


def publish_values(folder: Path) -> None:
    """Predicted beside real value along a held-out demonstration, where the evaluation made ``values.json``."""
    path = folder / "values.json"
    if not path.is_file():
        return
    found = read_json(path, "evaluate again")
    columns = {name: found[f"{name}_value"] for name in ("predicted", "real") if found.get(f"{name}_value")}
    if columns:
        picture = plots.curves(columns, found["steps"], title=str(found["episode"]), ylabel="return")
        publish_images("values", {str(found["episode"]): picture}, "predicted and real value")


def pictured(episodes: EpisodeStore) -> dict[str, int]:
    """The first episode of each task, by a name for files; of many tasks only :data:`PICTURED_TASKS`, and says so."""
    first: dict[str, int] = {}
    for index, info in enumerate(episodes.episodes):
        first.setdefault(info.task, index)
    names = sorted(first)
    chosen = names[:: -(-len(names) // PICTURED_TASKS) or 1]
    if len(chosen) < len(names):
        _LOG.info("pictures of %d of %d tasks", len(chosen), len(names))
    return {name.replace("/", "."): first[name] for name in chosen}


class Progress:
    """A progress artefact and a log line with the time left; call it as often as you like.

    Use as a context manager: it reaches 100 only if the block ends well. A server that is away is tried again now and
    then, and the work goes on.
    """

    def __init__(self, what: str, logger: logging.Logger | logging.LoggerAdapter[Any]) -> None:
        self._what, self._logger = what, logger
        self._began = self._updated = self._logged = time.monotonic()
        self._artifact: UUID | None = None
        self._not_before = 0.0

    def __enter__(self) -> Progress:
        self._update(0.0, self._what)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._update(100.0, f"{self._what}: done in {time.monotonic() - self._began:.0f} s")

    def __call__(self, done: int, total: int, note: str = "", log: bool = True, left: float | None = None) -> None:
        """Report ``done`` of ``total``; ``note`` is appended (losses, successes).

        ``left``: seconds to go, from those who know better: a resumed run did not do all of ``done`` since it began.
        """
        now = time.monotonic()
        if now - self._updated < UPDATE_SECONDS and done < total:
            return
        elapsed = now - self._began
        if left is None:
            left = elapsed / done * (total - done) if done else 0.0
        text = f"{self._what}: {done}/{total}, {elapsed:.0f} s, {left:.0f} s left{f', {note}' if note else ''}"
        self._update(100.0 * done / max(total, 1), text)
        self._updated = now
        if log and (now - self._logged >= LOG_SECONDS or done >= total):
            self._logger.info(text)
            self._logged = now

    def _update(self, percent: float, text: str) -> None:
        if time.monotonic() < self._not_before:
            return

        def move() -> UUID | None:
            if self._artifact is not None:
                update_progress_artifact(self._artifact, min(percent, 100.0), description=text)
                return self._artifact
            created = create_progress_artifact(percent, key=_key("progress"), description=text)
            return created if isinstance(created, UUID) else None

        if (found := show("progress", move, retries=0)) is None:
            self._not_before = time.monotonic() + PAUSE_SECONDS
        else:
            self._artifact = found
