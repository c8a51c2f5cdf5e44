"""Jobs on a Dask cluster of real processes, and what becomes of them when processes go."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.helpers.cluster_jobs import begin_and_wait, child_and_wait, leave
from wav.cluster import Cluster, describe, open_cluster
from wav.errors import ConfigError, ServiceError
from wav.local import PROJECT
from wav.processes import Child, Group

pytestmark = pytest.mark.integration

needs_dask = pytest.mark.skipif(importlib.util.find_spec("distributed") is None, reason="distributed is not installed")
PLAIN = ("--nthreads", "1", "--memory-limit", "0")
WAIT_S = 300.0


def until(found: Callable[[], Any], what: str) -> Any:
    """What ``found`` gives once it gives something."""
    deadline = time.monotonic() + WAIT_S
    while not (value := found()):
        assert time.monotonic() < deadline, what
        time.sleep(0.05)
    return value


class Processes:
    """A scheduler on a port of its own and workers, all ended with the test."""

    def __init__(self, group: Group, port: int) -> None:
        self.group, self.port, self.address = group, port, f"tcp://127.0.0.1:{port}"
        self.scheduler = self.start_scheduler()

    def start(self, module: str, *options: str, project: Path = PROJECT) -> Child:
        command = [sys.executable, "-m", f"distributed.cli.{module}", *options, "--host", "127.0.0.1", "--no-dashboard"]
        return self.group.start(command, env={**os.environ, "PYTHONPATH": str(project)}, cwd=project)

    def start_scheduler(self) -> Child:
        return self.start("dask_scheduler", "--port", str(self.port))

    def worker(self, *options: str, project: Path = PROJECT) -> Child:
        return self.start("dask_worker", self.address, "--no-nanny", *(options or PLAIN), project=project)


@pytest.fixture
def processes() -> Iterator[Processes]:
    with Group("dask", grace_s=0.2) as group:
        yield Processes(group, _port())


def _port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class Running(threading.Thread):
    """A cluster's jobs, gone through in a thread."""

    def __init__(self, cluster: Cluster, function: Callable[..., Any], jobs: list[tuple[Any, ...]], **options: Any):
        super().__init__(daemon=True)
        self.outcomes: dict[int, Any] = {}
        self._through = cluster.mapper(**options)(function, jobs, 0)
        self.start()

    def run(self) -> None:
        for index, outcome in self._through:
            self.outcomes[index] = outcome

    def end(self) -> dict[int, Any]:
        self.join(WAIT_S)
        assert not self.is_alive()
        return self.outcomes


def begun(folder: Path, index: int | str = "*", pid: int | str = "*") -> list[int]:
    """Processes that began a job."""
    return [int(path.name.split("-")[2]) for path in folder.glob(f"begun-{index}-{pid}")]


@needs_dask
def test_jobs_survive_a_killed_worker_and_other_code_is_refused(processes, tmp_path, caplog, monkeypatch):
    # as it now and then answers, where an update of Dask's own comes between: workers must not be lost by it
    monkeypatch.setattr("distributed.Client.scheduler_info", lambda *_: {"workers": {}})
    other = tmp_path / "other"
    shutil.copytree(PROJECT / "wav", other / "wav", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(PROJECT / "tests" / "helpers", other / "tests" / "helpers")
    with (other / "wav" / "sim" / "worker.py").open("a") as file:
        file.write("\n\nCHANGED = True\n")
    foreign = processes.worker(project=other).process.pid
    first = processes.worker().process.pid
    with open_cluster(processes.address, patience_s=WAIT_S) as cluster:
        running = Running(cluster, begin_and_wait, [(str(tmp_path), index) for index in range(4)])
        until(lambda: begun(tmp_path, pid=first), "the worker began no job")
        late = processes.worker().process.pid
        until(lambda: begun(tmp_path, pid=late), "the late worker was given no job")
        os.kill(first, signal.SIGKILL)
        until(lambda: "is refused: it has code" in caplog.text, "the worker of other code was not refused")
        (tmp_path / "go").touch()
        assert running.end() == dict.fromkeys(range(4), late)
        ((_, error),) = cluster.mapper()(leave, [()], 0)  # an exit would have ended the worker
        assert "SystemExit: 3" in str(error)
        assert psutil.pid_exists(late)
    twice = [index for index in range(4) if len(begun(tmp_path, index)) == 2]
    assert [begun(tmp_path, index, first) for index in twice] == [[first]]
    assert foreign not in begun(tmp_path)
    assert caplog.text.count(" went") == 1


def test_a_process_that_is_older_than_its_code_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr("wav.cluster._IMPORTED", time.time() + 60)
    before = describe(("wav.flow_matching",), str(tmp_path))
    monkeypatch.setattr("wav.cluster._IMPORTED", 0.0)
    after = describe(("wav.flow_matching",), str(tmp_path))
    assert before["files"] == "as at its start"
    assert after == before | {"files": "changed since its start"}


@needs_dask
def test_what_is_missing_is_named(processes):
    with pytest.raises(ConfigError, match="WAV_DASK = head: is no address"), open_cluster("head"):
        pass
    worker = processes.worker("--nthreads", "2", "--memory-limit", "0")
    until(lambda: "Registered to" in " ".join(worker.last), "the worker did not come up")
    with (
        open_cluster(processes.address, patience_s=3.0) as cluster,
        pytest.raises(ServiceError, match=r"no worker that fits for 3 s \(.* has 2 threads.*--resources GPU=1"),
    ):
        list(cluster.mapper(gpu=True)(leave, [()], 0))
    processes.scheduler.process.kill()
    with (
        open_cluster(processes.address, patience_s=1.0) as cluster,
        pytest.raises(ServiceError, match=r"no scheduler answered for 1 s .*dask scheduler"),
    ):
        list(cluster.mapper()(leave, [()], 0))


@needs_dask
@pytest.mark.long
def test_a_killed_scheduler_costs_the_jobs_in_flight_alone(processes, tmp_path):
    worker = processes.worker()
    with open_cluster(processes.address, patience_s=WAIT_S) as cluster:
        running = Running(cluster, begin_and_wait, [(str(tmp_path), index) for index in range(3)])
        until(lambda: begun(tmp_path), "no job began")
        processes.scheduler.process.kill()
        processes.scheduler.process.wait()
        processes.scheduler = processes.start_scheduler()
        (tmp_path / "go").touch()
        until(lambda: worker.process.poll() is not None, "the worker of the killed scheduler stayed")
        again = processes.worker().process.pid  # as a supervisor would
        assert set(running.end().values()) <= {again, worker.process.pid}
    assert sorted(len(begun(tmp_path, index)) for index in range(3)) == [1, 1, 2]


@needs_dask
@pytest.mark.long
@pytest.mark.simulator
def test_simulator_processes_end_with_their_worker(processes, tmp_path):
    worker = processes.worker()
    with open_cluster(processes.address, patience_s=WAIT_S) as cluster:
        running = Running(cluster, child_and_wait, [(str(tmp_path),)], in_child=True)
        (mark,) = until(lambda: list(tmp_path.glob("child-*")), "the simulator process began nothing")
        _, child, parent = mark.name.split("-")
        assert int(parent) == worker.process.pid
        os.kill(worker.process.pid, signal.SIGKILL)
        until(lambda: not psutil.pid_exists(int(child)), "the simulator process lives on")
        (tmp_path / "go").touch()
        processes.worker()
        assert running.end() == {0: None}


DRIVER = """
import sys
from tests.helpers.cluster_jobs import child_and_wait
from wav.cluster import open_cluster
if __name__ == "__main__":
    with open_cluster("local", workers=2) as cluster:
        list(cluster.mapper(in_child=True)(child_and_wait, [(sys.argv[1],)] * 2, 0))
"""


@needs_dask
def test_a_local_cluster_takes_no_orders_from_others():
    """Whoever its ports let in can have its workers run anything, and every user of the machine reaches them."""
    from distributed import Client, Security

    with open_cluster("local", workers=1) as cluster:
        place = cluster.address.partition("://")[2]
        for address, security in ((f"tcp://{place}", None), (f"tls://{place}", Security.temporary())):
            with pytest.raises(OSError, match=r"closed|does not match|Timed out"):
                Client(address, timeout=3, security=security, set_as_default=False)
        with Client(cluster.address, security=cluster.security, set_as_default=False) as client:
            ((own, worker),) = client.scheduler_info()["workers"].items()
            assert all(part.startswith("tls://127.0.0.1:") for part in (own, worker["nanny"]))
        ((_, pid),) = cluster.mapper()(os.getpid, [()], 0)
    assert pid != os.getpid()


@needs_dask
@pytest.mark.long
@pytest.mark.simulator
def test_a_killed_stage_takes_its_local_cluster_with_it(tmp_path):
    with (tmp_path / "log").open("w") as log:
        command = [sys.executable, "-c", DRIVER, str(tmp_path)]
        driver = subprocess.Popen(command, cwd=PROJECT, stdout=log, stderr=log)
    try:
        until(lambda: len(list(tmp_path.glob("child-*"))) == 2, "the simulator processes began nothing")
        family = psutil.Process(driver.pid).children(recursive=True)
        assert {int(mark.name.split("-")[1]) for mark in tmp_path.glob("child-*")} < {process.pid for process in family}
    finally:
        driver.kill()
        driver.wait()
    _, alive = psutil.wait_procs(family, timeout=WAIT_S)
    assert not alive, [process.cmdline() for process in alive]
