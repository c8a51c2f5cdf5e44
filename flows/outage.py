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

from wav.errors import ServiceError, WavError

Shown = TypeVar("Shown")
LOGGER = logging.getLogger("wav.outage")  # below wav, whose lines appear on the flow run
#: seconds without an attempt after one that failed; at least four times what that one took, so that a server that takes
#: connections and never answers costs a fifth of the time at most
PAUSE_S = 15.0
#: how long a worker's runs wait for the server: nobody else could use the machine meanwhile, and nobody watches
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
    own_error: BaseException | None = None  # what the flow's body raised, whatever Prefect makes of it

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


def is_away(error: BaseException) -> bool:
    """Whether an error says that the server is not there, or not well: a proxy in front of it answers 502 or 503."""
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code >= 500
    return isinstance(error, httpx.HTTPError)


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
        if is_away(error):
            LINK.lost(what, error, time.monotonic() - began)
        else:
            reason = " ".join(str(error).split())
            _say(logging.WARNING, f"{what}: not shown in Prefect ({reason}); the work goes on")
        return None
    LINK.found()
    return result


def answers(url: str, attempts: int = 2, patience_s: float = 60.0, timeout_s: float = 10.0, well: bool = False) -> str:
    """Empty if a web server answers at ``url``, else why not.

    One that is down refuses at once; one that takes the connection and says nothing is busy, and is asked for longer.

    Args:
        url: asked.
        attempts: at least.
        patience_s: how long one that is busy is asked.
        timeout_s: of one attempt.
        well: a status of 500 or more is no answer (a proxy's, while its server restarts); else any status is one.
    """
    began, asked = time.monotonic(), 0
    while True:
        asked += 1
        try:
            with urllib.request.urlopen(url, timeout=timeout_s):
                return ""
        except urllib.error.HTTPError as error:
            if not well or error.code < 500:
                return ""
            problem: object = error
        except (urllib.error.URLError, OSError) as error:
            problem = getattr(error, "reason", error)
        busy = isinstance(problem, TimeoutError) and time.monotonic() - began < patience_s
        if asked >= attempts and not busy:
            return str(problem)
        time.sleep(0.5)


def patience() -> float:
    """Seconds this process waits for the server: long in what a worker started, stages of its retrain included.

    By hand nobody waits, a retrain and its stages neither: who started it sees the line, and starts it again.
    """
    return PATIENCE_S if os.environ.get("WAV_WORKER") else 0.0


def await_server(then: str, patience_s: float | None = None) -> str:
    """Wait until the Prefect server answers; empty then, else why it does not.

    Args:
        then: what happens when it is there; for the log.
        patience_s: seconds; None: :func:`patience`.
    """
    url = f"{(get_current_settings().api.url or '').rstrip('/')}/health"
    limit = patience() if patience_s is None else patience_s
    began, said = time.monotonic(), False
    while problem := answers(url, well=True):
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


def _own_error(error: BaseException) -> BaseException | None:
    """What the flow itself raised before Prefect raised ``error``; None where the server was all that was missing."""
    known = [] if LINK.own_error is None or is_away(LINK.own_error) else [LINK.own_error]
    beneath: BaseException | None = error
    while beneath is not None:
        if isinstance(beneath, KeyboardInterrupt):  # also one that came while Prefect told of another
            return beneath
        if isinstance(beneath, WavError):
            known.append(beneath)
        beneath = beneath.__cause__ or beneath.__context__
    return known[0] if known else None


def run_flow(flow: Callable[[], object]) -> None:
    """Run a flow whose server may be away when the final state is to be told: what was made counts, not the telling.

    Raises:
        WavError: the flow's own error, or (ServiceError) the server went away where it was needed.
        KeyboardInterrupt: Ctrl-C, also where the server could not be told of it.
    """
    LINK.own_error = None
    try:
        flow()
    except httpx.HTTPError as error:
        if not is_away(error):
            raise
        own, url = _own_error(error), get_current_settings().api.url
        if isinstance(own, WavError) or (own is not None and not isinstance(own, Exception)):
            raise own from None  # Prefect could not be told of it and raised that instead
        gone = f"Prefect server at {url}: went away ({error!r})"
        if own is not None:
            raise ServiceError(
                f"{gone}, and before that the run failed: {type(own).__name__}: {own}; correct that, "
                "run make up, then run again: it goes on"
            ) from own
        if not LINK.work_done:
            raise ServiceError(f"{gone}; run make up, then run again: it goes on") from error
        _say(
            logging.WARNING,
            f"Prefect server at {url}: away at the end ({error!r}); all that was to be made is made, only the flow "
            "run's final state could not be told: it will read Crashed or stay Running",
        )
