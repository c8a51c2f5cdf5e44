"""The Prefect server: a flow needs it at its start; what is shown there afterwards is best effort.

A server that goes away costs a run its pictures and its last state, never its result (docs/operations.md).
"""

from __future__ import annotations

import functools
import inspect
import logging
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import httpx
from prefect import Flow
from prefect.settings import (
    PREFECT_API_REQUEST_TIMEOUT,
    PREFECT_CLIENT_MAX_RETRIES,
    get_current_settings,
    temporary_settings,
)

from wav.errors import ServiceError

Shown = TypeVar("Shown")
LOGGER = logging.getLogger("wav.server")  # below wav, whose lines appear on the flow run
CALL_S = 10.0


def show(what: str, action: Callable[[], Shown], retries: int = 2) -> Shown | None:
    """Let ``action`` show something in Prefect; None, and one line in the log, where that fails for any reason.

    ``retries`` of a call take some seconds each; 0 for what is shown again soon.
    """
    try:
        with temporary_settings(updates={PREFECT_CLIENT_MAX_RETRIES: retries, PREFECT_API_REQUEST_TIMEOUT: CALL_S}):
            return action()
    except Exception as error:  # whatever it is, it is not the stage's
        LOGGER.warning("%s: not shown in Prefect (%s); the work goes on", what, " ".join(repr(error).split()))
        return None


def run_flow(flow: Flow[..., Any], **parameters: Any) -> None:
    """Run a flow by hand: how it ends is what its body did, whether or not the server could be told.

    A server that goes away before the body begins is a ServiceError.
    """
    body, ended = flow.fn, list[BaseException | None]()

    @functools.wraps(body)
    def remembered(*args: Any, **named: Any) -> Any:
        try:
            result = body(*args, **named)
        except BaseException as error:
            ended.append(error)
            raise
        ended.append(None)
        return result

    # Prefect looks a parameter's type up by its name in the module of the function that it is given, which is this one
    remembered.__signature__ = inspect.signature(body, eval_str=True)  # type: ignore[attr-defined]
    flow.fn = remembered
    try:
        flow(**parameters)
    except httpx.HTTPError as error:
        url = get_current_settings().api.url
        if not ended:
            raise ServiceError(
                f"Prefect server at {url}: went away ({error!r}); run make up, then run again"
            ) from error
        if ended[0] is not None:
            raise ended[0] from None
        sys.stderr.write(f"Prefect server at {url}: away at the end ({error!r}); all that was to be made is made\n")
    finally:
        flow.fn = body
