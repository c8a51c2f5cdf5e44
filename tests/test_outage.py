"""The Prefect server goes away under a run: what the run makes and how it ends does not depend on that."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from uuid import UUID

import httpx
import psutil
import pytest
from prefect.client.schemas.objects import StateType
from prefect.events.schemas.automations import EventTrigger
from prefect.states import Running

from flows.common import _OneLineErrors
from flows.retrain import retrain
from flows.server import run_flow
from infra import deploy
from tests.helpers.kill_harness import Lab
from tests.helpers.local_services import prefect_client, variables
from tests.test_cancel import alive, until
from tests.test_retrain import PROJECT, STAGE, Site, git, site  # noqa: F401 - a fixture
from wav.errors import DataError, ServiceError

#: a stage that tells its process and ends when it may
WAITER = """
import os, pathlib, time
with open(os.environ["STAGE_PIDS"], "a") as handle:
    handle.write(f"{os.getpid()}\\n")
while not pathlib.Path(os.environ["STAGE_MAY_END"]).exists():
    time.sleep(0.2)
"""


#: a stage's flow that moves its bar until it may end, and says how long the bar held it up
FLOW = """
import pathlib, time
import flows  # before prefect, as in python -m flows.export
from prefect import flow
from flows.artifacts import Progress
from flows.common import finish, main, start, step

@step("work")
def work(run):
    slowest, done = 0.0, 0
    with Progress("work", run.logger) as progress:
        print("working", flush=True)
        while not pathlib.Path("may-end").exists():
            began, done = time.monotonic(), done + 1
            progress(done, 10**6)
            slowest = max(slowest, time.monotonic() - began)
            time.sleep(0.5)
    print(f"slowest {slowest:.2f}", flush=True)
    if pathlib.Path("must-fail").exists():
        raise RuntimeError("CUDA out of memory")

@flow(name="export")
def export(workspace="."):
    run = start("export", workspace)
    work(run)
    finish(run, [])

if __name__ == "__main__":
    raise SystemExit(main(export))
"""


class FakeFlow(SimpleNamespace):
    """A flow whose server is gone when the last state is to be told, or before the first."""

    def __call__(self, begins: bool = True) -> None:
        if begins:
            try:
                self.fn()
            except BaseException:
                raise httpx.ConnectError("refused") from None
        raise httpx.ConnectError("refused")


def fake(error: BaseException | None = None) -> Any:
    """A flow whose body does nothing, or fails."""

    def body() -> None:
        if error is not None:
            raise error

    return cast(Any, FakeFlow(fn=body))


@pytest.mark.parametrize("error", [DataError("episode 3: truncated"), RuntimeError("CUDA"), KeyboardInterrupt()])
def test_a_flow_fails_with_its_own_error_when_the_server_died(error: BaseException) -> None:
    with pytest.raises(type(error)) as found:
        run_flow(fake(error))
    assert found.value is error


@pytest.mark.parametrize(
    ("error", "traced"), [(DataError("a"), False), (PermissionError(13, "no", "/x"), False), (OSError(5, "no"), True)]
)
def test_only_a_fault_of_the_code_is_logged_with_its_traceback(error: Exception, traced: bool) -> None:
    """As the commands tell it: what the system says of a file is none."""
    record = logging.LogRecord("prefect.flow_runs", logging.ERROR, "", 0, "%s", (error,), (type(error), error, None))
    assert _OneLineErrors().filter(record)
    assert bool(record.exc_info) is traced


def test_a_flow_that_made_everything_ends_well_when_the_server_died(capsys: pytest.CaptureFixture[str]) -> None:
    flow = fake()
    body = flow.fn
    run_flow(flow)
    assert "all that was to be made is made" in capsys.readouterr().err
    assert flow.fn is body
    with pytest.raises(ServiceError, match=r"went away \(ConnectError\('refused'\)\); run make up"):
        run_flow(flow, begins=False)


@pytest.fixture
def server(site: Site) -> Lab:  # noqa: F811
    """The site's servers, to be killed and started again."""
    return Lab(Path(site.environment["WAV_LOCAL_DIR"]).parent, site.environment)


@pytest.fixture
def worker(site: Site, tmp_path: Path) -> Iterator[dict[str, str]]:  # noqa: F811
    """Environment of a worker; the worker outlives the test."""
    (site.folder / "stage.py").write_text(WAITER + STAGE)
    git(site.folder, "commit", "-qam", "a stage that waits", "--allow-empty")
    environment = site.environment | variables(site.environment)
    environment |= {
        "WAV_WORKSPACE": str(site.folder),
        "STAGE_PIDS": str(tmp_path / "pids"),
        "STAGE_MAY_END": str(tmp_path / "may-end"),
    }
    subprocess.run([sys.executable, "-m", "infra.deploy"], cwd=PROJECT, env=environment, check=True)
    with (tmp_path / "worker.log").open("w") as log:
        command = [sys.executable, "-m", "infra.deploy", "worker"]
        process = subprocess.Popen(command, cwd=PROJECT, env=environment, stdout=log, stderr=log)
        try:
            yield environment
            assert process.poll() is None, "the worker ended with its server"
        finally:
            process.terminate()
            process.wait(60)


class Started:
    """A stage's flow started by hand, whose bar moves until it may end."""

    def __init__(self, site: Site, log: Path, **variables: str) -> None:  # noqa: F811
        self.folder, self.log = site.folder, log
        (self.folder / "outage_flow.py").write_text(FLOW)
        self.clean()
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "outage_flow.py"],
                cwd=site.folder,
                env=site.environment | variables,
                stdout=output,
                stderr=output,
            )
        until(lambda: "working" in log.read_text(), 60)

    def clean(self) -> None:
        """Nothing says that it may end, or how."""
        for name in ("may-end", "must-fail"):
            (self.folder / name).unlink(missing_ok=True)

    def end(self, seconds: float = 60.0) -> int:
        """Let it end; its exit status."""
        (self.folder / "may-end").touch()
        return self.process.wait(seconds)


@pytest.fixture
def by_hand(site: Site, tmp_path: Path, server: Lab) -> Iterator[Callable[..., Started]]:  # noqa: F811
    """Starts such a flow; afterwards it is gone and the server there."""
    started: list[Started] = []

    def start(**variables: str) -> Started:
        started.append(Started(site, tmp_path / f"log-{len(started)}", **variables))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.wait()
        one.clean()
    (site.folder / "outage_flow.py").unlink(missing_ok=True)
    server.services("up")


@pytest.mark.long
def test_a_stage_ends_well_without_the_server(
    site: Site,  # noqa: F811
    by_hand: Callable[..., Started],
    server: Lab,
    record_property: Callable[[str, Any], None],
) -> None:
    """Started by hand; the server dies under it and stays away: exit status 0, one line, and no bar held it up."""
    flow = by_hand()
    server.service("prefect").kill()
    until(lambda: "the work goes on" in flow.log.read_text(), 60)
    began = time.monotonic()
    assert flow.end(400) == 0, flow.log.read_text()[-4000:]
    record_property("ended_within_s", round(time.monotonic() - began, 1))
    text = flow.log.read_text()
    slowest = float(text.partition("slowest ")[2].split()[0])
    record_property("slowest_bar_s", slowest)
    assert slowest < 5
    assert "all that was to be made is made" in text
    assert (site.folder / "reports" / "stages" / "export.json").is_file()
    command = [sys.executable, "outage_flow.py"]
    done = subprocess.run(command, cwd=site.folder, env=site.environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "not up" in done.stderr.splitlines()[-1]


@pytest.mark.long
def test_a_failure_and_ctrl_c_are_what_they_are_without_the_server(
    by_hand: Callable[..., Started],
    server: Lab,
) -> None:
    for fails, status, line in (
        (True, 1, "RuntimeError: CUDA out of memory"),
        (False, 130, "interrupted; run it again"),
    ):
        server.services("up")
        flow = by_hand(PREFECT_CLIENT_MAX_RETRIES="0")  # else Prefect tries for a minute
        server.service("prefect").kill()
        if fails:
            (flow.folder / "must-fail").touch()
            ended = flow.end()
        else:
            flow.process.send_signal(signal.SIGINT)
            ended = flow.process.wait(60)  # by that alone: it may not end otherwise
        assert ended == status, flow.log.read_text()[-4000:]
        assert any(one.startswith(line) for one in flow.log.read_text().splitlines())


@pytest.mark.long
def test_a_worker_s_run_outlives_a_restart_of_the_server(
    site: Site,  # noqa: F811
    worker: dict[str, str],
    server: Lab,
    record_property: Callable[[str, Any], None],
) -> None:
    """The same processes end the run, once, as Completed."""
    site.rate("11")  # else DVC would have the stage's output
    pids = Path(worker["STAGE_PIDS"])
    with prefect_client(worker) as client:
        run = client.create_flow_run_from_deployment(client.read_deployment_by_name("retrain/retrain").id)

        def names() -> list[str | None]:
            return [state.name for state in client.read_flow_run_states(run.id)]

        until(pids.is_file, 240)
        stage = psutil.Process(int(pids.read_text()))
        server.service("prefect").kill()
        time.sleep(5)
        server.services("up")
        assert alive(stage)
        Path(worker["STAGE_MAY_END"]).touch()
        until(lambda: names()[-1] != "Running", 180)
        record_property("states", ", ".join(map(str, names())))
        assert names()[-1] == "Completed"
        assert len(pids.read_text().split()) == 1, "a second copy was started"


@pytest.mark.long
def test_a_living_run_that_was_taken_for_dead_ends_well(
    site: Site,  # noqa: F811
    by_hand: Callable[..., Started],
    server: Lab,
    record_property: Callable[[str, Any], None],
) -> None:
    """Away for longer than the automation allows: the server says Crashed, the run goes on and ends with status 0."""
    allowed_s = 20.0
    environment = site.environment | variables(site.environment)
    with prefect_client(environment) as client:
        wanted = deploy.automation()
        assert isinstance(wanted.trigger, EventTrigger)
        wanted.trigger.within = timedelta(seconds=allowed_s)
        deploy.make_automation(client, wanted)
        time.sleep(6)  # the server reads its automations every five seconds
        flow = by_hand(PREFECT_FLOWS_HEARTBEAT_FREQUENCY="30")
        run = UUID(flow.log.read_text().partition("/runs/flow-run/")[2][:36])

        def names() -> list[str | None]:
            return [state.name for state in client.read_flow_run_states(run)]

        server.service("prefect").kill()
        time.sleep(allowed_s + 15)
        server.services("up")
        until(lambda: names()[-1] == "Crashed", 60)
        assert flow.process.poll() is None
        assert flow.end() == 0, flow.log.read_text()[-4000:]
        record_property("states", ", ".join(map(str, names())))


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
    environment = site.environment | variables(site.environment)
    allowed_s, forgotten_after_s = 20.0, 60.0
    wanted = deploy.automation()
    assert isinstance(wanted.trigger, EventTrigger)
    wanted.trigger.within = timedelta(seconds=allowed_s)
    with prefect_client(environment) as client:
        deploy.make_automation(client, wanted)
        time.sleep(6)  # the server reads its automations every five seconds
        runs = [client.create_flow_run(retrain, state=Running()).id for _ in range(2)]
        subprocess.run([sys.executable, "-c", BEATS, *map(str, runs)], env=environment, check=True)
        time.sleep(3)
        server.service("prefect").kill()
        time.sleep(allowed_s + forgotten_after_s + 5)
        server.services("up")
        until(lambda: all(client.read_flow_run(run).state_type == StateType.CRASHED for run in runs), 60)
