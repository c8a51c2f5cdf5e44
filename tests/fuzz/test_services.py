"""Other services on the port: each is told apart from Prefect and from S3, in one sentence and within its time."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from tests.fuzz.tally import Tally, WrongError, blocks
from wav.errors import ServiceError, WavError
from wav.io.storage import s3
from wav.prefect_api import server_version
from wav.probes import answers

STATUSES = (200, 200, 204, 206, 301, 302, 307, 308, 400, 401, 403, 404, 405, 418, 429, 500, 501, 502, 503, 504, 999)
BODIES = [
    "",
    "true",
    "false",
    "null",
    '"3.8.8',
    "3.8",
    '{"version": "3.8.8"}',
    "[]",
    "<html><body>It works!</body></html>",
]
BODIES += ['<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>']
BODIES += ["<a/>", "<a>", "\x00", "é", "x" * 100_000]
RAW = [
    b"SSH-2.0-OpenSSH_9.6\r\n",
    b"\x16\x03\x01\x00\xff",
    b"220 mail ESMTP\r\n",
    b"-ERR unknown\r\n",
    b"",
    b"\r\n\r\n",
]
RAW += [
    b"HTTP/1.1\r\n\r\n",
    b"HTTP/1.1 abc\r\n\r\n",
    b"HTTP/9.9 200 OK\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nX",
    b"\xff" * 5000,
]
RAW += [
    b"\xff" * 5000,
    b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\nx",
    b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n",
]
RAW += [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 5000]
HEADERS = [
    "Content-Type: text/html",
    "Location: /",
    "Location: http://127.0.0.1:9/",
    "Location: x",
    "WWW-Authenticate: Basic",
]
HEADERS += ["Server: nginx", "x-amz-bucket-region: garage", "Content-Encoding: gzip", "ETag: x", "Last-Modified: x"]


def answer(rng: np.random.Generator) -> bytes | None:
    """What a service says to whatever it is asked; None: nothing, ever."""
    kind = rng.random()
    if kind < 0.06:
        return None
    if kind < 0.3:
        return RAW[int(rng.integers(len(RAW)))]
    status, body = int(rng.choice(STATUSES)), BODIES[int(rng.integers(len(BODIES)))].encode()
    some = rng.choice(HEADERS, int(rng.integers(3)), replace=False)
    head = [f"HTTP/1.1 {status} X", *map(str, some), f"Content-Length: {len(body)}", "Connection: close"]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


@contextmanager
def service(said: bytes | None) -> Iterator[str]:
    """Address of a server that says the same to everybody."""
    kept: list[socket.socket] = []

    def talk(connection: socket.socket) -> None:
        try:
            connection.recv(65536)
            connection.sendall(said or b"")
            connection.close()
        except OSError:
            pass

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            kept.append(connection)
            if said is not None:
                threading.Thread(target=talk, args=(connection,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
    for connection in kept:
        connection.close()


def asked(address: str) -> None:
    """The ServiceError that says that it is no Prefect; WrongError where it is taken for that or for S3."""
    problem = answers(lambda seconds: server_version(f"{address}/api", "a:b", seconds), patience_s=0.4, timeout_s=0.3)
    if not problem:
        raise WrongError("taken for Prefect")
    store = s3.S3Store("b", endpoint=address, attempts=2)
    for name, use in {
        "check": store.check,
        "list": lambda: store.list(""),
        "get": lambda: store.get_bytes("a"),
    }.items():
        try:
            use()
        except WavError as error:
            if "\n" in str(error):
                raise WrongError(f"{name}: more than a line: {error}") from None
            continue
        if name != "get":  # bytes are bytes: that they are the right ones is said by the digest in a manifest
            raise WrongError(f"{name} takes it for S3")
    raise ServiceError(problem)


@pytest.mark.services
@blocks(6, 100, 25)
def test_other_services(
    numbers: range,
    seed: int,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, Any], None],
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0.0)
    for name in ("READ_S", "REACH_READ_S"):
        monkeypatch.setattr(s3, name, 1)
    monkeypatch.setattr(s3, "BACKOFF_429_S", 0.0)
    tally, slowest = Tally(seed, "services"), 0.0
    for number in numbers:
        said, began = answer(tally.random(number)), time.monotonic()
        with tally.case(number, repr(said)[:300]), service(said) as address:
            asked(address)
        slowest = max(slowest, time.monotonic() - began)
    record_property("slowest_s", round(slowest, 1))
    tally.finish(record_property)
    assert tally.counts["refused"] == tally.counts["cases"]
