"""A run by hand and its Prefect server: how it ends is what the server says in the end, whatever it said before."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from uuid import UUID, uuid4

import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import StateType
from prefect.events.schemas.automations import EventTrigger
from prefect.states import Cancelled, Crashed, State

from flows import lifeline
from infra import deploy
from tests.kill_harness import Lab
from tests.test_cancel import until
from tests.test_outage import server  # noqa: F401 - a fixture
from tests.test_retrain import Site, site  # noqa: F401 - a fixture
from wav.local import read_env

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


class Recorded:
    """A Prefect client that knows one run."""

    def __init__(self, state: StateType) -> None:
        self.state = state
        self.told: list[StateType] = []

    def read_flow_run(self, run: UUID) -> Any:
        return SimpleNamespace(state=State(type=self.state))

    def set_flow_run_state(self, run: UUID, state: State, force: bool) -> None:
        self.told.append(state.type)


def test_a_living_run_takes_back_that_it_crashed_and_nothing_else() -> None:
    over, run = threading.Event(), uuid4()
    for state in StateType:
        client = Recorded(state)
        lifeline.take_back(cast(Any, client), run, over)
        assert client.told == ([StateType.RUNNING] if state == StateType.CRASHED else [])
    over.set()
    client = Recorded(StateType.CRASHED)
    assert not lifeline.take_back(cast(Any, client), run, over)
    assert client.told == []


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
    server: Lab,  # noqa: F811
    record_property: Callable[[str, Any], None],
) -> None:
    """Started by hand; the server dies under it and stays away: exit status 0, one line, and no bar held it up."""
    flow = by_hand()
    server.service("prefect").kill()
    until(lambda: "the work goes on" in flow.log.read_text(), 60)
    time.sleep(20)  # longer than the pause after which the server is tried again
    began = time.monotonic()
    assert flow.end(400) == 0, flow.log.read_text()[-4000:]
    record_property("ended_within_s", round(time.monotonic() - began, 1))
    text = flow.log.read_text()
    slowest = float(text.partition("slowest ")[2].split()[0])
    record_property("slowest_bar_s", slowest)
    assert slowest < 5
    assert "only the flow run's final state could not be told" in text
    assert (site.folder / "reports" / "stages" / "export.json").is_file()
    command = [sys.executable, "outage_flow.py"]
    done = subprocess.run(command, cwd=site.folder, env=site.environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "not up" in done.stderr.splitlines()[-1]


@pytest.mark.long
def test_a_failure_and_ctrl_c_are_what_they_are_without_the_server(
    by_hand: Callable[..., Started],
    server: Lab,  # noqa: F811
) -> None:
    for fails, status, line in (
        (True, 1, "Prefect server at"),
        (False, 130, "interrupted; dvc repro continues"),
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
        text = flow.log.read_text()  # Prefect's lines, which it could not send, may follow
        said = [one for one in text.splitlines() if one.startswith(line)][-1]
        assert ("and before that the run failed: RuntimeError: CUDA out of memory" in said) == fails


@pytest.mark.long
def test_a_living_run_is_running_until_it_says_how_it_ended(
    site: Site,  # noqa: F811
    by_hand: Callable[..., Started],
    server: Lab,  # noqa: F811
    record_property: Callable[[str, Any], None],
) -> None:
    """Said to have crashed by the user and by the automation; cancelled; and ended right after an outage."""
    environment = site.environment | read_env(Path(site.environment["WAV_LOCAL_DIR"]) / "env")
    noticed_s, silence_s = lifeline.LOOK_EVERY_S + 10, 20.0
    with SyncPrefectClient(environment["PREFECT_API_URL"]) as client:

        def run_of(flow: Started) -> UUID:
            return UUID(flow.log.read_text().partition("/runs/flow-run/")[2][:36])

        def names(run: UUID) -> list[str | None]:
            return [state.name for state in client.read_flow_run_states(run)]

        flow = by_hand()
        run = run_of(flow)
        client.set_flow_run_state(run, Crashed(), force=True)
        seconds = until(lambda: names(run)[-1] == "Running", noticed_s)
        record_property("running_again_after_s", round(seconds, 1))
        client.set_flow_run_state(run, Crashed(), force=True)
        client.set_flow_run_state(run, Cancelled(), force=True)
        time.sleep(noticed_s)
        assert names(run)[-2:] == ["Crashed", "Cancelled"]
        assert flow.process.poll() is None
        flow.process.kill()  # which is what a worker does

        wanted = deploy.automation()
        assert isinstance(wanted.trigger, EventTrigger)
        wanted.trigger.within = timedelta(seconds=silence_s)  # shorter than the time between two heartbeats
        deploy.make_automation(client, wanted)
        time.sleep(6)  # the server reads its automations every five seconds
        flow = by_hand(PREFECT_FLOWS_HEARTBEAT_FREQUENCY="30")
        run = run_of(flow)
        until(lambda: names(run)[-2:] == ["Crashed", "Running"], silence_s + 2 * noticed_s)
        until(lambda: names(run).count("Crashed") == 2, 60 + silence_s)  # a later heartbeat was waited for again
        server.service("prefect").kill()
        time.sleep(silence_s + 15)
        server.services("up")
        assert flow.end() == 0, flow.log.read_text()[-4000:]
        assert names(run)[-1] == "Completed"
        time.sleep(silence_s + noticed_s)
        record_property("states", ", ".join(map(str, names(run))))
        assert names(run)[-1] == "Completed"
        assert names(run).count("Completed") == 1
