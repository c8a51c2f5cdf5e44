"""A small S3 server in memory, as complete or as incomplete as compatible servers are. Standard library only.

``without`` names what it lacks: ``checksums`` (501 to a request that asks for one), ``conditions`` (If-Match and
If-None-Match are ignored), ``versions`` (no write gets one, no ListObjectVersions); ``region``: the only one it takes
signatures for.
"""

from __future__ import annotations

import base64
import hashlib
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

DATE = "Thu, 01 Jan 2026 00:00:00 GMT"


class FakeS3:
    """``with FakeS3() as server``: ``server.endpoint``; ``server.objects`` holds key -> (bytes, metadata)."""

    def __init__(self, *without: str, region: str = "") -> None:
        self.objects: dict[str, tuple[bytes, dict[str, str]]] = {}
        self.without, self.region, self.lock = without, region, threading.Lock()
        server = self

        class Handler(_Handler):
            owner = server

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> FakeS3:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: FakeS3

    def log_message(self, *_: object) -> None:
        """Silence."""

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = urlsplit(self.path)
        bucket, _, name = unquote(parts.path).lstrip("/").partition("/")
        with self.owner.lock:
            self._route(name, parse_qs(parts.query, keep_blank_values=True), body, bucket)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _handle  # noqa: N815

    def _route(self, name: str, query: dict[str, list[str]], body: bytes, bucket: str) -> None:
        lacks, region = self.owner.without, self.owner.region
        if region and f"/{region}/s3/" not in (self.headers.get("Authorization") or ""):
            return self._error(400, "AuthorizationHeaderMalformed", f"the region is wrong; expecting '{region}'")
        if "checksums" in lacks and self.headers.get("x-amz-sdk-checksum-algorithm"):
            return self._error(501, "NotImplemented", "x-amz-sdk-checksum-algorithm is not implemented")
        if self.command == "GET" and "versions" in query:
            if "versions" in lacks:
                return self._error(501, "NotImplemented", "ListObjectVersions is not implemented")
            return self._listing("ListVersionsResult", "Version", query)
        if not name:
            return self._listing("ListBucketResult", "Contents", query) if self.command == "GET" else self._answer(200)
        if self.command == "PUT":
            return self._put(name, body, lacks)
        if self.command == "DELETE":
            self.owner.objects.pop(name, None)
            return self._answer(204)
        return self._get(name)

    def _put(self, name: str, body: bytes, lacks: tuple[str, ...]) -> None:
        if "aws-chunked" in (self.headers.get("Content-Encoding") or ""):
            body = dechunked(body)
        wanted = self.headers.get("x-amz-checksum-sha256")
        if wanted and wanted != base64.b64encode(hashlib.sha256(body).digest()).decode():
            return self._error(400, "BadDigest", "the SHA-256 you specified did not match")
        known, expected = self.owner.objects.get(name), self.headers.get("If-Match", "")
        if "conditions" not in lacks:
            stale = expected and (known is None or etag(known[0]) != expected)
            if stale or (self.headers.get("If-None-Match") == "*" and known):
                return self._error(412, "PreconditionFailed", "a condition does not hold")
        kept = {k.lower(): v for k, v in self.headers.items() if k.lower().startswith("x-amz-meta-")}
        self.owner.objects[name] = (body, kept)
        version = {} if "versions" in lacks else {"x-amz-version-id": "1"}
        return self._answer(200, b"", {"ETag": etag(body), **version})

    def _get(self, name: str) -> None:
        if name not in self.owner.objects:
            return self._error(404, "NoSuchKey", "no such key")
        data, kept = self.owner.objects[name]
        head = {"ETag": etag(data), "Last-Modified": DATE, **kept}
        span = self.headers.get("Range", "").removeprefix("bytes=")
        if span:
            first, _, last = span.partition("-")
            end = min(int(last or len(data) - 1), len(data) - 1)
            head["Content-Range"] = f"bytes {first}-{end}/{len(data)}"
            return self._answer(206, data[int(first) : end + 1], head)
        return self._answer(200, data, head)

    def _listing(self, root: str, kind: str, query: dict[str, list[str]]) -> None:
        prefix = query.get("prefix", [""])[0]
        rows = "".join(
            f"<{kind}><Key>{name}</Key><VersionId>null</VersionId><IsLatest>true</IsLatest><ETag>{etag(data)}</ETag>"
            f"<LastModified>2026-01-01T00:00:00.000Z</LastModified><Size>{len(data)}</Size></{kind}>"
            for name, (data, _) in sorted(self.owner.objects.items())
            if name.startswith(prefix)
        )
        self._answer(200, f"<{root}><Name>b</Name><IsTruncated>false</IsTruncated>{rows}</{root}>".encode())

    def _error(self, status: int, code: str, message: str) -> None:
        self._answer(status, f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode())

    def _answer(self, status: int, body: bytes = b"", headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def etag(data: bytes) -> str:
    """An entity tag in its quotes."""
    return f'"{hashlib.md5(data, usedforsecurity=False).hexdigest()}"'


def dechunked(body: bytes) -> bytes:
    """Content of an aws-chunked body."""
    found = b""
    while body:
        size, _, body = body.partition(b"\r\n")
        length = int(size.split(b";")[0], 16)
        if not length:
            break
        found, body = found + body[:length], body[length + 2 :]
    return found
