"""``make deploy`` on a real server: pool, queue, automation, deployments, runs on the calendar; twice is once."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

from infra import deploy
from tests.free_ports import find_free
from tests.helpers.local_services import prefect_client, variables

PROJECT = Path(__file__).resolve().parents[1]
SCHEDULED_WITHIN_S = 150.0


def test_the_server_s_database_library_is_one_whose_scheduler_works() -> None:
    """With SQLAlchemy 2.1 the scheduler of Prefect 3.8 raises at its first deployment, and no cron run is made."""
    assert version("sqlalchemy").startswith("2.0.")
    assert "\nSQLAlchemy==2.0." in (PROJECT / "constraints.txt").read_text()


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Servers of this test's own."""
    found = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "PREFECT_", "WAV_"))}
    found |= find_free() | {"WAV_LOCAL_DIR": str(tmp_path / "local")}

    def services(command: str) -> None:
        argv = [sys.executable, "-m", "wav.local.services", command]
        subprocess.run(argv, cwd=PROJECT, env=found, check=True, capture_output=True)

    services("up")
    try:
        yield found | variables(found)
    finally:
        services("down")


@pytest.mark.integration
def test_make_up_on_other_ports_is_found_without_exporting_anything(tmp_path: Path) -> None:
    """Prefect reads its environment when it is imported; the address that ``make up`` left is found nevertheless."""
    (tmp_path / "env").write_text("PREFECT_API_URL=http://127.0.0.1:9/api\n")
    found = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "PREFECT_", "WAV_"))}
    command = [sys.executable, "-m", "infra.deploy"]
    done = subprocess.run(
        command,
        cwd=PROJECT,
        env=found | {"WAV_LOCAL_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "Prefect server at http://127.0.0.1:9/api (PREFECT_API_URL): not up" in done.stderr


@pytest.mark.long
def test_deploy_twice_is_once_and_retrain_is_on_the_calendar(environment: dict[str, str]) -> None:
    for _ in range(2):
        subprocess.run([sys.executable, "-m", "infra.deploy"], cwd=PROJECT, env=environment, check=True)
    names = sorted(entry["name"] for entry in yaml.safe_load((PROJECT / "prefect.yaml").read_text())["deployments"])
    with prefect_client(environment) as client:
        pool = client.read_work_pool(deploy.POOL)
        assert (pool.type, pool.concurrency_limit) == ("process", None)
        queues = [client.read_work_queue_by_name(name, work_pool_name=deploy.POOL) for name in deploy.QUEUES]
        assert [queue.concurrency_limit for queue in queues] == [1, None]
        assert len(client.read_automations_by_name(deploy.AUTOMATION)) == 1
        assert sorted(deployment.name for deployment in client.read_deployments()) == names
        deadline = time.monotonic() + SCHEDULED_WITHIN_S
        while not (runs := client.read_flow_runs()) and time.monotonic() < deadline:
            time.sleep(1)
        times = [run.expected_start_time for run in runs if run.expected_start_time is not None]
    assert times, "the scheduler made no run of retrain"
    assert all(moment > datetime.now(timezone.utc) for moment in times)
    assert {moment.strftime("%A %H:%M") for moment in times} == {"Sunday 02:00"}
