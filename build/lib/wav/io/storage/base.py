"""The object-store protocol and what its implementations share."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from wav.errors import DataError, StorageError
from wav.io.files import disk_errors as full_disk_named
from wav.io.files import inside

T = TypeVar("T")
PATIENCE_S = 600.0  #: how long :func:`patiently` asks again; a store that is restarted or overloaded is back by then


class TransferError(StorageError):
    """The network broke off or the server is in trouble: not the object's fault, the same call may succeed later."""


class DamagedError(StorageError):
    """The object itself is wrong or not there: asking again will not help, another one may."""


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

    def reach(self) -> None:
        """Ask whether the store is there; raises with the remedy within half a minute when it is not."""

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


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn every ``OSError`` of the local disk into a StorageError that names the path and the remedy."""
    try:
        with full_disk_named(path):
            yield
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror or error}; check the path and its permissions") from error


def check_key(key: str) -> str:
    """``key`` itself (a prefix may end in ``/``); StorageError when it would leave the store."""
    try:
        inside(".", key.removesuffix("/"))
    except DataError:
        raise StorageError(
            f"object key {key!r:.200}: must be a relative path without '..' and '//'; correct what names it"
        ) from None
    return key


def check_roundtrip(store: ObjectStore) -> None:
    """Write, read and remove a small object; StorageError where it reads back differently."""
    key = f".check/{uuid.uuid4().hex}"
    store.put_bytes(key, b"wav")
    if store.get_bytes(key) != b"wav":
        raise StorageError(f"{store.url}: a small object reads back differently; check the server or the disk")
    store.purge(key)


def patiently(action: Callable[[], T], say: Callable[[str], None], seconds: float | None = None) -> T:
    """What ``action`` gives, which is tried again, ever less often, while the network or the server is in trouble.

    ``action`` may be done more than once; ``say`` gets a line before each wait.
    """
    end, pause = time.monotonic() + (PATIENCE_S if seconds is None else seconds), 1.0
    while True:
        try:
            return action()
        except TransferError as error:
            if time.monotonic() + pause > end:
                raise
            say(f"{error}; trying again in {pause:.0f} s")
        time.sleep(pause)
        pause = min(2 * pause, 60.0)


def verify_digest(where: str, found: str, expected: str) -> None:
    """Raise DamagedError unless two SHA-256 digests agree."""
    if expected and found != expected:
        raise DamagedError(
            f"{where}: content has SHA-256 {found[:12]}…, expected {expected[:12]}…; it is damaged, "
            "fetch it again or restore an older version"
        )
