"""Asking a server whether it is there, for ``wav doctor`` and before every flow: both say the same.

Every question ends within half a minute, whatever the server does.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from wav.errors import ServiceError

Result = TypeVar("Result")
PATIENCE_S, CALL_S = 15.0, 5.0


class SilentError(ServiceError):
    """A server takes the connection and gives no whole answer in time."""


def within(seconds: float, work: Callable[[], Result], what: str) -> Result:
    """What ``work`` returns or raises, waited for no longer than ``seconds``, even where a server sends byte by byte.

    After that it raises SilentError, whose message begins with ``what``.
    """
    box: queue.Queue[tuple[Result | None, BaseException | None]] = queue.Queue()

    def run() -> None:
        try:
            box.put((work(), None))
        except BaseException as error:
            box.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        result, error = box.get(timeout=seconds)
    except queue.Empty:
        raise SilentError(f"{what}: no whole answer in {seconds:.0f} s; is this the right address?") from None
    if error is not None:
        raise error
    return result  # type: ignore[return-value]  # None where work returns None


def answers(ask: Callable[[float], object], patience_s: float = PATIENCE_S, timeout_s: float = CALL_S) -> str:
    """Empty if a server answers, else why not.

    One that is down refuses at once; one that takes the connection and says nothing is busy, and is asked for longer.

    ``ask`` is given the seconds that one attempt may take; it raises OSError where there is no answer, and ServiceError
    where the answer is not that of the server meant.
    """
    began, asked = time.monotonic(), 0
    while True:
        asked += 1
        try:
            within(2 * timeout_s, lambda: ask(timeout_s), "timed out")
            return ""
        except SilentError as error:
            problem: object = error
        except ServiceError as error:
            return str(error)
        except OSError as error:
            problem = getattr(error, "reason", error)
        silent = isinstance(problem, (TimeoutError, SilentError))
        if asked >= 2 and not (silent and time.monotonic() - began < patience_s):
            return f"not up ({problem})"
        time.sleep(0.5)
