"""The websocket server: connections, authorisation, readiness, metrics.

It speaks openpi's protocol, so that ``openpi-client`` and what is built on it can call it: a binary frame of metadata
on connecting, then one reply to each binary frame with an observation, in order: a binary frame with ``actions``, or a
text frame that says why there are none.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import logging
import signal
import socket
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any

import numpy as np
from websockets.asyncio.server import ServerConnection
from websockets.asyncio.server import serve as listen
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request as HttpRequest
from websockets.http11 import Response

import wav
from wav.errors import ConfigError, DataError, ServiceError
from wav.planning import Variant
from wav.policy.policy import Observation, Policy
from wav.serving.batches import Batches, Metrics, Refusal, Reply, Session
from wav.serving.requests import Reader, Request
from wav.serving.wire import pack, unpack

log = logging.getLogger(__name__)
quiet = logging.getLogger("wav.serving.websockets")
quiet.setLevel(logging.CRITICAL)  # the library logs a traceback for whatever knocks without being a client

IDLE_SECONDS = 3600.0
"""A connection without a whole message for this long is closed. Pings would close those of robots that are busy."""
MESSAGE_SECONDS = 30.0  #: From a fragmented message's first fragment to its last.
MAX_FRAGMENTS = 4096
MAX_UNSENT = 1 << 20  #: Bytes of answers, those to pings included, that a client may leave unread.
HANDSHAKES = 64  #: Connections beyond those that may become sessions.
UNREAD_REPLIES = 4  #: Replies of one connection that may wait to be sent; beyond them nothing is read from it.


@dataclass(frozen=True)
class Options:
    """How to serve a policy. Raises ConfigError where anybody on the network could call it."""

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str = ""  #: what clients must send; empty: nothing
    variant: Variant = "planned"
    seed: int = 7
    execute_steps: int | None = None  #: actions of a chunk that clients are advised to execute; None: as evaluated
    deadline: float = 30.0  #: seconds from a request to its reply
    sessions: int = 64  #: connections at a time
    max_message: int = 8 << 20  #: bytes
    keep_memory: bool = False  #: a new prompt on a connection is not a new episode

    def __post_init__(self) -> None:
        if not self.api_key and not _is_loopback(self.host):
            raise ConfigError(
                f"--host {self.host}: others could reach the policy there; put a key into the variable that "
                "--api-key-env names, or serve on 127.0.0.1"
            )


class Connection(ServerConnection):
    """Drops a connection beyond ``limit``, and one whose client does not read what it is sent."""

    def __init__(self, *args: Any, limit: int, **options: Any) -> None:
        super().__init__(*args, **options)
        self.limit = limit

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take part in the handshake, unless too many connections do."""
        super().connection_made(transport)
        if len(self.server.handlers) > self.limit:
            self.transport.abort()

    def data_received(self, data: bytes) -> None:
        """Read, unless what was sent is not read."""
        super().data_received(data)
        if self.transport.get_write_buffer_size() > MAX_UNSENT:
            self.transport.abort()


class Server:
    """A policy behind a port.

    ``load`` runs on a thread; until the policy has made one plan connections are answered with 503. Then ``say`` is
    called with one line.
    """

    def __init__(self, options: Options, load: Callable[[], Policy], say: Callable[[str], None] = log.info) -> None:
        self.options, self.port, self.metrics = options, options.port, Metrics()
        self._load, self._say = load, say
        self._ready, self._number = False, 0
        self._readers = ThreadPoolExecutor(2, "wav-read")  # unpacking and resizing images takes milliseconds

    async def run(self, stop: asyncio.Event) -> None:
        """Listen, load, serve until ``stop`` is set.

        Raises:
            ServiceError: the port is taken, or the host is not this machine's. WavError: as loading raises.
        """
        options = self.options
        try:
            listening = await listen(
                self._serve_session,
                options.host,
                options.port,
                process_request=self._answer_http,
                origins=[None],  # a page in a browser sends one, a robot does not
                compression=None,
                max_size=options.max_message,  # compared with a frame's header, before its body is read
                max_queue=2,
                ping_interval=None,
                create_connection=partial(Connection, limit=options.sessions + HANDSHAKES),  # type: ignore[arg-type]
                logger=quiet,
            )
        except OSError as error:
            where = f"{options.host}:{options.port}"
            raise ServiceError(f"{where}: {error.strerror or error}; choose another --port") from None
        tasks: list[asyncio.Task[Any]] = [asyncio.create_task(stop.wait())]
        try:
            async with listening:
                self.port = next(iter(listening.sockets)).getsockname()[1]
                policy = await asyncio.to_thread(self._load)
                self._batches = Batches(policy, options.variant, options.seed, self.metrics)
                self._describe(policy)
                tasks.append(asyncio.create_task(self._batches.run()))
                await _warm_up(policy, self._batches)
                self._ready = True
                self._say(f"ready on ws://{options.host}:{self.port} ({policy.data.suite}, {options.variant})")
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                self._ready = False
                for task in done:
                    task.result()
        finally:  # after the last session has ended
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._readers.shutdown()

    def _describe(self, policy: Policy) -> None:
        """What reads messages, and what clients are told of the policy."""
        options, self._reader = self.options, Reader(policy.data, policy.conventions)
        steps = min(options.execute_steps or policy.execute_steps, policy.data.action_chunk)
        self._about = {"variant": options.variant, "execute_steps": steps}
        about = {"server": f"wav {wav.__version__}", "checkpoint": policy.digest, "max_message": options.max_message}
        about |= {"reset_on_new_prompt": not options.keep_memory, "results": policy.results.to_json()}
        self._metadata = pack(about | self._about | self._reader.metadata())

    def _answer_http(self, connection: ServerConnection, request: HttpRequest) -> Response | None:
        """Answer what is no websocket, and refuse who may not connect; None lets a connection through."""
        path, unavailable = request.path.partition("?")[0], HTTPStatus.SERVICE_UNAVAILABLE
        if path == "/healthz":
            return connection.respond(*((HTTPStatus.OK, "OK\n") if self._ready else (unavailable, "loading\n")))
        sent = [value.encode(errors="replace") for value in request.headers.get_all("Authorization")]
        key = f"Api-Key {self.options.api_key}".encode()
        if self.options.api_key and not (len(sent) == 1 and hmac.compare_digest(sent[0], key)):
            self.metrics.refused.labels("key").inc()
            response = connection.respond(HTTPStatus.UNAUTHORIZED, "send the header 'Authorization: Api-Key KEY'\n")
            response.headers["WWW-Authenticate"] = "Api-Key"
            return response
        if path == "/metrics":
            return connection.respond(HTTPStatus.OK, self.metrics.text())
        if not self._ready:
            return connection.respond(unavailable, "the policy is being loaded; ask /healthz\n")
        if self._batches.sessions >= self.options.sessions:
            self.metrics.refused.labels("sessions").inc()
            return connection.respond(unavailable, f"{self.options.sessions} sessions are open, the most allowed\n")
        return None

    async def _serve_session(self, connection: ServerConnection) -> None:
        """One connection, to its end."""
        _keep_alive(connection)
        self._number += 1
        session = Session(self._number, self.options.keep_memory)
        self._batches.open(session)
        replies: asyncio.Queue[tuple[float, Reply]] = asyncio.Queue(UNREAD_REPLIES)
        tasks = [asyncio.create_task(self._read(connection, session, replies))]
        tasks.append(asyncio.create_task(self._write(connection, replies)))
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            for ended in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(ended, Exception) and not isinstance(ended, (ConnectionClosed, TimeoutError)):
                    log.error("a session ended", exc_info=ended)
            self._batches.close(session)

    async def _read(self, connection: ServerConnection, session: Session, replies: asyncio.Queue[Any]) -> None:
        """Requests of a session, each with a reply to come in ``replies``."""
        loop = asyncio.get_running_loop()
        while True:
            message = await _receive(connection)
            arrived = time.monotonic()
            found = await loop.run_in_executor(self._readers, self._request, message)
            await replies.put((arrived, self._batches.submit(session, found)))

    def _request(self, message: bytes | str) -> Request | Refusal:
        """What a message asks for, or why it is refused."""
        if isinstance(message, str):
            return Refusal("message", "message: a text frame; send observations as binary frames (msgpack)")
        try:
            return self._reader(unpack(message))
        except DataError as error:
            return Refusal("field", str(error))
        except Exception:  # nobody's message may end a connection's task
            log.exception("a message could not be read")
            return Refusal("message", "message: could not be read; see the server's log")

    async def _write(self, connection: ServerConnection, replies: asyncio.Queue[Any]) -> None:
        """Metadata, then the replies of a session in the order of its requests."""
        await connection.send(self._metadata)
        total = 0.0
        while True:
            arrived, future = await replies.get()
            left = self.options.deadline - (time.monotonic() - arrived)
            try:
                reply = await asyncio.wait_for(future, max(0.0, left))
            except TimeoutError:
                reply = Refusal("deadline", f"no plan within {self.options.deadline:g} s; the server is overloaded")
            if isinstance(reply, Refusal):
                self.metrics.refused.labels(reply.reason).inc()
                await connection.send(reply.text)
                continue
            reply["server_timing"]["prev_total_ms"] = total
            await connection.send(pack(reply | self._about))
            total = 1000 * (time.monotonic() - arrived)
            self.metrics.latency.observe(total / 1000)


async def _receive(connection: ServerConnection) -> bytes | str:
    """The next message; ConnectionClosed or TimeoutError ends the session.

    Fragments are counted, because those of no bytes never reach the limit of a message's size.
    """
    parts: list[Any] = []
    async with asyncio.timeout(IDLE_SECONDS) as limit:
        async for part in connection.recv_streaming():
            if not parts:
                limit.reschedule(asyncio.get_running_loop().time() + MESSAGE_SECONDS)
            parts.append(part)
            if len(parts) > MAX_FRAGMENTS:
                await connection.close(1009, "too many fragments")
    return "".join(parts) if isinstance(parts[0], str) else b"".join(parts)


async def _warm_up(policy: Policy, batches: Batches) -> None:
    """One plan of a grey picture, so that the first client does not wait for caches and compilers.

    Raises:
        ServiceError: the policy cannot plan.
    """
    data = policy.data
    grey = np.full((data.image_height, data.image_width, 3), 127, np.uint8)
    state = np.asarray(policy.statistics.key("state").mean, np.float32)
    observation, session = Observation(dict.fromkeys(data.views, grey), state, "warm up"), Session(0, False)
    batches.open(session)
    reply = await batches.submit(session, Request(observation, True, None, None))
    batches.close(session)
    if isinstance(reply, Refusal):
        raise ServiceError(f"the policy cannot plan: {reply.text}")


def _keep_alive(connection: ServerConnection) -> None:
    """Let the kernel find out about a client whose machine is gone (30 s of silence, then four probes)."""
    found = connection.transport.get_extra_info("socket")
    found.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, name):  # not every system has them
            found.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _is_loopback(host: str) -> bool:
    """Whether a name or address leads to this machine alone."""
    with contextlib.suppress(OSError, ValueError):
        found = socket.getaddrinfo(host or None, None, flags=socket.AI_PASSIVE)
        return all(ipaddress.ip_address(entry[4][0]).is_loopback for entry in found)
    return False


async def until_stopped(run: Callable[[asyncio.Event], Awaitable[None]]) -> None:
    """Await ``run`` with an event that SIGINT and SIGTERM set."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    await run(stop)


def serve(
    folder: Path, options: Options, *, batch_size: int = 8, device: str = "auto", say: Callable[[str], None] = log.info
) -> None:
    """``wav serve``: serve an export until SIGINT or SIGTERM.

    Raises:
        WavError: a damaged export, a variant that it cannot plan, a port that is taken, no key beyond loopback.
    """
    from wav.policy.export import load_export

    server = Server(options, lambda: load_export(folder, batch_size=batch_size, device=device), say)
    asyncio.run(until_stopped(server.run))
