"""Sets of files that are complete or absent: everything is written first, ``manifest.json`` last.

A folder is *sealed* when its manifest lists every file with size and SHA-256; :func:`publish` uploads a sealed
folder and its manifest last, so a prefix without a manifest is not a commit and no reader looks at it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from wav.errors import StorageError, cut
from wav.io.files import (
    MANIFEST,
    FileRecord,
    atomic_file,
    check_files,
    check_format,
    file_digest,
    file_records,
    fsync_path,
    manifest_data,
    manifest_files,
    replace_folder,
)
from wav.io.storage.base import DamagedError, ObjectStore, TransferError, disk_errors

FORMAT, VERSION = "wav-commit", 2
DOWNLOADS = 8  # files of a commit fetched side by side
Scalar = str | int | float | bool | None


@dataclass(frozen=True)
class Manifest:
    """What a commit holds: files, and a few named facts about them."""

    files: tuple[FileRecord, ...]
    meta: Mapping[str, Scalar]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(record.bytes for record in self.files)

    def to_json(self) -> str:
        """Canonical text of the manifest."""
        return json.dumps(
            manifest_data(FORMAT, VERSION, self.files, {"meta": dict(self.meta)}), indent=2, sort_keys=True
        )

    @staticmethod
    def from_json(text: bytes, where: str) -> Manifest:
        """Parse a manifest; DamagedError when it is damaged or of another format."""
        try:
            raw = check_format(json.loads(text), FORMAT, VERSION, where, "use a commit of this version", DamagedError)
            return Manifest(manifest_files(raw), {**raw["meta"]})
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DamagedError(
                f"{where}: damaged manifest ({cut(error)}); delete this commit and use an older one"
            ) from None


def seal(folder: Path, meta: Mapping[str, Scalar]) -> Manifest:
    """Flush and digest every file below ``folder`` and write its manifest, which completes it."""
    with disk_errors(folder):
        manifest = Manifest(file_records(folder), meta)
        for record in manifest.files:
            fsync_path(folder / record.path)
        with atomic_file(folder / MANIFEST, durable=True) as file:
            file.write_text(manifest.to_json())
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """Manifest of a sealed folder."""
    path = folder / MANIFEST
    if not path.is_file():
        raise DamagedError(f"{path}: missing, so {folder.name} is incomplete; delete the folder")
    return Manifest.from_json(path.read_bytes(), str(path))


def verify(folder: Path) -> Manifest:
    """Compare a sealed folder with its manifest; DamagedError names the first file that differs."""
    manifest, remedy = read_manifest(folder), f"delete {folder} and use an older commit"
    with disk_errors(folder):
        check_files(manifest.files, folder, remedy=remedy, digests=True, error=DamagedError)
    return manifest


def publish(store: ObjectStore, folder: Path, prefix: str) -> Manifest:
    """Upload a sealed folder below ``prefix``, manifest last; returns it with the objects' version ids.

    Publishing the same content twice uploads nothing. Other content under the same prefix, or a damaged manifest, first
    loses its manifest, so that no reader sees a mixture.
    """
    manifest = read_manifest(folder)
    try:
        remote = remote_manifest(store, prefix)
    except DamagedError:
        remote = Manifest((), {})
    if remote is not None:
        if [(e.path, e.sha256) for e in remote.files] == [(e.path, e.sha256) for e in manifest.files]:
            return remote
        store.delete(f"{prefix}/{MANIFEST}")
    entries = []
    for entry in manifest.files:
        key = f"{prefix}/{entry.path}"
        info = store.head(key)
        if info is None or not info.sha256 or (info.sha256, info.size) != (entry.sha256, entry.bytes):
            info = store.put_file(folder / entry.path, key)
        entries.append(replace(entry, version=info.version))
    uploaded = Manifest(tuple(entries), manifest.meta)
    store.put_bytes(f"{prefix}/{MANIFEST}", uploaded.to_json().encode())
    return uploaded


def fetch(store: ObjectStore, prefix: str, folder: Path) -> Manifest:
    """Download a commit to ``folder``, each file verified; nothing appears under that name otherwise.

    A download that broke off, even with its process, goes on with the files that are lacking: the others wait in a
    hidden sibling of ``folder``, named after the manifest, so that another commit's files never mix with them.

    Raises:
        TransferError: the connection broke; call again.
        DamagedError: there is no such commit, or it is damaged.
        StorageError: the store refused, or the disk is full.
    """
    manifest = remote_manifest(store, prefix)
    if manifest is None:
        raise DamagedError(f"{store.uri(prefix)}: no manifest, so no complete commit; choose another prefix")
    digest = hashlib.sha256(manifest.to_json().encode()).hexdigest()[:12]
    temporary = folder.with_name(f".{folder.name}.{digest}.part")
    listed = {entry.path for entry in manifest.files}

    def get(entry: FileRecord) -> None:
        target = temporary / entry.path
        if not (target.is_file() and file_digest(target) == entry.sha256):
            store.get_file(f"{prefix}/{entry.path}", target, entry.sha256, entry.version)

    try:
        with disk_errors(folder):
            temporary.mkdir(parents=True, exist_ok=True)
            for path in sorted(temporary.rglob("*")):  # of a transfer that was killed, or of a folder that was replaced
                if path.is_file() and path.relative_to(temporary).as_posix() not in listed:
                    path.unlink()
        with ThreadPoolExecutor(DOWNLOADS) as pool:
            list(pool.map(get, manifest.files))
        with disk_errors(folder):
            (temporary / MANIFEST).write_text(manifest.to_json())
            replace_folder(temporary, folder)
            shutil.rmtree(temporary, ignore_errors=True)
    except TransferError:
        raise
    except StorageError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return manifest


def commits(store: ObjectStore, prefix: str) -> list[str]:
    """Prefixes directly below ``prefix`` that hold a complete commit, in name order."""
    start = f"{prefix}/"
    found = []
    for info in store.list(start):
        name, _, rest = info.key[len(start) :].partition("/")
        if rest == MANIFEST:
            found.append(f"{start}{name}")
    return sorted(found)


def discard(store: ObjectStore, prefix: str) -> None:
    """Remove a commit and its versions, the manifest first, so that it is never seen incomplete."""
    store.purge(f"{prefix}/{MANIFEST}")
    for info in store.list(f"{prefix}/"):
        store.purge(info.key)


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay: the newest ``last``, the ``best`` by validation loss, multiples of ``every`` steps."""

    last: int = 2
    best: int = 0
    every: int = 0

    def old(self, facts: Mapping[str, Mapping[str, Scalar]]) -> list[str]:
        """Names that may go, of checkpoints by name (whose order is their age) with their manifests' facts."""
        names = sorted(facts)
        kept = set(names[-self.last :])
        if self.every:
            kept |= {name for name in names if int(facts[name].get("step") or 0) % self.every == 0}
        losses = {name: facts[name].get("validation_loss") for name in names}
        ranked = sorted((float(loss), name) for name, loss in losses.items() if isinstance(loss, int | float))
        kept |= {name for _, name in ranked[: self.best]}
        return [name for name in names if name not in kept]


def retain(store: ObjectStore, prefix: str, keep: Retention) -> list[str]:
    """Discard the commits below ``prefix`` that ``keep`` does not keep; returns what was discarded."""
    old = superseded(store, prefix, keep)
    for commit in old:
        discard(store, commit)
    return old


def superseded(store: ObjectStore, prefix: str, keep: Retention) -> list[str]:
    """Commits below ``prefix`` that ``keep`` does not keep."""
    facts: dict[str, Mapping[str, Scalar]] = {}
    for commit in commits(store, prefix):
        read = functools.partial(remote_manifest, store, commit)
        facts[commit] = facts_of(read) if keep.best or keep.every else {}  # else names tell
    return keep.old(facts)


def facts_of(read: Callable[[], Manifest | None]) -> Mapping[str, Scalar]:
    """Facts of the manifest that ``read`` gives; none of a damaged one, so that it holds up no other commit."""
    try:
        found = read()
    except DamagedError:
        return {}
    return found.meta if found else {}


def remote_manifest(store: ObjectStore, prefix: str) -> Manifest | None:
    """Manifest of a commit in the store; None where there is none, which is to say no commit."""
    key = f"{prefix}/{MANIFEST}"
    if store.head(key) is None:
        return None
    return Manifest.from_json(store.get_bytes(key), store.uri(key))
