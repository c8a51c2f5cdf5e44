"""An HTTP proxy that stands before the real S3 server and breaks requests on purpose.

Requests are forwarded unchanged (signatures cover the Host header, which stays the proxy's), except those that an
armed :class:`Fault` picks. Standard library only.
"""

from __future__ import annotations

import contextlib
import http.client
import re
import socket
import struct
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

KINDS = ("reset", "reset_after", "truncate", "corrupt", "corrupt_upload", "close", "silence", "trickle", "garbage")
KINDS += ("empty", "html", "doubled", "no_etag", "wrong_etag", "no_date", "no_metadata", "redirect", "long_header")
#: What a server answers: status, S3 error code, message.
ANSWERS = {
    "error500": (500, "InternalError", "We encountered an internal error. Please try again."),
    "slow_down": (503, "SlowDown", "Please reduce your request rate."),
    "disk_full": (500, "InternalError", "no space left on device"),
    "clock_skew": (
        403,
        "RequestTimeTooSkewed",
        "The request's time differs too much from the server's",
    ),
    "no_bucket": (404, "NoSuchBucket", "The specified bucket does not exist"),
    "bad_key": (403, "InvalidAccessKeyId", "The access key ID you provided does not exist in our records."),
    "unavailable": (503, "ServiceUnavailable", "Please try again."),
    "bad_gateway": (502, "", "<html>Bad Gateway</html>"),
    "gateway_timeout": (504, "", "<html>Gateway Time-out</html>"),
    "too_many": (429, "TooManyRequests", "Too many requests"),
    "too_many_html": (429, "", "<html>slow down</html>"),
    "denied": (403, "AccessDenied", "Access Denied."),
    "unauthorized": (401, "Unauthorized", "Who are you?"),
    "quota": (403, "QuotaExceeded", "The quota of this bucket is used up"),
    "glacier": (403, "InvalidObjectState", "The operation is not valid for the object's storage class"),
    "expired": (400, "ExpiredToken", "The provided token has expired."),
    "invalid_token": (400, "InvalidToken", "The provided token is malformed."),
    "request_expired": (403, "RequestExpired", "Request has expired"),
    "kms": (400, "KMS.DisabledException", "The key is disabled"),
    "conflict": (409, "OperationAborted", "A conflicting operation is in progress"),
    "precondition": (412, "PreconditionFailed", "A condition does not hold"),
    "not_implemented": (501, "NotImplemented", "Not implemented"),
    "not_allowed": (405, "MethodNotAllowed", "The method is not allowed"),
    "other_region": (400, "AuthorizationHeaderMalformed", "the region 'us-east-1' is wrong; expecting 'garage'"),
    "moved": (301, "PermanentRedirect", "The bucket must be addressed by another endpoint"),
    "no_key": (404, "NoSuchKey", "The specified key does not exist"),
    "too_large": (413, "EntityTooLarge", "The upload is too large"),
    "bad_digest": (400, "BadDigest", "The digest did not match"),
    "teapot": (418, "", "short and stout"),
}
SILENCE_S = 3.0


@dataclass
class Fault:
    """Break the next ``times`` requests (-1: all) of a method (regular expression) whose path matches ``path``.

    ``after``: so many of them are let through before.
    """

    kind: str
    method: str = "GET|PUT|POST|HEAD|DELETE"
    path: str = ""
    times: int = 1
    after: int = 0
    hits: int = field(default=0, init=False)

    def takes(self, method: str, path: str) -> bool:
        """Whether this request is one to break; counts it."""
        if self.hits == self.times or not re.fullmatch(self.method, method) or not re.search(self.path, path):
            return False
        if self.after:
            self.after -= 1
            return False
        self.hits += 1
        return True


class FaultProxy:
    """``with FaultProxy(endpoint) as proxy``: ``proxy.endpoint`` is the address to use, ``arm`` adds a fault."""

    def __init__(self, target: str) -> None:
        self.target = urlsplit(target)
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str, str]] = []
        self._lock = threading.Lock()
        proxy = self

        class Handler(_Handler):
            owner = proxy

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> FaultProxy:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def arm(self, kind: str, **where: Any) -> Fault:
        """Break requests from now on."""
        assert kind in KINDS or kind in ANSWERS, kind
        fault = Fault(kind, **where)
        self.faults.append(fault)
        return fault

    def clear(self) -> None:
        """Let everything through again."""
        self.faults = []

    def choose(self, method: str, path: str, span: str) -> str:
        """Kind of fault for a request, or nothing; the request is remembered."""
        with self._lock:
            self.requests.append((method, path, span))
            return next((fault.kind for fault in self.faults if fault.takes(method, path)), "")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: FaultProxy

    def log_message(self, *_: object) -> None:
        """Silence."""

    def _handle(self) -> None:
        fault = self.owner.choose(self.command, self.path, self.headers.get("Range", ""))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if fault in ("reset", "close"):
            self._reset(hard=fault == "reset")
        elif fault in ("silence", "trickle", "garbage", "long_header"):
            self._no_http(fault)
        elif fault in ("empty", "html", "redirect"):
            self._other(fault)
        elif fault in ANSWERS:
            self._answer(*ANSWERS[fault])
        else:
            self._forward(flipped(body) if fault == "corrupt_upload" else body, fault)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _handle  # noqa: N815

    def _forward(self, body: bytes, fault: str) -> None:
        connection = http.client.HTTPConnection(self.owner.target.hostname, self.owner.target.port, timeout=30)
        with contextlib.closing(connection):
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in ("expect", "connection"):
                    connection.putheader(name, value)
            connection.endheaders(body)
            reply = connection.getresponse()
            data = reply.read()
            if fault == "reset_after":
                return self._reset()
            self.send_response_only(reply.status, reply.reason)
            for name, value in reply.getheaders():
                if name.lower() not in ("transfer-encoding", "connection", "content-length") and not lost(fault, name):
                    self.send_header(name, '"0"' if fault == "wrong_etag" and name.lower() == "etag" else value)
            data = 2 * data if fault == "doubled" else data
            length = reply.getheader("Content-Length", "0") if self.command == "HEAD" else str(len(data))
            self.send_header("Content-Length", length)
            self.end_headers()
            if fault == "truncate":
                self.wfile.write(data[: len(data) // 2])
                self.wfile.flush()
                return self._reset(hard=False)
            self.wfile.write(flipped(data) if fault == "corrupt" else data)
        return None

    def _no_http(self, fault: str) -> None:
        """Bytes that never become an answer."""
        self.close_connection = True
        with contextlib.suppress(OSError):
            if fault == "garbage":
                self.wfile.write(b"\x16\x03\x01\x00SSH-2.0-OpenSSH_9.6\r\n\r\n")
            elif fault == "long_header":
                self.wfile.write(b"HTTP/1.1 200 OK\r\nX: " + b"x" * 200_000 + b"\r\n\r\n")
            for byte in b"HTTP/1.1 200 OK\r\n" if fault == "trickle" else b"":
                self.wfile.write(bytes([byte]))
                time.sleep(SILENCE_S / 20)
            if fault == "silence":
                time.sleep(SILENCE_S)

    def _other(self, fault: str) -> None:
        """What a web server that is no S3 server answers."""
        data = b"<html><body>It works!</body></html>" if fault == "html" else b""
        self.send_response(307 if fault == "redirect" else 200)
        if fault == "redirect":
            self.send_header("Location", f"{self.owner.endpoint}{self.path}")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _answer(self, status: int, code: str, message: str) -> None:
        text = f"<?xml version='1.0' encoding='UTF-8'?><Error><Code>{code}</Code><Message>{message}</Message></Error>"
        text = text if code else message
        data = b"" if self.command == "HEAD" else text.encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _reset(self, hard: bool = True) -> None:
        """Close at once: with a TCP reset, or as a server that dies in the middle of a body."""
        if hard:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR) if not hard else self.connection.close()


def lost(fault: str, name: str) -> bool:
    """Whether a fault takes this header away."""
    gone = {"no_etag": "etag", "no_date": "last-modified", "no_metadata": "x-amz-meta-"}.get(fault)
    return gone is not None and name.lower().startswith(gone)


def flipped(data: bytes) -> bytes:
    """The bytes with one bit of the middle one turned."""
    if not data:
        return data
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
