"""The page's server: one HTML file and one websocket on 127.0.0.1, which refuse what comes from anywhere else.

Other sites that a browser on this machine visits can reach a port of 127.0.0.1: they are told apart by the ``Host``
under which they reach it (DNS rebinding) and by the ``Origin`` that a browser sends along with a websocket.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import logging
import re
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any

from websockets.asyncio.server import ServerConnection
from websockets.asyncio.server import serve as listen
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from wav.demo.session import Ask, Session
from wav.errors import ConfigError, ServiceError, WavError
from wav.serving.server import Connection, quiet, until_stopped

log = logging.getLogger(__name__)

HOST = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:\d{1,5})?", re.ASCII)
MAX_MESSAGE = 4096  #: bytes
MAX_CONNECTIONS = 16
PAGE = Path(__file__).with_name("page.html")


class Server:
    """The page, and the session behind it, which the newest page has."""

    def __init__(self, session: Session) -> None:
        self.session, self._text = session, PAGE.read_text()
        inline = {
            tag: base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
            for tag, content in re.findall(r"<(style|script)>(.*?)</\1>", self._text, flags=re.S)
        }
        self._policy = (
            f"default-src 'none'; style-src 'sha256-{inline['style']}'; script-src 'sha256-{inline['script']}'; "
            "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        self._thread = ThreadPoolExecutor(1, "wav-demo")  # simulator and model, outside the event loop
        self._page: ServerConnection | None = None
        self._turn = asyncio.Lock()

    async def run(self, listening: socket.socket, stop: asyncio.Event) -> None:
        """Answer on a socket that listens already, until ``stop`` is set."""
        options: dict[str, Any] = {"max_size": MAX_MESSAGE, "max_queue": 2, "compression": None, "logger": quiet}
        options |= {"close_timeout": 2, "create_connection": partial(Connection, limit=MAX_CONNECTIONS)}
        try:
            async with listen(self._converse, sock=listening, process_request=self._admit, **options):
                await stop.wait()
        finally:
            self._thread.shutdown()

    def _admit(self, connection: ServerConnection, request: Request) -> Response | None:
        """The page, a refusal, or None for its websocket."""
        hosts, origins = (request.headers.get_all(name) for name in ("Host", "Origin"))
        if len(hosts) != 1 or not HOST.fullmatch(hosts[0]):
            return connection.respond(HTTPStatus.FORBIDDEN, "open this page as http://127.0.0.1\n")
        if request.path == "/":
            headers = {
                "Content-Type": "text/html; charset=utf-8",
                "Content-Security-Policy": self._policy,
                "X-Content-Type-Options": "nosniff",
                "Cache-Control": "no-store",
                "Connection": "close",
            }
            body = self._text.encode()
            return Response(200, "OK", Headers({**headers, "Content-Length": str(len(body))}), body)
        if request.path != "/session":
            return connection.respond(HTTPStatus.NOT_FOUND, "there is / alone\n")
        if origins != [f"http://{hosts[0]}"]:
            return connection.respond(HTTPStatus.FORBIDDEN, "this session is for its own page\n")
        return None

    async def _converse(self, connection: ServerConnection) -> None:
        """One page, until it goes or another one is opened."""
        before, self._page = self._page, connection
        try:
            if before is not None:
                await before.close(4000, "another page was opened")
            async with self._turn:  # what the page before asked for is answered first
                await connection.send(json.dumps(self.session.about()))
                async for message in connection:
                    await self._answer(connection, message)
        except ConnectionClosed:
            pass
        finally:
            if self._page is connection:
                self._page = None

    async def _answer(self, connection: ServerConnection, message: str | bytes) -> None:
        """All that a message is answered with; ``ready`` ends it."""
        loop = asyncio.get_running_loop()
        try:
            answers = self.session.answer(Ask.read(message))
            while (told := await loop.run_in_executor(self._thread, next, answers, None)) is not None:
                await connection.send(json.dumps(told))
        except WavError as error:
            await connection.send(json.dumps({"is": "error", "text": str(error)}))
        except ConnectionClosed:
            raise
        except Exception:  # a fault of ours, which the page's user is told of and may go on after
            log.exception("the demo failed")
            await connection.send(json.dumps({"is": "error", "text": "something failed; see the terminal's output"}))
        await connection.send(json.dumps({"is": "ready"}))


def demo(folder: Path, *, port: int = 8080, device: str = "auto", say: Callable[[str], None] = log.info) -> None:
    """``wav demo``: an export beside a simulator of its suite, until SIGINT or SIGTERM.

    Raises:
        ConfigError: the suite has no simulator, or one of other conventions. ServiceError: the port is taken.
        CheckpointError: the export is damaged.
    """
    from wav.evaluation.evaluate import check_start
    from wav.policy.export import load_export
    from wav.sim.registry import has_simulator
    from wav.sim.workers import SimPool

    try:
        listening = socket.create_server(("127.0.0.1", port))  # a page that is opened too early waits
    except (OSError, OverflowError) as error:
        raise ServiceError(f"127.0.0.1:{port}: {error}; choose another --port") from None
    with listening:
        policy = load_export(folder, batch_size=1, device=device)
        if not has_simulator(policy.data.suite):
            raise ConfigError(f"{folder}: its suite {policy.data.suite!r} has no simulator; `wav serve` can serve it")
        check_start(policy, policy.data)
        with SimPool(policy.data.suite, policy.data, workers=1, slots=1) as pool:
            session = Session(policy, pool)
            session.warm_up()

            async def run(stop: asyncio.Event) -> None:
                say(f"open http://127.0.0.1:{listening.getsockname()[1]} ({policy.data.suite}); Ctrl-C ends it")
                await Server(session).run(listening, stop)

            asyncio.run(until_stopped(run))
