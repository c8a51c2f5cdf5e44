"""Object store on S3 or anything that speaks it (boto3, path-style addresses, SigV4).

Credentials come from the standard AWS chain alone. Uploads are multipart above 64 MiB with a SHA-256 checksum per
request that the server verifies; the whole file's SHA-256 travels as object metadata and is compared on download.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

import boto3
from boto3.exceptions import S3UploadFailedError
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError, IncompleteReadError

from wav.errors import ConfigError, StorageError, WavError, cut
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
from wav.io.storage.s3_errors import (
    CREDENTIALS_REMEDY,
    LOST_RACE,
    MISSING,
    NOT_THERE,
    REFUSED,
    code,
    explained,
    no_checksums,
    not_s3,
    retry_429,
    told_whole,
)
from wav.probes import within

_LOG = logging.getLogger(__name__)
PART_BYTES = 64 << 20
#: what a server may be silent for when it is asked whether it is there, and the whole of that question
REACH_READ_S, REACH_S = 8, 25.0
READ_S, BACKOFF_429_S = 60, 0.25


Versions = list[tuple[ObjectInfo, bool]]
Result = TypeVar("Result")


class S3Store:
    """A bucket, or the part of it below ``prefix``."""

    def __init__(
        self, bucket: str, prefix: str = "", *, endpoint: str = "", region: str = "", attempts: int = 6
    ) -> None:
        self.bucket, self.prefix, self.endpoint = bucket, prefix, endpoint
        self.url = f"s3://{bucket}/{prefix}" if prefix else f"s3://{bucket}"
        self._attempts, self._checksums = attempts, True  # until a server shows that it knows none
        self._conditions: bool | None = None  # not asked yet
        self._versioned = False  # whether the last object that conditions() wrote got a version
        self._transfer = TransferConfig(multipart_threshold=PART_BYTES, multipart_chunksize=PART_BYTES)
        with self._explained(""):
            try:
                self._session = boto3.session.Session()
                self._region = region or self._session.region_name or "us-east-1"
                found = self._session.get_credentials()
                self._client = self._connect(attempts)
            except (BotoCoreError, WavError):
                raise
            except (OSError, ValueError, LookupError, TypeError) as error:  # of the AWS_* variables and files
                raise ConfigError(f"{self._where()}: {cut(error)}; correct the AWS_* variables and files") from None
        if found is None:
            raise StorageError(f"{self._where()}: no S3 credentials found; {CREDENTIALS_REMEDY}, or run make up")

    def _connect(self, attempts: int, read_s: int = 0) -> Any:
        config = Config(
            region_name=self._region,
            signature_version="s3v4",
            s3={"addressing_style": "path"},
            retries={"mode": "standard", "total_max_attempts": attempts},
            request_checksum_calculation="when_supported" if self._checksums else "when_required",
            response_checksum_validation="when_required",  # the whole file's own digest is compared
            connect_timeout=5,
            read_timeout=read_s or READ_S,
        )
        try:
            client = self._session.client("s3", endpoint_url=self.endpoint or None, config=config)
        except ValueError as error:
            name = f"WAV_S3_ENDPOINT = {self.endpoint!r}" if self.endpoint else f"{self.url} at AWS"
            raise ConfigError(f"{name}: {cut(error)}; use http://host:port") from None
        client.meta.events.register("needs-retry.s3", retry_429(attempts, BACKOFF_429_S))
        for operation in ("GetObject", "HeadObject"):
            client.meta.events.register(f"after-call.s3.{operation}", told_whole)
        return client

    def uri(self, key: str) -> str:
        """s3:// address of ``key``."""
        return f"s3://{self.bucket}/{self._key(key)}"

    def reach(self) -> None:
        """Ask for the bucket: a server that is down, silent or no S3 server is said within half a minute."""
        impatient = self._connect(attempts=2, read_s=REACH_READ_S)

        def ask() -> None:
            try:
                impatient.head_bucket(Bucket=self.bucket)
            except ClientError as error:
                if code(error) in REFUSED:  # these keys may not list; what they may do is seen when it is done
                    return
                if code(error) not in MISSING:
                    impatient.list_objects_v2(Bucket=self.bucket, MaxKeys=1)  # HEAD has no body that tells why
                raise

        with self._explained(""):
            within(REACH_S, ask, self._where())

    def check(self) -> None:
        """Ask for the bucket, then write, read and remove a small object; learns what the server does not know."""
        self.reach()
        impatient = copy.copy(self)
        impatient._client = self._connect(attempts=3, read_s=REACH_READ_S)

        def learn() -> None:
            check_roundtrip(impatient)
            self._conditions = impatient.conditions()

        with self._explained(""):
            within(2 * REACH_S, learn, self._where())
        if not impatient._checksums:
            self._checksums = False
            self._client = self._connect(self._attempts)
        if not impatient._versioned:
            _LOG.warning(
                "%s: the bucket keeps no versions, so no champion can be rolled back; where the server can, switch "
                "them on: aws s3api put-bucket-versioning --bucket %s --versioning-configuration Status=Enabled",
                self.url,
                self.bucket,
            )
        if not self._conditions:
            _LOG.warning("%s: the server ignores conditions on writes: no champion can be promoted there", self.url)

    def conditions(self) -> bool:
        """Whether conditional writes are kept, tried on an object of our own: some servers ignore the condition."""
        key = f".check/{uuid.uuid4().hex}"
        self._versioned = bool(self.put_bytes(key, b"1").version)
        try:
            return self._put(key, b"2", IfNoneMatch="*") is None and self._put(key, b"2", IfMatch=f'"{key}"') is None
        except TransferError:
            raise
        except StorageError:
            return False
        finally:
            self.purge(key)

    def ensure_bucket(self, versioned: bool = True) -> None:
        """Create the bucket where it is missing and switch versioning on; does nothing the second time."""
        with self._explained(""):
            try:
                self._client.head_bucket(Bucket=self.bucket)
            except ClientError as error:
                if code(error) not in MISSING | {"NoSuchBucket"}:
                    raise
                self._client.create_bucket(Bucket=self.bucket)
            if versioned:
                self._client.put_bucket_versioning(Bucket=self.bucket, VersioningConfiguration={"Status": "Enabled"})

    def put_file(self, path: Path, key: str) -> ObjectInfo:
        """Upload a file in parts, each with a SHA-256 that the server compares.

        Raises:
            StorageError: the store refused it, or has another object than the file. TransferError: try again.
        """
        digest, place = file_digest(path), (str(path), self.bucket, self._key(key))

        def upload(checksums: dict[str, str]) -> None:
            extra = {"Metadata": {"sha256": digest}, **checksums}
            self._client.upload_file(*place, ExtraArgs=extra, Config=self._transfer)

        with disk_errors(path), self._explained(key):
            self._checksummed(upload)
        info = self.head(key)
        if info is None or info.size != path.stat().st_size or info.sha256 != digest:
            raise StorageError(f"{self.uri(key)}: the uploaded object is not the file {path}; upload it again")
        if not self._checksums:
            self._read_back(key, digest)
        return info

    def _checksummed(self, write: Callable[[dict[str, str]], Result]) -> Result:
        """A write whose bytes the server compares with a SHA-256, where it knows how to."""
        if self._checksums:
            try:
                return write({"ChecksumAlgorithm": "SHA256"})
            except (ClientError, S3UploadFailedError) as error:
                refused = error if isinstance(error, ClientError) else error.__context__
                if not isinstance(refused, ClientError) or not no_checksums(refused):
                    raise
                _LOG.warning("%s: the server knows no request checksums; every upload is read back", self._where())
                self._checksums = False
                self._client = self._connect(self._attempts)
        return write({})

    def _read_back(self, key: str, digest: str) -> None:
        """Compare what the server holds with what was sent."""
        with self._explained(key):
            body = self._client.get_object(Bucket=self.bucket, Key=self._key(key))["Body"]
            found = hashlib.sha256()
            for chunk in body.iter_chunks(1 << 20):
                found.update(chunk)
        verify_digest(self.uri(key), found.hexdigest(), digest)

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
        """Content of a small object, asked for again where it broke off or arrived damaged."""
        extra = {"VersionId": version} if version else {}
        for last in (False, False, True):
            with self._explained(key):
                reply = self._client.get_object(Bucket=self.bucket, Key=self._key(key), **extra)
                try:
                    data: bytes = reply["Body"].read()
                except (HTTPClientError, IncompleteReadError):
                    if last:
                        raise
                    continue
            found, expected = hashlib.sha256(data).hexdigest(), reply.get("Metadata", {}).get("sha256", "")
            if last or not expected or found == expected:
                break
        verify_digest(self.uri(key), found, expected)
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
                self._check_listing(page)
                found += [self._listed(item) for item in page.get("Contents", [])]
        return found

    def put_if_absent(self, key: str, data: bytes) -> ObjectInfo | None:
        """Create ``key`` with ``If-None-Match: *``; None when it exists."""
        return self._put_if(key, data, IfNoneMatch="*")

    def put_if_match(self, key: str, data: bytes, etag: str) -> ObjectInfo | None:
        """Replace ``key`` with ``If-Match``; None when another writer was first."""
        return self._put_if(key, data, IfMatch=etag)

    def _put_if(self, key: str, data: bytes, **condition: str) -> ObjectInfo | None:
        if self._conditions is None:
            self._conditions = self.conditions()
        if not self._conditions:
            raise StorageError(
                f"{self._where()}: the server ignores conditions on writes (If-None-Match), so that two writers could "
                "both win; promote to another store (WAV_STORE), such as AWS, MinIO, Ceph or SeaweedFS"
            )
        return self._put(key, data, **condition)

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
            if info.version:
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
            try:
                for page in pages:
                    self._check_listing(page)
                    for kind, marker in (("Versions", False), ("DeleteMarkers", True)):
                        found += [(self._listed(item), marker) for item in page.get(kind, []) if item["Key"] == full]
            except ClientError as error:
                if code(error) not in NOT_THERE:
                    raise
                info = self.head(key)  # a server that keeps no versions: the one there is
                return [(info, False)] if info else []
        return sorted(found, key=lambda pair: pair[0].modified, reverse=True)

    def _put(self, key: str, data: bytes, **condition: str) -> ObjectInfo | None:
        digest = hashlib.sha256(data).hexdigest()
        place = {"Bucket": self.bucket, "Key": self._key(key), "Body": data, "Metadata": {"sha256": digest}}
        with self._explained(key):
            try:
                reply = self._checksummed(lambda extra: self._client.put_object(**place, **extra, **condition))
            except ClientError as error:
                if condition and code(error) in LOST_RACE | MISSING:
                    retried = error.response.get("ResponseMetadata", {}).get("RetryAttempts")
                    now = self._head(key, "") if retried else None  # the answer to our own first try may have been lost
                    return now if now is not None and now.sha256 == digest else None
                raise
        if not reply.get("ETag"):  # a page or nothing, with status 200: nobody has stored anything
            raise not_s3(self._where(), "an upload without ETag")
        if not self._checksums and not condition:
            self._read_back(key, digest)
        return ObjectInfo(key, len(data), _version(reply), reply["ETag"], digest, 0.0)

    def _head(self, key: str, version: str) -> ObjectInfo | None:
        extra = {"VersionId": version} if version else {}
        with self._explained(key):
            try:
                reply = self._client.head_object(Bucket=self.bucket, Key=self._key(key), **extra)
            except ClientError as error:
                if code(error) in MISSING:
                    return None
                raise
            modified = reply["LastModified"].timestamp() if "LastModified" in reply else 0.0
            size, digest = reply["ContentLength"], reply.get("Metadata", {}).get("sha256", "")
        return ObjectInfo(key, size, _version(reply), reply.get("ETag", ""), digest, modified)

    def _check_listing(self, page: dict[str, Any]) -> None:
        """A page of something else with status 200 is no empty listing."""
        if "IsTruncated" not in page:
            raise not_s3(self._where(), "no listing")

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

    def _explained(self, key: str) -> AbstractContextManager[None]:
        return explained(f"{self.uri(key)} at {self.endpoint or 'AWS'}" if key else self._where(), bool(key))


def _version(reply: dict[str, Any]) -> str:
    """Version id; a bucket without versioning reports none or ``null``."""
    version = str(reply.get("VersionId") or "")
    return "" if version == "null" else version
