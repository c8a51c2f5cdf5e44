"""Before a flow starts it asks its services: down is said at once, busy is waited for, something else is told apart."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.common import require_services
from wav.config import Runtime
from wav.doctor import check_services
from wav.errors import ServiceError
from wav.local import bypass_proxies
from wav.prefect_api import server_version
from wav.probes import answers, within


def problem_at(url: str, string: str = "", **patience: float) -> str:
    """What is wrong with the Prefect server at ``url``."""
    return answers(lambda seconds: server_version(url, string, seconds), **patience)


@contextmanager
def server(answer: Callable[[int, bytes], bytes | None]) -> Iterator[str]:
    """Address of a server that sends ``answer(number of the connection, request)``; None: it stays silent."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        kept = []

        def serve() -> None:
            for number in range(1000):
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                said = answer(number, connection.recv(4000))
                if said is None:
                    kept.append(connection)
                else:
                    connection.sendall(said)
                    connection.close()

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/api"
        listener.shutdown(socket.SHUT_RDWR)
        for connection in kept:
            connection.close()


def http(status: int, body: str = "") -> bytes:
    """An answer."""
    return f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}".encode()


def prefect(request: bytes, auth: bytes = b"") -> bytes:
    """What a Prefect server answers to a question for its version."""
    return http(200, '"3.8.8"') if auth in request else http(401, '{"exception_message":"Unauthorized"}')


def test_down_is_said_at_once() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        assert "refused" in problem_at(f"http://127.0.0.1:{probe.getsockname()[1]}/api")


def test_silence_is_not_waited_for_without_end() -> None:
    with server(lambda number, request: None) as url:
        assert "timed out" in problem_at(url, patience_s=0.5, timeout_s=0.2)


def test_busy_is_waited_for() -> None:
    with server(lambda number, request: None if number < 3 else prefect(request)) as url:
        assert problem_at(url, patience_s=20.0, timeout_s=0.3) == ""


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (http(404), "404"),
        (http(200, "<html></html>"), "no Prefect server"),
        (http(503), "503"),
        (http(401), "PREFECT_API_AUTH_STRING"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "no Prefect server"),
        (b"\x00\xff\x16\x03", "no Prefect server"),
    ],
)
def test_something_else_is_not_prefect(answer: bytes, words: str) -> None:
    with server(lambda number, request: answer) as url:
        assert words in problem_at(url)


def test_a_wrong_authentication_string_is_said() -> None:
    with server(lambda number, request: prefect(request, b"YTpi")) as url:  # a:b
        assert "PREFECT_API_AUTH_STRING" in problem_at(url)
        assert "PREFECT_API_AUTH_STRING" in problem_at(url, "a:c")
        assert problem_at(url, "a:b") == ""


@pytest.mark.parametrize("password", ["SECRET", "SEC@RET", "SEC/RET"])
def test_an_address_that_holds_a_password_is_refused_and_not_repeated(
    password: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would stand in the log and in Prefect's database."""
    url = f"http://me:{password}@127.0.0.1:1/api"
    assert problem_at(url) == "its address holds a password or token, which belongs in PREFECT_API_AUTH_STRING"
    monkeypatch.setenv("PREFECT_API_URL", url)
    runtime = Runtime(store=f"file://{tmp_path}")
    (check, _) = check_services(runtime)
    assert check.text.startswith("127.0.0.1:1/api: its address holds a password")
    with (
        temporary_settings({PREFECT_API_URL: url}),
        pytest.raises(ServiceError, match="its address holds") as found,
    ):
        require_services(runtime)
    assert "Prefect server at 127.0.0.1:1/api (PREFECT_API_URL)" in str(found.value)
    assert "RET" not in check.text + str(found.value)


def test_byte_by_byte_is_silence() -> None:
    with pytest.raises(ServiceError, match="no whole answer"):
        within(0.05, lambda: time.sleep(1), "x")


def test_local_addresses_need_no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with server(lambda number, request: prefect(request)) as url:
        assert problem_at(url) == ""
    monkeypatch.setenv("no_proxy", "intranet")
    monkeypatch.delenv("NO_PROXY", raising=False)
    variables = {"no_proxy": "intranet"}
    bypass_proxies(variables)
    bypass_proxies(variables)
    assert variables == dict.fromkeys(("no_proxy", "NO_PROXY"), "intranet,127.0.0.1,localhost,::1")
