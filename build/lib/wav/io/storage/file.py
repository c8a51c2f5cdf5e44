"""Object store in a folder (``file:///folder``): no versions, conditional writes under a lock file."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from wav.io.files import atomic_file, file_digest
from wav.io.storage.base import DamagedError, Infos, ObjectInfo, check_key, check_roundtrip, disk_errors, verify_digest


class FileStore:
    """Objects are files below ``root``; every write is a rename of a flushed temporary sibling."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.url = root.as_uri()

    def uri(self, key: str) -> str:
        """file:// address of ``key``."""
        return self._path(key).as_uri()

    def reach(self) -> None:
        """A folder is there, or is made by the first write."""

    def check(self) -> None:
        """Write, read and remove a small object."""
        check_roundtrip(self)

    def put_file(self, path: Path, key: str) -> ObjectInfo:
        """Copy a file into the store and compare the copy's digest with the original's."""
        target = self._path(key)
        digest = file_digest(path)
        with disk_errors(target), atomic_file(target, durable=True) as temporary:
            shutil.copyfile(path, temporary)
            verify_digest(self.uri(key), file_digest(temporary), digest)
        return self._info(key, target, digest)

    def put_bytes(self, key: str, data: bytes) -> ObjectInfo:
        """Write a small object."""
        target = self._path(key)
        with disk_errors(target), atomic_file(target, durable=True) as temporary:
            temporary.write_bytes(data)
        return self._info(key, target)

    def get_file(self, key: str, path: Path, sha256: str = "", version: str = "") -> ObjectInfo:
        """Copy an object to ``path``, verified when ``sha256`` is given."""
        source = self._existing(key)
        with disk_errors(path), atomic_file(path, durable=True) as temporary:
            shutil.copyfile(source, temporary)
            digest = file_digest(temporary)
            verify_digest(self.uri(key), digest, sha256)
        return self._info(key, source, digest)

    def get_bytes(self, key: str, version: str = "") -> bytes:
        """Content of a small object."""
        source = self._existing(key)
        with disk_errors(source):
            return source.read_bytes()

    def head(self, key: str) -> ObjectInfo | None:
        """The object, or None."""
        path = self._path(key)
        return self._info(key, path) if path.is_file() else None

    def list(self, prefix: str) -> Infos:
        """Objects whose key starts with ``prefix``; temporary files and locks are not objects."""
        base = self._path(prefix).parent if prefix else self.root
        if not base.is_dir():
            return []
        found = []
        for path in sorted(base.rglob("*")):
            key = path.relative_to(self.root).as_posix()
            hidden = path.name == ".lock" or (path.name.startswith(".") and path.name.endswith(".part"))
            if path.is_file() and not hidden and key.startswith(prefix):
                found.append(self._info(key, path))
        return found

    def put_if_absent(self, key: str, data: bytes) -> ObjectInfo | None:
        """Create ``key`` under the store's lock; None when it exists."""
        with self._locked():
            return None if self._path(key).exists() else self.put_bytes(key, data)

    def put_if_match(self, key: str, data: bytes, etag: str) -> ObjectInfo | None:
        """Replace ``key`` under the store's lock if its etag is still ``etag``."""
        with self._locked():
            current = self.head(key)
            return self.put_bytes(key, data) if current is not None and current.etag == etag else None

    def delete(self, key: str) -> None:
        """Remove the object and the folders it leaves empty."""
        path = self._path(key)
        with disk_errors(path):
            path.unlink(missing_ok=True)
            parent = path.parent
            while parent != self.root and parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()
                parent = parent.parent

    def versions(self, key: str) -> Infos:
        """The one version there is."""
        info = self.head(key)
        return [info] if info else []

    def purge(self, key: str) -> None:
        """The same as :meth:`delete`."""
        self.delete(key)

    def abort_uploads(self, prefix: str, before: float) -> int:
        """Remove temporary files that a killed writer left."""
        base = self._path(prefix) if prefix else self.root
        found = [path for path in base.rglob(".*.part") if path.is_file() and path.stat().st_mtime < before]
        with disk_errors(base):
            for path in found:
                path.unlink(missing_ok=True)
        return len(found)

    def _path(self, key: str) -> Path:
        return self.root / check_key(key)

    def _existing(self, key: str) -> Path:
        path = self._path(key)
        if not path.is_file():
            raise DamagedError(f"{path.as_uri()}: no such object; check the key or upload it first")
        return path

    def _info(self, key: str, path: Path, sha256: str = "") -> ObjectInfo:
        stat = path.stat()
        etag = f"{stat.st_ino:x}-{stat.st_mtime_ns:x}-{stat.st_size:x}"
        return ObjectInfo(key, stat.st_size, "", etag, sha256, stat.st_mtime)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with disk_errors(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            lock = (self.root / ".lock").open("w")
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
