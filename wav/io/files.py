"""Folders that appear whole or not at all, and the manifests that say what is in them.

Every stage that writes arrays (episodes, rewards, latents) writes into a temporary sibling of its output folder and
renames it at the end, so that a run that is killed, or a disk that fills up, leaves nothing under the final name::

    with atomic_folder(out) as folder:
        np.save(folder / "values.npy", values)
        write_manifest(folder, "wav-rewards", 1, {"episodes": store.digest})

    manifest = read_manifest(out, "wav-rewards", 1, remedy="run `dvc repro label_rewards`")
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import platform
import re
import shutil
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from wav.errors import DataError, StorageError, WavError, shown
from wav.io.readers import read_json as read_json  # the way back from write_json
from wav.io.readers import understood

MANIFEST = "manifest.json"
#: where the files lie that a folder lacks (wav.io.storage.streaming); hidden, so no part of what it holds
ORIGIN = ".origin.json"
#: a file takes about 150 bytes, and a store may have a hundred thousand
MANIFEST_BYTES = 1 << 30
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100
#: process ids of several machines, and of containers above all, are the same ones
_HOST = re.sub(r"[^\w.]", "_", platform.node())


def inside(folder: str | Path, name: str) -> Path:
    """``folder / name``, where ``name`` is what somebody wrote down: a manifest, an index, a key of a store.

    DataError where it is absolute or has a part that is empty, ``.`` or ``..``, and so may mean a file elsewhere.
    """
    if not isinstance(name, str) or "\0" in name or not {"", ".", ".."}.isdisjoint(name.split("/")):
        raise DataError(f"{name!r:.200}: is no path of a file below {folder}; find out who wrote it there")
    return Path(folder) / name


@dataclass(frozen=True)
class FileRecord:
    """One file of a folder: path relative to the folder (POSIX), size in bytes, SHA-256 in hexadecimal."""

    path: str
    bytes: int
    sha256: str
    version: str = ""
    """Version id in an object store; empty on disk."""

    def __post_init__(self) -> None:
        inside(".", self.path)

    def to_json(self) -> dict[str, Any]:
        """Plain data for a manifest."""
        return {name: value for name, value in asdict(self).items() if name != "version" or value}


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def canonical_digest(data: Any) -> str:
    """SHA-256 of plain data written as canonical JSON (sorted keys, no spaces): equal data, equal digest."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


@contextlib.contextmanager
def disk_errors(path: str | Path) -> Iterator[None]:
    """Turn a full disk (ENOSPC, EDQUOT, numpy's short writes) into StorageError naming ``path`` and the remedy."""
    try:
        yield
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        short_write = error.errno is None and "requested and" in str(error)
        if error.errno not in (errno.ENOSPC, errno.EDQUOT) and not short_write:
            raise
        free = _free_bytes(Path(path))
        raise StorageError(
            f"{path}: the disk is full ({free / 2**20:.0f} MiB free); free some space and run again; nothing was left "
            "half-written"
        ) from error


def _free_bytes(path: Path) -> int:
    """Free bytes on the disk of ``path`` or of its nearest existing parent."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def require_free_space(path: str | Path, needed: int) -> None:
    """StorageError where fewer than ``needed`` bytes are free under ``path``."""
    free = _free_bytes(Path(path))
    if free < needed:
        raise StorageError(
            f"{path}: needs {needed / 2**20:.0f} MiB, the disk has {free / 2**20:.0f} MiB free; "
            "free some space and run again"
        )


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary sibling folder that becomes ``path`` when the block ends without an error.

    An existing folder at ``path`` is replaced in one step; with an error nothing changes there. Leftovers of writers
    that died are removed first.

    Raises:
        StorageError: the disk is full.
        DataError: ``path`` is a file.
    """
    path = Path(path)
    if path.is_symlink():
        path = path.resolve()
    if path.exists() and not path.is_dir():
        raise DataError(f"{path}: is a file where a folder is to be written; remove it")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path)
        temporary = path.with_name(f".{path.name}.tmp-{_HOST}-{os.getpid()}")
        temporary.mkdir()
        try:
            yield temporary
            for root, _, files in os.walk(temporary):
                for name in (*files, "."):
                    fsync_path(Path(root) / name)
            replace_folder(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _remove_leftovers(path: Path) -> None:
    """Remove temporary siblings of ``path`` whose process is gone (or is this one, which holds none yet).

    Those of other machines, which share the disk, are theirs: their processes cannot be seen from here.
    """
    import psutil

    start = f".{path.name}.tmp-"
    for old in path.parent.glob(f"{start}*"):
        host, _, pid = old.name.removeprefix(start).rpartition("-")
        if host not in ("", "old", _HOST):
            continue
        if not pid.isdigit() or int(pid) == os.getpid() or not psutil.pid_exists(int(pid)):
            shutil.rmtree(old, ignore_errors=True)


def fsync_path(path: Path) -> None:
    """Make a file's content, or a folder's entries (renames, new files), durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_folder(new: Path, path: Path) -> None:
    """Rename ``new`` to ``path``; where ``path`` exists the two are exchanged, so that the name never vanishes.

    The former content is gone or, after an exchange, under the name ``new``: remove that.
    """
    if not path.exists():
        os.rename(new, path)
    elif not _exchange(new, path):  # file systems without RENAME_EXCHANGE: two renames
        old = path.with_name(f".{path.name}.tmp-old-{os.getpid()}")
        os.rename(path, old)
        os.rename(new, path)
        shutil.rmtree(old)
    fsync_path(path.parent)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two folders with renameat2(RENAME_EXCHANGE); False where the system has no such call."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    result = renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE)
    return bool(result == 0)


def link(source: Path, target: Path) -> None:
    """A second name for a file, or a copy where the file system has no links."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


@contextlib.contextmanager
def atomic_file(path: Path, durable: bool = False) -> Iterator[Path]:
    """Yield a temporary sibling that becomes ``path`` when the block ends without an error, and is removed otherwise.

    ``durable``: the folder is made where it is missing, and content and name are flushed to the disk.

    Raises:
        StorageError: the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    with disk_errors(path):
        if durable:
            path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            if durable:
                fsync_path(temporary)
            os.replace(temporary, path)
            if durable:
                fsync_path(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def write_json(path: str | Path, data: Any) -> None:
    """Write plain data as indented JSON with sorted keys, atomically (NaN is refused: it is not JSON)."""
    write_text(path, json.dumps(data, indent=2, sort_keys=True, allow_nan=False) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Write a text file atomically, making its folder."""
    write_bytes(Path(path), text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically, making its folder."""
    with atomic_file(path) as temporary:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)


def file_records(
    folder: str | Path, exclude: Iterable[str] = (MANIFEST,), known: Mapping[str, str] | None = None
) -> tuple[FileRecord, ...]:
    """Size and digest of every file under ``folder``, sorted by path; ``known`` digests are not computed again."""
    folder, skip, known = Path(folder), set(exclude), known or {}
    paths = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return tuple(
        FileRecord(path, (folder / path).stat().st_size, known.get(path) or file_digest(folder / path))
        for path in paths
        if path not in skip
    )


def check_files(
    records: Iterable[FileRecord],
    folder: str | Path,
    *,
    remedy: str,
    digests: bool = False,
    closed: Collection[str] | None = None,
    error: type[WavError] = DataError,
) -> None:
    """Compare the files of ``folder`` with a manifest's records: sizes always, contents with ``digests``.

    Files that come when they are read (:data:`ORIGIN`) are compared then.

    ``closed``: there may be no other files than these. Hidden ones (``.gitattributes``) are nobody's, and nothing reads
    them.

    Raises:
        DataError (or ``error``): a file is missing, truncated or (with ``digests``) changed, or is one too many; names
            it and ends in ``remedy``.
    """
    records = tuple(records)
    listed = {MANIFEST, *(record.path for record in records)}
    if closed is not None and (odd := _unlisted(Path(folder), listed.union(closed))):
        raise error(f"{odd}: is not in the manifest, so it is no part of this folder; remove it, or {remedy}")
    partial = (Path(folder) / ORIGIN).is_file()
    for record in records:
        path = Path(folder) / record.path
        if not path.is_file():
            if partial and record.path.startswith("shard-"):
                continue
            raise error(f"{path}: missing, though the manifest lists it; {remedy}")
        size = path.stat().st_size
        if size != record.bytes:
            kind = "truncated" if size < record.bytes else "too long"
            raise error(f"{path}: {kind}, {size} bytes where the manifest says {record.bytes}; {remedy}")
        if digests and file_digest(path) != record.sha256:
            raise error(f"{path}: content does not match the manifest's SHA-256 {record.sha256[:12]}; {remedy}")


def _unlisted(folder: Path, listed: set[str]) -> Path | None:
    """A file that is not listed, or a link to a folder, which might hold any; hidden names are passed over."""
    for root, folders, files in os.walk(folder):
        place = Path(root)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        links = [name for name in folders if (place / name).is_symlink()]
        for name in [*links, *sorted(files)]:
            path = place / name
            if not name.startswith(".") and path.relative_to(folder).as_posix() not in listed:
                return path
    return None


def manifest_files(manifest: Mapping[str, Any]) -> tuple[FileRecord, ...]:
    """The files a manifest lists; TypeError or KeyError where it is no list of records."""
    records = tuple(FileRecord(**record) for record in manifest["files"])
    for record in records:
        if [type(value) for value in asdict(record).values()] != [str, int, str, str]:
            raise TypeError(f"files: {shown(asdict(record))}")
    return records


def manifest_data(name: str, version: int, files: Iterable[FileRecord], content: Mapping[str, Any]) -> dict[str, Any]:
    """The one form of a manifest: ``content``, the format's name and version, a record of every file."""
    return {**content, "format": name, "version": version, "files": [record.to_json() for record in files]}


def write_manifest(
    folder: str | Path,
    name: str,
    version: int,
    content: Mapping[str, Any],
    known: Mapping[str, str] | None = None,
    exclude: Iterable[str] = (),
) -> dict[str, Any]:
    """Write ``manifest.json`` with a record of every other file but ``exclude``; see :func:`manifest_data`.

    ``known``: SHA-256 by path of files whose digest was computed when they were written.
    """
    manifest = manifest_data(name, version, file_records(folder, (MANIFEST, *exclude), known), content)
    write_json(Path(folder) / MANIFEST, manifest)
    return manifest


def check_format(
    manifest: Any, name: str, version: int, where: str, remedy: str, error: type[WavError] = DataError
) -> dict[str, Any]:
    """``manifest`` itself; DataError (or ``error``) where it is of another format or version."""
    if not isinstance(manifest, dict) or manifest.get("format") != name:
        found = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
        raise error(f"{where}: format {shown(found)} where {name!r} is expected; {remedy}")
    found = manifest.get("version")
    if found != version or isinstance(found, bool):
        raise error(f"{where}: version {shown(found)} of {name} where this code reads {version}; {remedy}")
    return manifest


def read_manifest(folder: str | Path, name: str, version: int, *, remedy: str) -> dict[str, Any]:
    """``manifest.json`` of a folder; DataError where its format, its version or the size of a file is another."""
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; {remedy}")
    path = folder / MANIFEST
    manifest = check_format(read_json(path, remedy, limit=MANIFEST_BYTES), name, version, str(path), remedy)
    with understood(path, remedy):
        check_files(manifest_files(manifest), folder, remedy=remedy)
    return manifest


def manifest_digest(manifest: Mapping[str, Any]) -> str:
    """Digest of a manifest, hence of everything it lists: the identity of the folder's content."""
    return canonical_digest(dict(manifest))
