"""The worker's process: a signal ends what it started, stubborn or not; killed, it takes the worker with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.test_processes import FAMILY, gone
from wav.processes import marked

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
