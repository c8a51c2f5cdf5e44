"""The worker's process: a signal ends what it started, stubborn or not; killed, it takes the worker with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace
from unittest.mock import MagicMock
from uuid import UUID, uuid4

import pytest
from httpx import ConnectError
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import State
from prefect.states import Completed, Running

from infra import deploy, worker
from infra.worker import FLOW_RUN, HEALTH_PORT, ask
from tests.test_processes import FAMILY, gone
from wav.processes import WORKER_MARK, marked

SUPERVISE = """
import sys
from infra import worker
worker.GRACE_S = float(sys.argv[1])
raise SystemExit(worker.supervise([sys.executable, "-c", *sys.argv[2:]], "."))
"""


def start(code: str, *arguments: str, grace_s: float = 10.0) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SUPERVISE, str(grace_s), code, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_worker_and_runs(number: signal.Signals) -> None:
    supervisor = start(FAMILY)
    assert supervisor.stdout is not None
    pids = [int(pid) for pid in supervisor.stdout.readline().split()]
    began = time.monotonic()
    supervisor.send_signal(number)
    assert supervisor.wait(10) == 0
    assert time.monotonic() - began < 5
    assert all(gone(pid, 0.1) for pid in pids)


def test_what_ignores_the_signal_is_killed() -> None:
    supervisor = start(FAMILY, "stubborn", grace_s=0.5)
    assert supervisor.stdout is not None
    pids = [int(pid) for pid in supervisor.stdout.readline().split()]
    supervisor.terminate()
    assert supervisor.wait(10) == 0
    assert all(gone(pid, 0.1) for pid in pids)


def test_the_workers_own_end_is_passed_on() -> None:
    supervisor = start("import os; print(os.environ['WAV_WORKER']); raise SystemExit(3)")
    mark = supervisor.communicate(timeout=20)[0].strip()
    assert supervisor.returncode == 3
    assert mark
    assert not marked("WAV_WORKER", mark)


def test_killed_it_takes_the_worker_with_it() -> None:
    supervisor = start(FAMILY)
    assert supervisor.stdout is not None
    worker, child = (int(pid) for pid in supervisor.stdout.readline().split())
    supervisor.kill()
    supervisor.wait()
    assert gone(worker)
    os.kill(child, signal.SIGKILL)  # a flow run would have noticed by itself (flows/__init__.py); this one sleeps


def test_a_stopped_workers_runs_are_told_to_prefect(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own and the stages' of a retrain, but none that has ended; else they would hold their places in the queue."""
    retrain, mark = uuid4(), f"test-{os.getpid()}"
    environment = {**os.environ, WORKER_MARK: mark, FLOW_RUN: str(retrain)}
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], env=environment)
    stage, ended, told = uuid4(), uuid4(), dict[UUID, str]()

    class Client(MagicMock):
        def __enter__(self) -> Client:
            return self

        def read_flow_runs(self, flow_run_filter: FlowRunFilter) -> list[SimpleNamespace]:
            if flow_run_filter.id:
                return [SimpleNamespace(id=run, state=Running()) for run in flow_run_filter.id.any_ or ()]
            assert flow_run_filter.tags is not None
            assert flow_run_filter.tags.any_ == [f"retrain:{retrain}"]
            return [SimpleNamespace(id=stage, state=Running()), SimpleNamespace(id=ended, state=Completed())]

        def set_flow_run_state(self, run: UUID, state: State, force: bool) -> None:
            told[run] = f"{state.name} {force}"

    monkeypatch.setattr("prefect.client.orchestration.get_client", lambda sync_client: Client())
    worker.end(process, mark)  # type: ignore[arg-type]
    assert told == {retrain: "Crashed True", stage: "Crashed True"}


def test_a_server_that_is_away_is_no_reason_to_fail(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("prefect.client.orchestration.get_client", MagicMock(side_effect=ConnectError("refused")))
    worker.crashed({uuid4()})
    assert capsys.readouterr().err.startswith("worker: Prefect could not be told that its runs have ended (refused)")


@pytest.mark.parametrize("status", [200, 503])
def test_a_worker_is_asked_for_its_health_beside_a_proxy(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class Worker(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with HTTPServer(("127.0.0.1", 0), Worker) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        assert ask(server.server_port) == (status != 200)
    with pytest.raises(ConnectionRefusedError):
        ask(server.server_port)


def test_the_port_of_its_health_is_this_machine_s_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[str, ...]] = []
    for name in ("begin_process", "require_services", "get_client"):
        monkeypatch.setattr(deploy, name, MagicMock())
    monkeypatch.setattr(deploy, "supervise", lambda command, cwd: started.append(tuple(command)) or 0)
    monkeypatch.setenv("PREFECT_WORKER_WEBSERVER_HOST", "0.0.0.0")
    monkeypatch.setenv("PREFECT_WORKER_WEBSERVER_PORT", "80")
    assert deploy.main(["worker"]) == deploy.main(["worker", "--healthcheck"]) == 0
    assert ["--with-healthcheck" in command for command in started] == [False, True]
    assert os.environ["PREFECT_WORKER_WEBSERVER_HOST"] == "127.0.0.1"
    assert os.environ["PREFECT_WORKER_WEBSERVER_PORT"] == str(HEALTH_PORT)
