"""A flow run that lives is Running: its own process takes that back where the server took it for dead.

A server that was away, or could not be reached, for longer than the silence it allows marks every run as Crashed whose
heartbeats it could not hear (:mod:`infra.deploy`). Only the process of a run knows that it lives, and when it is over;
an automation knows neither, and would revive runs that have ended.
"""

from __future__ import annotations

import contextvars
import functools
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar
from uuid import UUID

from prefect import Flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import StateType
from prefect.context import FlowRunContext
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings
from prefect.states import Running

from flows import outage

P = ParamSpec("P")
R = TypeVar("R")
LOGGER = logging.getLogger("wav.lifeline")  # below wav, whose lines appear on the flow run
LOOK_EVERY_S = 15.0
#: a call that takes longer has no server; the end of a flow waits for the call in progress
CALL_S = 10.0
TAKEN_BACK = "It was taken for dead, and lives: its own process says so."


def take_back(client: SyncPrefectClient, run: UUID, over: threading.Event) -> bool:
    """Running again where the server says Crashed; any other state, a user's Cancelled above all, stays.

    Args:
        client: of the server.
        run: the flow run that this process executes.
        over: set as soon as the run may tell its own last state; nothing is said then.
    """
    state = client.read_flow_run(run).state
    if state is None or state.type != StateType.CRASHED or over.is_set():
        return False
    client.set_flow_run_state(run, Running(message=TAKEN_BACK), force=True)
    return True


def _look_after(run: UUID, over: threading.Event) -> None:
    """Every so often until ``over``; a server that is away is asked again the next time."""
    settings: dict[str, Any] = {"timeout": CALL_S}
    with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}), get_client(settings, sync_client=True) as client:
        while not over.wait(LOOK_EVERY_S):
            try:
                if take_back(client, run, over):
                    LOGGER.warning("the Prefect server took this run for dead (Crashed); it is Running again")
            except Exception as error:  # whatever is wrong with the server, or the run's record: the work goes on
                LOGGER.debug("the run's state could not be looked at: %r", error)


@contextmanager
def alive() -> Iterator[None]:
    """Look after the flow run that calls, in a thread that has ended before the block has.

    What comes after the block is the run's last state, which nothing may follow.
    """
    context = FlowRunContext.get()
    run = context.flow_run.id if context and context.flow_run else None
    if run is None:
        yield
        return
    over = threading.Event()
    # a thread begins without the context that holds Prefect's settings and the run to log to
    look = functools.partial(contextvars.copy_context().run, _look_after, run, over)
    thread = threading.Thread(target=look, name="lifeline", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def outlives(made: Flow[P, R]) -> Flow[P, R]:
    """A flow whose run is looked after while its body runs, and which remembers what the body raised.

    Prefect raises its own error instead where it cannot tell the server of the flow's (:func:`flows.outage.run_flow`).
    """
    body: Callable[P, R] = made.fn

    @functools.wraps(body)
    def kept(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            with alive():
                return body(*args, **kwargs)
        except BaseException as error:
            outage.LINK.own_error = error
            raise

    made.fn = kept  # not a decorator below @flow: a flow's version is the hash of the file that holds its function
    return made
