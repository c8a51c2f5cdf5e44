"""Object stores: checkpoints and metrics on S3 (any endpoint) or in a folder, committed manifest last.

``open_store("s3://bucket/prefix", endpoint)`` or ``open_store("file:///folder")`` gives an :class:`ObjectStore`;
:mod:`wav.io.storage.commit` writes sets of files so that a reader sees all of them or none.
"""

from __future__ import annotations

from pathlib import Path
from urllib.parse import SplitResult, unquote, urlsplit

from wav.errors import ConfigError
from wav.io.storage.base import ObjectInfo, ObjectStore

__all__ = ["ObjectInfo", "ObjectStore", "open_store"]


def open_store(url: str, endpoint: str = "", region: str = "us-east-1") -> ObjectStore:
    """The store at ``url``: ``s3://bucket[/prefix]``, at ``endpoint`` (empty: AWS), or ``file:///folder``.

    Raises:
        ConfigError: the url is of no known kind, or an address holds credentials.
        StorageError: credentials are missing (S3 only; the server itself is first asked by ``check``).
    """
    parts = _split("WAV_STORE", url)
    for name, value in (("WAV_STORE", parts), ("WAV_S3_ENDPOINT", _split("WAV_S3_ENDPOINT", endpoint))):
        if "@" in value.netloc:  # not repeated in the message: it would land in a log
            raise ConfigError(f"{name}: holds credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY instead")
    if parts.scheme == "file" and not parts.netloc and parts.path.startswith("/"):
        from wav.io.storage.file import FileStore

        return FileStore(Path(unquote(parts.path)))
    if parts.scheme == "s3" and parts.netloc:
        from wav.io.storage.s3 import S3Store

        return S3Store(parts.netloc, parts.path.strip("/"), endpoint=endpoint, region=region)
    raise ConfigError(f"WAV_STORE = {url!r}: must be s3://bucket[/prefix] or file:///absolute/folder")


def _split(name: str, url: str) -> SplitResult:
    """The parts of an address; raises ConfigError where it is none."""
    try:
        return urlsplit(url)
    except ValueError as error:
        raise ConfigError(f"{name}: is no address ({error}); write http://host:port or s3://bucket") from error
