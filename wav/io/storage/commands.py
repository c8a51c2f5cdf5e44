"""What ``wav storage ls|get|verify|gc`` do: look at a store's commits, fetch, check and thin out.

Each function returns or yields lines for people. Final weights (``.../model``) are never removed here: champions and
exports refer to their version ids.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wav.errors import StorageError
from wav.io.files import MANIFEST, FileRecord
from wav.io.storage.base import Infos, ObjectStore, TransferError
from wav.io.storage.commit import Retention, discard, fetch, remote_manifest, superseded

CHECKPOINTS = "/checkpoints/"


def listed(store: ObjectStore, prefix: str = "") -> Iterator[dict[str, Any]]:
    """Commits below ``prefix``, then folders of runs that are not complete: address, state, files, bytes, and facts.

    Facts are what the manifest says (step, validation loss, ranks); of a damaged commit, ``error`` is what is wrong.
    """
    folders = _folders(store, prefix)
    for name, infos in folders.items():
        if not _complete(name, infos):
            continue
        try:
            manifest = remote_manifest(store, name)
        except StorageError as error:
            yield {"address": store.uri(name), "state": "DAMAGED", "error": str(error)}
            continue
        if manifest is not None:
            facts = dict(sorted(manifest.meta.items()))
            size = {"files": len(manifest.files), "bytes": manifest.size}
            yield {"address": store.uri(name), "state": "complete", **size, "facts": facts}
    for name, infos in folders.items():
        if not _complete(name, infos) and CHECKPOINTS in name:
            yield {"address": store.uri(name), "state": "INCOMPLETE", "files": len(infos)}


def ls(store: ObjectStore, prefix: str = "") -> Iterator[str]:
    """The lines of :func:`listed`: address, files, size, and what the manifest says."""
    for row in listed(store, prefix):
        if row["state"] == "DAMAGED":
            yield f"{row['address']}  DAMAGED  {row['error']}"
        elif row["state"] == "INCOMPLETE":
            yield f"{row['address']}  INCOMPLETE  {row['files']} objects, no manifest (on its way, or left by a crash)"
        else:
            facts = "  ".join(f"{key}={value}" for key, value in row["facts"].items())
            yield f"{row['address']}  {row['files']} files  {row['bytes'] / 2**20:.1f} MiB  {facts}".rstrip()


def get(store: ObjectStore, prefix: str, folder: Path) -> str:
    """Download a commit, verified; a broken download goes on when it is asked for again.

    StorageError where ``folder`` exists, or there is no such commit, or it is damaged.
    """
    if folder.exists():
        raise StorageError(f"{folder}: exists already; name another folder or remove it")
    manifest = fetch(store, prefix.strip("/"), folder)
    return f"{folder}: {len(manifest.files)} files, {manifest.size / 2**20:.1f} MiB, every digest right"


def verify(store: ObjectStore, prefix: str) -> Iterator[str]:
    """Read a commit's objects back and compare each with its digest; a line per file, the bad ones first word BAD.

    StorageError where there is no such commit, TransferError where the connection broke.
    """
    prefix = prefix.strip("/")
    manifest = remote_manifest(store, prefix)
    if manifest is None:
        raise StorageError(f"{store.uri(prefix)}: no manifest, so no complete commit; see `wav storage ls`")
    with tempfile.TemporaryDirectory(prefix="wav-verify-") as folder:
        for entry in manifest.files:
            yield _verified(store, prefix, entry, Path(folder) / "object")


def _verified(store: ObjectStore, prefix: str, entry: FileRecord, path: Path) -> str:
    try:
        store.get_file(f"{prefix}/{entry.path}", path, entry.sha256, entry.version)
    except TransferError:
        raise
    except StorageError as error:
        return f"BAD {entry.path}: {error}"
    size = path.stat().st_size
    path.unlink()
    return f"good {entry.path}" if size == entry.bytes else f"BAD {entry.path}: {size} bytes, expected {entry.bytes}"


def gc(
    store: ObjectStore, keep: Retention, prefix: str = "training", older_s: float = 86400.0, delete: bool = False
) -> Iterator[str]:
    """Thin out the checkpoints of every run below ``prefix``, and what uploads of killed runs left.

    Args:
        store: where.
        keep: which checkpoints of each run stay.
        prefix: runs are looked for below it.
        older_s: an unfinished upload counts as left behind when nothing of it is younger than this (seconds).
        delete: remove; otherwise only say what would be removed.

    Yields:
        A line per thing removed.
    """
    word, before = ("removed" if delete else "would remove"), time.time() - older_s
    folders = _folders(store, prefix)
    runs = sorted({name.rpartition("/")[0] for name in folders if CHECKPOINTS in name})
    for run in runs:
        for commit in superseded(store, run, keep):
            if delete:
                discard(store, commit)
            yield f"{word} {store.uri(commit)}"
    for name, infos in folders.items():
        if CHECKPOINTS in name and not _complete(name, infos) and max(info.modified for info in infos) < before:
            if delete:
                discard(store, name)
            yield f"{word} {store.uri(name)} (unfinished upload)"
    if delete and (count := store.abort_uploads(prefix, before)):
        yield f"removed {count} unfinished transfers"


def _folders(store: ObjectStore, prefix: str) -> dict[str, Infos]:
    """Objects by the commit they belong to: a prefix with a manifest, or a checkpoint's folder without one."""
    infos = store.list(f"{prefix.strip('/')}/" if prefix.strip("/") else "")
    committed = {info.key.rpartition("/")[0] for info in infos if info.key.endswith(f"/{MANIFEST}")}
    found: dict[str, Infos] = {name: [] for name in sorted(committed)}
    for info in infos:
        parts = info.key.split("/")
        names = ["/".join(parts[:depth]) for depth in range(1, len(parts))]
        owner = next((name for name in names if name in committed), None)
        if owner is None and "checkpoints" in parts[:-2]:
            owner = "/".join(parts[: parts.index("checkpoints") + 2])
        if owner is not None:
            found.setdefault(owner, []).append(info)
    return found


def _complete(name: str, infos: Infos) -> bool:
    return any(info.key == f"{name}/{MANIFEST}" for info in infos)
