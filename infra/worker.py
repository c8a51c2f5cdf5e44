"""A worker of the work pool that takes its flow runs with it: what ``python -m infra.deploy worker`` runs.

On SIGTERM Prefect's worker stops looking for work and lets its flow runs go on, so that a stopped service would leave
a training behind. The process here starts Prefect's worker and, on SIGTERM, SIGINT or SIGHUP, ends it and every flow
run with all their processes: first SIGTERM (a training saves what it can), then SIGKILL; and it tells Prefect that
these runs crashed, which would else hold their places in the queue until their heartbeat is missed. Should this process
itself be killed, the kernel ends the worker, and the flow runs notice (:func:`flows.common.begin_process`).

``python -m infra.worker`` asks a worker that was started with ``--healthcheck`` whether it still looks for work.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType
from uuid import UUID

import psutil

from wav.processes import WORKER_MARK, guarded, marked, stop

GRACE_S = 15.0
HEALTH_PORT = 8080
#: where Prefect's worker answers for its health; unless they are set, on every address of the machine
HEALTH_VARIABLES = {"PREFECT_WORKER_WEBSERVER_HOST": "127.0.0.1", "PREFECT_WORKER_WEBSERVER_PORT": str(HEALTH_PORT)}
#: Prefect's variable of the process that runs a flow
FLOW_RUN = "PREFECT__FLOW_RUN_ID"
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class _StopError(Exception):
    """A signal asked this process to end."""


def _raise(number: int, frame: FrameType | None) -> None:
    raise _StopError


def supervise(command: Sequence[str], cwd: str) -> int:
    """Run a worker until it ends or a signal comes, of which nothing is left; its status, 0 where a signal ended it."""
    mark = f"{os.getpid()}-{time.time_ns()}"
    for number in SIGNALS:
        signal.signal(number, _raise)
    process: subprocess.Popen[bytes] | None = None
    try:
        process = subprocess.Popen(
            guarded(command), cwd=cwd, env={**os.environ, WORKER_MARK: mark}, start_new_session=True
        )
        return process.wait()
    except _StopError:
        return 0
    finally:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        if process is not None:
            end(process, mark)


def end(process: subprocess.Popen[bytes], mark: str) -> None:
    """End a worker and everything that carries its mark.

    The worker comes first, so that it takes no further run, then its flow runs, which end what they started.
    """
    runs = flow_runs(mark)
    first: list[psutil.Process] = []
    with contextlib.suppress(psutil.Error):
        worker = psutil.Process(process.pid)
        first = [worker, *worker.children()]
    stop(first, GRACE_S, lambda: marked(WORKER_MARK, mark))
    process.wait()
    if runs:
        crashed(runs)


def flow_runs(mark: str) -> set[UUID]:
    """Flow runs of Prefect's that processes with this mark run."""
    found = set()
    for process in marked(WORKER_MARK, mark):
        with contextlib.suppress(psutil.Error):
            found |= {UUID(value) for name, value in process.environ().items() if name == FLOW_RUN and value}
    return found


def crashed(runs: set[UUID]) -> None:
    """Tell Prefect that ``runs``, and the stages' runs that retrains among them started, have ended."""
    from httpx import HTTPError
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId, FlowRunFilterTags
    from prefect.exceptions import PrefectException
    from prefect.states import Crashed

    from flows.provenance import retrain_tag

    stages = FlowRunFilterTags(any_=[retrain_tag(str(run)) for run in runs])
    theirs = FlowRunFilter(id=FlowRunFilterId(any_=list(runs))), FlowRunFilter(tags=stages)
    try:
        with get_client(sync_client=True) as client:
            found = [run for which in theirs for run in client.read_flow_runs(flow_run_filter=which)]
            for run in found:
                if run.state is None or not run.state.is_final():
                    client.set_flow_run_state(run.id, Crashed(message="its worker was stopped"), force=True)
    except (HTTPError, PrefectException) as error:
        sys.stderr.write(f"worker: Prefect could not be told that its runs have ended ({error}); it will see\n")


def ask(port: int = HEALTH_PORT) -> int:
    """0 where the worker of this machine says that it is well; OSError where it says nothing."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    connection.request("GET", "/health")
    return int(connection.getresponse().status != http.client.OK)


if __name__ == "__main__":
    raise SystemExit(ask())
