"""The object-store protocol and what its implementations share (digests, atomic local writes, disk errors)."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from wav.errors import StorageError
from wav.io.files import fsync_path

BLOCK_BYTES = 4 << 20


class TransferError(StorageError):
    """A download broke off; what has arrived stays beside the target and the next attempt goes on from there."""


@dataclass(frozen=True)
class ObjectInfo:
    """One object, or one version of it. ``version`` and ``sha256`` are empty where the store keeps none."""

    key: str
    size: int
    version: str
    etag: str
    sha256: str
    modified: float


Infos = list[ObjectInfo]  # a name of its own: inside a store `list` is the method


class ObjectStore(Protocol):
    """Named blobs. Keys are relative, ``/``-separated; every failure is a :class:`wav.errors.StorageError`."""

    url: str

    def check(self) -> None:
        """Write, read and remove a small object; raises with the remedy when the store cannot be used."""

    def uri(self, key: str) -> str:
        """Address of ``key`` for people and logs (no credentials in it)."""

    def put_file(self, path: Path, key: str) -> ObjectInfo:
        """Upload a file; its SHA-256 is computed here and stored with the object."""

    def put_bytes(self, key: str, data: bytes) -> ObjectInfo:
        """Upload a small object in one request."""

    def get_file(self, key: str, path: Path, sha256: str = "", version: str = "") -> ObjectInfo:
        """Download to ``path`` (atomically); compared with ``sha256``, or with the digest stored at upload."""

    def get_bytes(self, key: str, version: str = "") -> bytes:
        """Content of a small object."""

    def head(self, key: str) -> ObjectInfo | None:
        """The newest version, or None where there is no such object."""

    def list(self, prefix: str) -> Infos:
        """Objects whose key starts with ``prefix``, in key order."""

    def put_if_absent(self, key: str, data: bytes) -> ObjectInfo | None:
        """Create ``key``; None when it exists already."""

    def put_if_match(self, key: str, data: bytes, etag: str) -> ObjectInfo | None:
        """Replace ``key`` if its newest version still has ``etag``; None when another writer was first."""

    def delete(self, key: str) -> None:
        """Hide the object; a versioned store keeps its older versions. No error when there is none."""

    def versions(self, key: str) -> Infos:
        """Versions of ``key``, newest first (one at most where the store keeps none)."""

    def purge(self, key: str) -> None:
        """Delete every version of ``key``, which frees its space."""

    def abort_uploads(self, prefix: str, before: float) -> int:
        """Give up uploads below ``prefix`` begun before a time (seconds since 1970); returns how many."""


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn an ``OSError`` of the local disk into a StorageError that names the path and the remedy."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageError(f"{path}: the disk is full; free space or set WAV_WORKSPACE to a larger disk") from error
        raise StorageError(f"{path}: {error.strerror or error}; check the path and its permissions") from error


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary sibling of ``path`` that is flushed and renamed to it on success and removed otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        yield temporary
        fsync_path(temporary)
        temporary.replace(path)
        fsync_path(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def partial_file(path: Path) -> Iterator[BinaryIO]:
    """A file that grows over several attempts, open for appending and locked against a second downloader."""
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StorageError(f"{path}: another process downloads the same file; wait for it to end") from None
        yield file


def check_key(key: str) -> str:
    """``key`` itself; StorageError when it would leave the store."""
    if not key or key.startswith("/") or ".." in key.split("/"):
        raise StorageError(f"object key {key!r}: must be a relative path without '..'; this is a bug in the caller")
    return key


def verify_digest(where: str, found: str, expected: str) -> None:
    """Raise StorageError unless two SHA-256 digests agree."""
    if expected and found != expected:
        raise StorageError(
            f"{where}: content has SHA-256 {found[:12]}…, expected {expected[:12]}…; it is damaged, "
            "fetch it again or restore an older version"
        )
