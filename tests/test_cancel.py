"""A retrain that is cancelled in Prefect: worker, flow run, ``dvc repro`` and its stage, all real; the stage sleeps."""

from __future__ import annotations

import itertools
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.states import Cancelling

from tests.helpers.local_services import prefect_client, variables
from tests.test_retrain import PROJECT, Site, git, site  # noqa: F401 - a fixture

pytestmark = pytest.mark.long
STARTED_WITHIN_S, GONE_WITHIN_S, SAID_WITHIN_S = 240.0, 5.0, 60.0
#: a stage with a child of its own, both of which ignore a polite request to end
SLEEPER = """
import os, pathlib, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(900)"])  # inherits that
pathlib.Path(os.environ["SLEEPER_PIDS"]).write_text(f"{os.getpid()} {child.pid}")
time.sleep(900)
"""


@pytest.fixture
def worker(site: Site, tmp_path: Path) -> Iterator[dict[str, str]]:  # noqa: F811
    """Environment of a worker that runs this project's deployments on the sleeping pipeline."""
    (site.folder / "stage.py").write_text(SLEEPER)
    git(site.folder, "commit", "-qam", "a stage that sleeps")
    environment = site.environment | variables(site.environment)
    environment |= {"WAV_WORKSPACE": str(site.folder), "SLEEPER_PIDS": str(tmp_path / "pids")}
    subprocess.run([sys.executable, "-m", "infra.deploy"], cwd=PROJECT, env=environment, check=True)
    with (tmp_path / "worker.log").open("w") as log:
        command = [sys.executable, "-m", "infra.deploy", "worker"]
        process = subprocess.Popen(command, cwd=PROJECT, env=environment, stdout=log, stderr=log)
        try:
            yield environment
        finally:
            process.terminate()
            process.wait(60)


def until(condition: Callable[[], Any], seconds: float) -> float:
    """Seconds until ``condition`` holds; fails after ``seconds``."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, condition
        time.sleep(0.1)
    return time.monotonic() - began


def alive(process: psutil.Process) -> bool:
    """Whether a process runs; one that has ended and was not asked for its status does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_cancelling_ends_every_process_within_five_seconds(
    worker: dict[str, str], record_property: Callable[[str, Any], None]
) -> None:
    pids = Path(worker["SLEEPER_PIDS"])
    with prefect_client(worker) as client:
        deployment = client.read_deployment_by_name("retrain/retrain")
        run: FlowRun = client.create_flow_run_from_deployment(deployment.id)
        until(lambda: pids.is_file() and len(pids.read_text().split()) == 2, STARTED_WITHIN_S)
        stage = psutil.Process(int(pids.read_text().split()[0]))
        above = itertools.takewhile(lambda parent: "worker" not in parent.cmdline(), stage.parents())
        *between, flow_run = above
        assert "prefect.engine" in flow_run.cmdline()
        group = [stage, *stage.children(), *between]
        assert any("dvc" in process.cmdline() for process in group)
        client.set_flow_run_state(run.id, Cancelling(), force=True)
        seconds = until(lambda: not any(map(alive, group)), GONE_WITHIN_S)
        record_property("group_gone_after_s", round(seconds, 1))
        seconds += until(lambda: not alive(flow_run), SAID_WITHIN_S)
        record_property("flow_run_gone_after_s", round(seconds, 1))
        until(lambda: client.read_flow_run(run.id).state_type == StateType.CANCELLED, SAID_WITHIN_S)
