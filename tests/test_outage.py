"""The Prefect server goes away under a living run: what it makes does not depend on that, its last state is right."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import prefect.workers.base
import psutil
import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import StateType
from prefect.events.schemas.automations import EventTrigger
from prefect.states import Running

from flows import lifeline, outage
from flows.provenance import PARENT_VARIABLE
from flows.retrain import retrain
from infra import deploy, patient
from tests.kill_harness import Lab
from tests.test_cancel import alive, until
from tests.test_retrain import PROJECT, STAGE, Site, git, site  # noqa: F401 - a fixture
from wav.errors import DataError, ServiceError
from wav.local import read_env

#: until the automations have spoken after the server is back: a heartbeat, and the time its connection takes
SPOKEN_WITHIN_S = 90.0
#: a stage that tells its process and ends when it may
WAITER = """
import os, pathlib, time
with open(os.environ["STAGE_PIDS"], "a") as handle:
    handle.write(f"{os.getpid()}\\n")
while not pathlib.Path(os.environ["STAGE_MAY_END"]).exists():
    time.sleep(0.2)
"""


@pytest.fixture(autouse=True)
def link(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the process knows of its server, forgotten."""
    monkeypatch.setattr(outage, "LINK", outage._Link())


def refused() -> Any:
    raise httpx.ConnectError("refused")


def status_error(status: int) -> httpx.HTTPStatusError:
    request = httpx.Request("POST", "http://h/api")
    return httpx.HTTPStatusError(str(status), request=request, response=httpx.Response(status, request=request))


def test_a_server_that_is_away_is_left_alone_for_a_while_and_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[int] = []

    def gone() -> Any:
        calls.append(1)
        return refused()

    assert [outage.show("a bar", gone) for _ in range(5)] == [None] * 5
    assert len(calls) == 1
    assert outage.show("a table", lambda: "shown", wait=True) == "shown"
    assert outage.show("a bar", lambda: "moved") == "moved"
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert "the work goes on" in said[0]
    assert "back after" in said[1]


def test_what_the_server_refuses_does_not_count_as_an_outage(capsys: pytest.CaptureFixture[str]) -> None:
    def refuse() -> Any:
        raise status_error(422)

    assert outage.show("a table", refuse) is None
    assert outage.show("a bar", lambda: 1) == 1
    assert "not shown in Prefect (422)" in capsys.readouterr().err


def test_the_end_of_a_flow_counts_and_not_the_telling(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ServiceError, match="went away"):
        outage.run_flow(refused)

    def own_error() -> None:
        try:
            raise DataError("episode 3: truncated; collect it again")
        except DataError:
            refused()

    with pytest.raises(DataError, match="episode 3"):
        outage.run_flow(own_error)
    outage.LINK.work_done = True
    outage.run_flow(refused)
    assert "only the flow run's final state could not be told" in capsys.readouterr().err


def test_a_proxy_without_its_server_is_a_server_that_is_away() -> None:
    def say(status: int) -> None:
        raise status_error(status)

    with pytest.raises(ServiceError, match="went away"):
        outage.run_flow(lambda: say(503))
    with pytest.raises(httpx.HTTPStatusError, match="409"):
        outage.run_flow(lambda: say(409))
    outage.LINK.work_done = True
    outage.run_flow(lambda: say(502))


@pytest.mark.parametrize("state_told", [True, False])
def test_the_flow_s_own_error_is_not_lost_with_the_server(state_told: bool) -> None:
    """Whatever Prefect raises instead, and whether or not it does so while it handles the flow's error."""

    def run(error: BaseException) -> None:
        def body() -> None:
            raise error

        flow = lifeline.outlives(cast(Any, SimpleNamespace(fn=body)))
        try:
            flow.fn()
        except BaseException:
            if state_told:
                refused()
        refused()

    with pytest.raises(ServiceError, match=r"and before that the run failed: RuntimeError: CUDA out of memory; .*make"):
        outage.run_flow(lambda: run(RuntimeError("CUDA out of memory")))
    with pytest.raises(DataError, match="episode 3"):
        outage.run_flow(lambda: run(DataError("episode 3: truncated; collect it again")))
    with pytest.raises(ServiceError, match=r"went away \(ConnectError\('refused'\)\); run make up"):
        outage.run_flow(lambda: run(httpx.ReadError("reset")))
    outage.LINK.work_done = True  # Ctrl-C while the end waits for the server
    with pytest.raises(KeyboardInterrupt):
        outage.run_flow(lambda: run(KeyboardInterrupt()))


def test_only_a_worker_s_runs_wait_for_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WAV_WORKER", raising=False)
    monkeypatch.setenv(PARENT_VARIABLE, "a retrain by hand")
    assert outage.patience() == 0
    monkeypatch.setenv("WAV_WORKER", "1-2")
    assert outage.patience() == outage.PATIENCE_S


def test_the_worker_s_loop_does_not_end_with_its_server() -> None:
    """Prefect's own ends after so many failures in a row; errors that are not the server's still end it."""
    looks: list[int] = []
    said: list[str] = []

    async def look() -> None:
        looks.append(1)
        if len(looks) < 20:
            refused()

    async def twenty_looks() -> None:
        looked = patient.patient(look, said.append)
        for _ in range(21):
            await looked()

    asyncio.run(twenty_looks())
    assert len(said) == 2
    assert "away" in said[0]
    assert "is back" in said[1]

    async def denied() -> None:
        raise status_error(403)

    with pytest.raises(httpx.HTTPStatusError):
        asyncio.run(patient.patient_loop(denied, 0.01))
    assert prefect.workers.base.critical_service_loop is patient.critical_service_loop


@pytest.fixture
def server(site: Site) -> Lab:  # noqa: F811
    """The site's servers, to be killed and started again."""
    return Lab(Path(site.environment["WAV_LOCAL_DIR"]).parent, site.environment)


@pytest.fixture
def worker(site: Site, tmp_path: Path) -> Iterator[dict[str, str]]:  # noqa: F811
    """Environment of a worker whose own client gives up at once, so that Prefect's would be gone after 45 s."""
    (site.folder / "stage.py").write_text(WAITER + STAGE)
    git(site.folder, "commit", "-qam", "a stage that waits", "--allow-empty")
    environment = site.environment | read_env(Path(site.environment["WAV_LOCAL_DIR"]) / "env")
    environment |= {
        "WAV_WORKSPACE": str(site.folder),
        "STAGE_PIDS": str(tmp_path / "pids"),
        "STAGE_MAY_END": str(tmp_path / "may-end"),
    }
    subprocess.run([sys.executable, "-m", "infra.deploy"], cwd=PROJECT, env=environment, check=True)
    hasty = {"PREFECT_WORKER_QUERY_SECONDS": "1", "PREFECT_CLIENT_MAX_RETRIES": "0"}
    with (tmp_path / "worker.log").open("w") as log:
        command = [sys.executable, "-m", "infra.deploy", "worker"]
        process = subprocess.Popen(command, cwd=PROJECT, env=environment | hasty, stdout=log, stderr=log)
        try:
            yield environment
            assert process.poll() is None, "the worker ended with its server"
        finally:
            process.terminate()
            process.wait(60)


@pytest.mark.long
@pytest.mark.parametrize(("away_s", "rate"), [(5.0, "11"), (deploy.SILENT_SECONDS + 15.0, "12")])
def test_a_living_run_outlives_its_server(
    away_s: float,
    rate: str,
    site: Site,  # noqa: F811
    worker: dict[str, str],
    server: Lab,
    record_property: Callable[[str, Any], None],
) -> None:
    """Restarted at once or after longer than the silence: the same processes end the run, once, as Completed."""
    site.rate(rate)  # else DVC would have the stage's output
    pids = Path(worker["STAGE_PIDS"])
    with SyncPrefectClient(worker["PREFECT_API_URL"]) as client:
        run = client.create_flow_run_from_deployment(client.read_deployment_by_name("retrain/retrain").id)

        def names() -> list[str | None]:
            return [state.name for state in client.read_flow_run_states(run.id)]

        until(pids.is_file, 240)
        stage = psutil.Process(int(pids.read_text()))
        server.service("prefect").kill()
        time.sleep(away_s)
        server.services("up")
        if away_s > deploy.SILENT_SECONDS:
            until(lambda: "Crashed" in names(), SPOKEN_WITHIN_S)
        seconds = until(lambda: names()[-1] == "Running", SPOKEN_WITHIN_S)
        record_property("running_again_after_s", round(seconds, 1))
        assert alive(stage)
        Path(worker["STAGE_MAY_END"]).touch()
        until(lambda: names()[-1] != "Running", 120)
        record_property("states", ", ".join(map(str, names())))
        assert names()[-1] == "Completed"
        assert len(pids.read_text().split()) == 1, "a second copy was started"


#: heartbeats of two runs that end with the process that sends them; sent and handled before it does
BEATS = """
import sys
from prefect.events import emit_event
from prefect.events.worker import EventsWorker
for run in sys.argv[1:]:
    emit_event("prefect.flow-run.heartbeat", resource={"prefect.resource.id": f"prefect.flow-run.{run}"})
EventsWorker.instance().drain()
"""


@pytest.mark.long
def test_a_run_that_dies_while_the_server_is_away_is_found(site: Site, server: Lab) -> None:  # noqa: F811
    """Also after Prefect's minute: else it would stay Running and keep the only slot of the pool for ever."""
    environment = site.environment | read_env(Path(site.environment["WAV_LOCAL_DIR"]) / "env")
    allowed_s, forgotten_after_s = 20.0, 60.0
    wanted = deploy.automation()
    assert isinstance(wanted.trigger, EventTrigger)
    wanted.trigger.within = timedelta(seconds=allowed_s)
    with SyncPrefectClient(environment["PREFECT_API_URL"]) as client:
        deploy.make_automation(client, wanted)
        time.sleep(6)  # the server reads its automations every five seconds
        runs = [client.create_flow_run(retrain, state=Running()).id for _ in range(2)]
        subprocess.run([sys.executable, "-c", BEATS, *map(str, runs)], env=environment, check=True)
        time.sleep(3)
        server.service("prefect").kill()
        time.sleep(allowed_s + forgotten_after_s + 5)
        server.services("up")
        until(lambda: all(client.read_flow_run(run).state_type == StateType.CRASHED for run in runs), 60)
