"""Object store on S3 or anything that speaks it (boto3, path-style addresses, SigV4).

Credentials come from the standard AWS chain alone. Uploads are multipart above 64 MiB with a SHA-256 checksum per
request that the server verifies; the whole file's SHA-256 travels as object metadata and is compared on download.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
from boto3.exceptions import RetriesExceededError, S3UploadFailedError
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectTimeoutError,
    EndpointConnectionError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
)

from wav.errors import ConfigError, StorageError
from wav.io.files import atomic_file, file_digest
from wav.io.storage.base import (
    DamagedError,
    Infos,
    ObjectInfo,
    TransferError,
    check_key,
    check_roundtrip,
    disk_errors,
    verify_digest,
)

PART_BYTES = 64 << 20
MISSING = {"404", "NoSuchKey", "NotFound", "NoSuchVersion"}
TROUBLE = {"SlowDown", "RequestTimeout", "RequestLimitExceeded", "Throttling", "ThrottlingException"}
LOST_RACE = {"412", "PreconditionFailed", "409", "ConditionalRequestConflict"}
REFUSED = {"401", "403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "Forbidden", "ExpiredToken"}
CREDENTIALS_REMEDY = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or an AWS profile) for this store"


Versions = list[tuple[ObjectInfo, bool]]


class S3Store:
    """A bucket, or the part of it below ``prefix``."""

    def __init__(
        self, bucket: str, prefix: str = "", *, endpoint: str = "", region: str = "us-east-1", attempts: int = 6
    ) -> None:
        self.bucket, self.prefix, self.endpoint = bucket, prefix, endpoint
        self.url = f"s3://{bucket}/{prefix}" if prefix else f"s3://{bucket}"
        self._session, self._region = boto3.session.Session(), region
        if self._session.get_credentials() is None:
            raise StorageError(f"{self._where()}: no S3 credentials found; {CREDENTIALS_REMEDY}")
        self._client = self._connect(attempts)
        self._transfer = TransferConfig(multipart_threshold=PART_BYTES, multipart_chunksize=PART_BYTES)

    def _connect(self, attempts: int) -> Any:
        config = Config(
            region_name=self._region,
            signature_version="s3v4",
            s3={"addressing_style": "path"},
            retries={"mode": "standard", "total_max_attempts": attempts},
            response_checksum_validation="when_required",  # the whole file's own digest is compared
            connect_timeout=5,
            read_timeout=60,
        )
        try:
            return self._session.client("s3", endpoint_url=self.endpoint or None, config=config)
        except ValueError as error:
            raise ConfigError(f"WAV_S3_ENDPOINT = {self.endpoint!r}: {error}; use http://host:port") from None

    def uri(self, key: str) -> str:
        """s3:// address of ``key``."""
        return f"s3://{self.bucket}/{self._key(key)}"

    def check(self) -> None:
        """Ask for the bucket, then write, read and remove a small object."""
        with self._explained(""):
            self._connect(attempts=2).head_bucket(Bucket=self.bucket)  # a server that is down is said at once
        check_roundtrip(self)

    def ensure_bucket(self, versioned: bool = True) -> None:
        """Create the bucket where it is missing and switch versioning on; does nothing the second time."""
        with self._explained(""):
            try:
                self._client.head_bucket(Bucket=self.bucket)
            except ClientError as error:
                if _code(error) not in MISSING | {"NoSuchBucket"}:
                    raise
                self._client.create_bucket(Bucket=self.bucket)
            if versioned:
                self._client.put_bucket_versioning(Bucket=self.bucket, VersioningConfiguration={"Status": "Enabled"})

    def put_file(self, path: Path, key: str) -> ObjectInfo:
        """Upload a file in parts, each with a SHA-256 that the server compares."""
        digest = file_digest(path)
        extra = {"ChecksumAlgorithm": "SHA256", "Metadata": {"sha256": digest}}
        with disk_errors(path), self._explained(key):
            self._client.upload_file(str(path), self.bucket, self._key(key), ExtraArgs=extra, Config=self._transfer)
        info = self.head(key)
        if info is None or info.size != path.stat().st_size or info.sha256 != digest:
            raise StorageError(f"{self.uri(key)}: the uploaded object is not the file {path}; upload it again")
        return info

    def put_bytes(self, key: str, data: bytes) -> ObjectInfo:
        """Upload a small object in one request."""
        info = self._put(key, data)
        assert info is not None  # only conditional writes can lose
        return info

    def get_file(self, key: str, path: Path, sha256: str = "", version: str = "") -> ObjectInfo:
        """Download to ``path``, verified against ``sha256`` or the stored digest.

        boto3 asks again for the parts that broke off; content that differs from its digest is fetched once more, then
        refused.
        """
        info = self._head(key, version)
        if info is None:
            raise DamagedError(f"{self.uri(key)}: no such object; check the key or upload it first")
        expected, extra = sha256 or info.sha256, {"VersionId": info.version} if info.version else {}
        with disk_errors(path), atomic_file(path, durable=True) as temporary:
            for _ in range(2):
                with self._explained(key):
                    place = {"Bucket": self.bucket, "Key": self._key(key), "Filename": str(temporary)}
                    self._client.download_file(**place, ExtraArgs=extra, Config=self._transfer)
                found = file_digest(temporary)
                if not expected or found == expected:
                    break
            verify_digest(self.uri(key), found, expected)
        return info

    def get_bytes(self, key: str, version: str = "") -> bytes:
        """Content of a small object."""
        extra = {"VersionId": version} if version else {}
        with self._explained(key):
            reply = self._client.get_object(Bucket=self.bucket, Key=self._key(key), **extra)
            data: bytes = reply["Body"].read()
        verify_digest(self.uri(key), hashlib.sha256(data).hexdigest(), reply.get("Metadata", {}).get("sha256", ""))
        return data

    def head(self, key: str) -> ObjectInfo | None:
        """The newest version, or None."""
        return self._head(key, "")

    def list(self, prefix: str) -> Infos:
        """Objects whose key starts with ``prefix``."""
        found = []
        start = self._key(prefix) if prefix else self._root()
        with self._explained(prefix):
            for page in self._client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=start):
                for item in page.get("Contents", []):
                    found.append(self._listed(item))
        return found

    def put_if_absent(self, key: str, data: bytes) -> ObjectInfo | None:
        """Create ``key`` with ``If-None-Match: *``; None when it exists."""
        return self._put(key, data, IfNoneMatch="*")

    def put_if_match(self, key: str, data: bytes, etag: str) -> ObjectInfo | None:
        """Replace ``key`` with ``If-Match``; None when another writer was first."""
        return self._put(key, data, IfMatch=etag)

    def delete(self, key: str) -> None:
        """Hide the object behind a delete marker (remove it where the bucket keeps no versions)."""
        with self._explained(key):
            self._client.delete_object(Bucket=self.bucket, Key=self._key(key))

    def versions(self, key: str) -> Infos:
        """Versions of ``key``, newest first; delete markers are not versions."""
        return [info for info, marker in self._all_versions(key) if not marker]

    def purge(self, key: str) -> None:
        """Delete every version and every delete marker of ``key``."""
        for info, _ in self._all_versions(key):
            with self._explained(key):
                self._client.delete_object(Bucket=self.bucket, Key=self._key(key), VersionId=info.version)
        if self.head(key) is not None:
            self.delete(key)

    def abort_uploads(self, prefix: str, before: float) -> int:
        """Abort multipart uploads that a killed writer left; the server frees their parts."""
        count = 0
        start = self._key(prefix) if prefix else self._root()
        with self._explained(prefix):
            for page in self._client.get_paginator("list_multipart_uploads").paginate(Bucket=self.bucket, Prefix=start):
                for item in page.get("Uploads", []):
                    if item["Initiated"].timestamp() < before:
                        name = {"Bucket": self.bucket, "Key": item["Key"], "UploadId": item["UploadId"]}
                        self._client.abort_multipart_upload(**name)
                        count += 1
        return count

    def _all_versions(self, key: str) -> Versions:
        full, found = self._key(key), []
        with self._explained(key):
            pages = self._client.get_paginator("list_object_versions").paginate(Bucket=self.bucket, Prefix=full)
            for page in pages:
                for kind, marker in (("Versions", False), ("DeleteMarkers", True)):
                    found += [(self._listed(item), marker) for item in page.get(kind, []) if item["Key"] == full]
        return sorted(found, key=lambda pair: pair[0].modified, reverse=True)

    def _put(self, key: str, data: bytes, **condition: str) -> ObjectInfo | None:
        digest = hashlib.sha256(data).hexdigest()
        with self._explained(key):
            try:
                reply = self._client.put_object(
                    Bucket=self.bucket,
                    Key=self._key(key),
                    Body=data,
                    Metadata={"sha256": digest},
                    ChecksumAlgorithm="SHA256",
                    **condition,
                )
            except ClientError as error:
                if condition and _code(error) in LOST_RACE | MISSING:
                    return None
                raise
        return ObjectInfo(key, len(data), reply.get("VersionId", ""), reply.get("ETag", ""), digest, 0.0)

    def _head(self, key: str, version: str) -> ObjectInfo | None:
        extra = {"VersionId": version} if version else {}
        with self._explained(key):
            try:
                reply = self._client.head_object(Bucket=self.bucket, Key=self._key(key), **extra)
            except ClientError as error:
                if _code(error) in MISSING:
                    return None
                raise
        return ObjectInfo(
            key,
            reply["ContentLength"],
            _version(reply),
            reply.get("ETag", ""),
            reply.get("Metadata", {}).get("sha256", ""),
            reply["LastModified"].timestamp(),
        )

    def _listed(self, item: dict[str, Any]) -> ObjectInfo:
        key = item["Key"][len(self._root()) :]
        modified = item["LastModified"].timestamp()
        return ObjectInfo(key, item.get("Size", 0), _version(item), item.get("ETag", ""), "", modified)

    def _root(self) -> str:
        return f"{self.prefix}/" if self.prefix else ""

    def _key(self, key: str) -> str:
        return self._root() + check_key(key)

    def _where(self) -> str:
        return f"{self.url} at {self.endpoint or 'AWS'}"

    @contextmanager
    def _explained(self, key: str) -> Iterator[None]:
        """Turn boto3's failures into a StorageError with the place, the cause and the remedy."""
        where = f"{self.uri(key)} at {self.endpoint or 'AWS'}" if key else self._where()
        try:
            yield
        except (EndpointConnectionError, ConnectTimeoutError):
            raise TransferError(
                f"{where}: no S3 server answers; start the local services with `make up` or set WAV_S3_ENDPOINT"
            ) from None
        except (NoCredentialsError, PartialCredentialsError):
            raise StorageError(f"{where}: S3 credentials are missing or incomplete; {CREDENTIALS_REMEDY}") from None
        except ClientError as error:
            raise _kind(error, bool(key))(f"{where}: {_cause(error, bool(key))}") from error
        except (HTTPClientError, IncompleteReadError, RetriesExceededError) as error:
            text = " ".join(str(error).split())
            raise TransferError(f"{where}: {text}; check the network and try again") from error
        except S3UploadFailedError as error:
            cause = error.__context__
            kind = _kind(cause, True) if isinstance(cause, ClientError) else TransferError
            text = _cause(cause, True) if isinstance(cause, ClientError) else f"upload failed ({error}); try again"
            raise kind(f"{where}: {text}") from error
        except BotoCoreError as error:
            raise StorageError(f"{where}: {' '.join(str(error).split())}; check the network and try again") from error


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _kind(error: ClientError, object_named: bool) -> type[StorageError]:
    """Whether a refused request may succeed later, or its object is not there, or neither."""
    status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") or 0)
    if status >= 500 or status == 429 or _code(error) in TROUBLE:
        return TransferError
    return DamagedError if object_named and _code(error) in MISSING else StorageError


def _version(reply: dict[str, Any]) -> str:
    """Version id; a bucket without versioning reports none or ``null``."""
    version = str(reply.get("VersionId") or "")
    return "" if version == "null" else version


def _cause(error: ClientError, object_named: bool) -> str:
    """Cause and remedy of a refused request."""
    code = _code(error)
    message = " ".join(str(error.response.get("Error", {}).get("Message", "")).split())
    if code == "NoSuchBucket" or (code in MISSING and not object_named):
        return "the bucket does not exist; create it (`make up` does for the local server) or correct WAV_STORE"
    if code in MISSING:
        return "no such object; check the key or upload it first"
    if code in REFUSED:
        return f"the server refused the credentials ({code}); {CREDENTIALS_REMEDY}"
    if code == "RequestTimeTooSkewed":
        return "this machine's clock differs too much from the server's; set the clock (NTP)"
    return f"the server answered {code} {message}".rstrip() + "; try again, then look at the server's log"
