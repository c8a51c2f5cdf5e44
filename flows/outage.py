"""The Prefect server while a flow runs: it may go away and come back, and what a flow makes does not depend on it.

Prefect's client waits about a minute in each call to a server that is away. A training that moves its progress bar
once a line would stand still with it, and one that cannot show its curves would fail. So what is only shown goes
through :func:`show`; :func:`await_server` is for the two places where a run can do nothing without the server: its
start, and its end, where the final state is told.
"""

from __future__ import annotations

import logging
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import httpx
from prefect.context import FlowRunContext
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, get_current_settings, temporary_settings

from flows.provenance import parent_run
from wav.errors import ServiceError, WavError

Shown = TypeVar("Shown")
LOGGER = logging.getLogger("wav.outage")  # below wav, whose lines appear on the flow run
#: seconds without an attempt after one that failed; at least four times what that one took, so that a server that takes
#: connections and never answers costs a fifth of the time at most
PAUSE_S = 15.0
#: how long runs of a worker wait for the server: nobody else could use the machine meanwhile, and nobody watches
PATIENCE_S = 24 * 3600.0
ASK_EVERY_S = 2.0


def _say(level: int, line: str) -> None:
    """To the flow run's log, or where no flow runs (before and after one) to stderr."""
    if FlowRunContext.get() is not None:
        LOGGER.log(level, line)
    else:
        sys.stderr.write(line + "\n")
        sys.stderr.flush()


@dataclass
class _Link:
    """What this process knows of the server."""

    away_since: float | None = None
    next_try: float = 0.0
    work_done: bool = False

    def lost(self, what: str, error: Exception, took: float) -> None:
        now = time.monotonic()
        if self.away_since is None:
            self.away_since = now - took
            url = get_current_settings().api.url
            _say(logging.WARNING, f"Prefect server at {url}: away ({error!r}); the work goes on, {what} is not shown")
        self.next_try = now + max(PAUSE_S, 4 * took)

    def found(self) -> None:
        if self.away_since is not None:
            _say(logging.INFO, f"Prefect server: back after {time.monotonic() - self.away_since:.0f} s")
        self.away_since = None


LINK = _Link()


def show(what: str, action: Callable[[], Shown], wait: bool = False) -> Shown | None:
    """Let ``action`` show something in Prefect; None, and one line in the log, where the server is away or refuses.

    Args:
        what: shown; for the log.
        action: calls Prefect's API.
        wait: bridge a restart of the server (about a minute, once per outage); without it a bar just stands still.
    """
    known_away = LINK.away_since is not None
    if known_away and not wait and time.monotonic() < LINK.next_try:
        return None
    retries = {} if wait and not known_away else {PREFECT_CLIENT_MAX_RETRIES: 0}
    began = time.monotonic()
    try:
        with temporary_settings(updates=retries):
            result = action()
    except httpx.HTTPError as error:
        if isinstance(error, httpx.HTTPStatusError) and error.response.status_code < 500:
            reason = " ".join(str(error).split())
            _say(logging.WARNING, f"{what}: not shown in Prefect ({reason}); the work goes on")
        else:
            LINK.lost(what, error, time.monotonic() - began)
        return None
    LINK.found()
    return result


def answers(url: str, attempts: int = 2, patience_s: float = 60.0, timeout_s: float = 10.0) -> str:
    """Empty if a web server answers at ``url`` (whatever its status), else why not.

    One that is down refuses at once; one that takes the connection and says nothing is busy, and is asked for longer.
    """
    began, asked = time.monotonic(), 0
    while True:
        asked += 1
        try:
            with urllib.request.urlopen(url, timeout=timeout_s):
                return ""
        except urllib.error.HTTPError:
            return ""
        except (urllib.error.URLError, OSError) as error:
            problem = getattr(error, "reason", error)
        busy = isinstance(problem, TimeoutError) and time.monotonic() - began < patience_s
        if asked >= attempts and not busy:
            return str(problem)
        time.sleep(0.5)


def patience() -> float:
    """Seconds this process waits for the server: long in what a worker or a retrain started, else not at all."""
    return PATIENCE_S if os.environ.get("WAV_WORKER") or parent_run() else 0.0


def await_server(then: str, patience_s: float | None = None) -> str:
    """Wait until the Prefect server answers; empty then, else why it does not.

    Args:
        then: what happens when it is there; for the log.
        patience_s: seconds; None: :func:`patience`.
    """
    url = f"{(get_current_settings().api.url or '').rstrip('/')}/health"
    limit = patience() if patience_s is None else patience_s
    began, said = time.monotonic(), False
    while problem := answers(url):
        if time.monotonic() - began >= limit:
            return problem
        if not said:
            _say(logging.WARNING, f"Prefect server at {url}: away ({problem}); waiting for it, then {then}")
            said = True
        time.sleep(ASK_EVERY_S)
    if said:
        _say(logging.INFO, f"Prefect server: back after {time.monotonic() - began:.0f} s; {then}")
    LINK.found()
    return ""


def finished() -> None:
    """The last thing a flow does, when all it makes is made: its final state will find the server, if that returns."""
    LINK.work_done = True
    await_server("the final state is told")


def run_flow(flow: Callable[[], object]) -> None:
    """Run a flow whose server may be away when the final state is to be told: what was made counts, not the telling.

    Raises:
        WavError: the flow's own error, or (ServiceError) the server went away where it was needed.
    """
    try:
        flow()
    except httpx.TransportError as error:
        own: BaseException | None = error
        while own is not None and not isinstance(own, WavError):
            own = own.__cause__ or own.__context__
        if own is not None:  # Prefect could not be told of it and raised that instead
            raise own from None
        url = get_current_settings().api.url
        if not LINK.work_done:
            raise ServiceError(
                f"Prefect server at {url}: went away ({error!r}); run make up, then run again: it goes on"
            ) from error
        _say(
            logging.WARNING,
            f"Prefect server at {url}: away at the end ({error!r}); all that was to be made is made, only the flow "
            "run's final state could not be told: it will read Crashed or stay Running",
        )
