"""Before a flow starts it asks its services: one that is down is said at once, one that is busy is waited for."""

from __future__ import annotations

import socket
import threading
import time

from flows.server import answers, any_answer
from wav.prefect_api import server_version


def test_a_server_that_is_down_is_said_at_once() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}/"
        began = time.monotonic()
        assert "refused" in answers(lambda seconds: any_answer(url, seconds))
    assert time.monotonic() - began < 5


def test_a_server_that_stays_silent_is_not_waited_for_without_end() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/"
        assert "timed out" in answers(lambda seconds: any_answer(url, seconds), patience_s=0.5, timeout_s=0.2)


def test_a_busy_server_is_waited_for() -> None:
    """It takes connections at once, and answers the fourth."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer_late() -> None:
            silent = [server.accept()[0] for _ in range(3)]
            last, _ = server.accept()
            last.recv(1000)
            last.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            for connection in (*silent, last):
                connection.close()

        thread = threading.Thread(target=answer_late, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/"
        assert answers(lambda seconds: any_answer(url, seconds), patience_s=20.0, timeout_s=0.5) == ""
        thread.join(5)


def test_a_proxy_is_not_taken_for_the_server_behind_it() -> None:
    """It says 503 while its server restarts."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer_all() -> None:
            for _ in range(3):
                connection, _ = server.accept()
                connection.recv(1000)
                connection.sendall(b"HTTP/1.1 503 Away\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                connection.close()

        thread = threading.Thread(target=answer_all, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/"
        assert answers(lambda seconds: any_answer(url, seconds)) == "", "any status will do for a store"
        assert "503" in answers(lambda seconds: server_version(url, "", seconds))
        thread.join(5)
