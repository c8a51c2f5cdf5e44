"""What a weekly retrain does besides retraining: say that a champion has grown old, remove runs of long ago."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path

from prefect.events import emit_event

from flows.server import show
from wav.io.storage import ObjectStore

#: event of a champion that was not replaced for long (infra/notify.py: whom it is told)
STALE = "wav.champion.stale"
DAY = 86400.0


def tell_stale(name: str, promoted: str, days: int, reason: str) -> bool:
    """Emit :data:`STALE` where the champion is older than ``days``; returns whether it is."""
    age = (datetime.now(timezone.utc) - datetime.fromisoformat(promoted)).days
    if age <= days:
        return False
    resource = {"prefect.resource.id": f"wav.champion.{name}", "prefect.resource.name": name}
    payload = {"text": f"champion {name} is {age} days old; no newer one takes its place: {reason}"}
    show("the champion's age", lambda: emit_event(STALE, resource, payload=payload))
    return True


def old_runs(folder: Path, store: ObjectStore, days: int) -> Iterator[str]:
    """Remove what runs of long ago left in ``runs/``, here and in the store; yields a line per run.

    Runs in which nothing is younger than ``days`` go; 0: none. Champions lie elsewhere (``policies/``), and so do
    trainings' checkpoints (``wav storage gc``). A folder that cannot be removed stays, with a line; so do links.
    """
    if not days:
        return
    before = time.time() - days * DAY
    for path in sorted(path for path in folder.glob("*/") if not path.is_symlink()):
        try:
            if max(item.lstat().st_mtime for item in (path, *path.rglob("*"))) < before:
                shutil.rmtree(path)
                yield f"removed {path}: nothing in it is younger than {days} days"
        except OSError as error:  # another user's files, say: no reason to end a retrain
            yield f"could not remove {path}: {error}; remove it by hand"
    runs: dict[str, list[tuple[str, float]]] = {}
    for info in store.list("runs/"):
        runs.setdefault(info.key.split("/")[1], []).append((info.key, info.modified))
    for name, objects in runs.items():
        if max(modified for _, modified in objects) < before:
            for key, _ in objects:
                store.purge(key)
            yield f"removed {store.uri(f'runs/{name}')}: nothing in it is younger than {days} days"
