"""Calls a World-Value-Action policy over the network; see README.md."""

from __future__ import annotations

import inspect
import time
from typing import Any

from websockets.exceptions import ConnectionClosed, InvalidHandshake
from websockets.sync.client import connect

from wav_client.wire import pack, unpack

__all__ = ["Client", "RefusedError"]


class RefusedError(RuntimeError):
    """The server says why it has no plan; the connection stays usable."""


class Client:
    """A connection to ``wav serve``, and with it a session that has its own memory.

    Args:
        host: name or address, or a whole ws:// or wss:// address.
        port: of the server; not used with a whole address.
        api_key: what the server asks for, if it does.
        wait: seconds to wait for a server that is still starting.
        timeout: seconds to wait for a plan.

    Raises:
        ConnectionError: no server within ``wait``, or it refuses the connection.
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 8000,
        api_key: str | None = None,
        wait: float = 60.0,
        timeout: float = 60.0,
    ) -> None:
        self.address = host if host.startswith(("ws://", "wss://")) else f"ws://{host}:{port}"
        self.timeout = timeout
        self._begin: dict[str, Any] = {}
        options: dict[str, Any] = {"compression": None, "max_size": None, "open_timeout": 10.0}
        if "proxy" in inspect.signature(connect).parameters:
            options["proxy"] = None  # from version 15 on a proxy of the environment would get even 127.0.0.1
        if api_key:
            options["additional_headers"] = {"Authorization": f"Api-Key {api_key}"}
        deadline = time.monotonic() + wait
        while True:
            try:
                self._socket = connect(self.address, **options)
                break
            except (OSError, InvalidHandshake, EOFError, TimeoutError) as error:
                status = getattr(getattr(error, "response", None), "status_code", None)
                if time.monotonic() > deadline or status not in (None, 503):  # 503: loading, or full
                    raise ConnectionError(f"{self.address}: {error}") from error
                time.sleep(0.5)
        self.metadata: dict[str, Any] = unpack(self._socket.recv(timeout))  # type: ignore[arg-type]

    def reset(self, episode: str | int | None = None, seed: int | None = None) -> None:
        """Begin an episode with the next observation: the policy forgets the frames before it.

        ``episode`` and ``seed`` name its noise; without them the server counts the connection's episodes.
        """
        self._begin = {"reset": True, "episode": episode, "seed": seed}

    def act(self, observation: dict[str, Any]) -> dict[str, Any]:
        """A plan for an observation: ``actions`` (A, action_dim) and what README.md names.

        Raises:
            RefusedError: a field is missing or does not fit, or the server is overloaded. TimeoutError: no answer
                within ``timeout``. ConnectionError: the connection has ended.
        """
        try:
            self._socket.send(pack({**observation, **self._begin}))
            answer = self._socket.recv(self.timeout)
        except TimeoutError:
            self.close()  # a late answer would be taken for the next one's
            raise
        except ConnectionClosed as error:
            raise ConnectionError(f"{self.address}: {error}") from error
        if isinstance(answer, str):
            raise RefusedError(answer)
        self._begin = {}
        return unpack(answer)  # type: ignore[no-any-return]

    def close(self) -> None:
        """End the session."""
        self._socket.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
