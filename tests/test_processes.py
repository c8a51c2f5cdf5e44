"""Child processes: lines come through, nothing survives, everything ends with whoever started it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from wav import processes
from wav.processes import Group, ending, marked, stop

# a child that starts a grandchild, names both, ignores SIGTERM if told to, and sleeps
FAMILY = """
import os, signal, subprocess, sys, time
if "stubborn" in sys.argv: signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(os.getpid(), child.pid, flush=True)
time.sleep(60)
"""


def gone(pid: int, seconds: float = 5) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.02)
    return False


def test_lines_status_and_last_words(tmp_path: Path) -> None:
    code = "import os, sys; print(os.getcwd()); print('two', file=sys.stderr); sys.exit(3)"
    with Group("x") as group:
        child = group.start([sys.executable, "-u", "-c", code], cwd=tmp_path)
        assert list(group.lines()) == [str(tmp_path), "two"]
        assert group.failed() is child
    assert child.process.returncode == 3
    assert child.last_words == f"{tmp_path} | two"
    assert [ending(3), ending(-9)] == ["ended with status 3", "was killed by SIGKILL"]


def test_silence_is_broken() -> None:
    with Group("x") as group:
        group.start([sys.executable, "-c", "import time; time.sleep(1.8)"])
        assert any("x: still running after" in line for line in group.lines(heartbeat_s=0.5))
        assert group.failed() is None


def test_the_first_that_ends_badly_ends_the_others() -> None:
    """One that a signal killed is named before one that ended because of it."""
    mourner = "import os, sys, time\nwhile os.path.exists(f'/proc/{sys.argv[1]}/exe'): time.sleep(0.01)\nsys.exit(1)"
    with Group("x", grace_s=0.3) as group:
        victim = group.start([sys.executable, "-u", "-c", "print('mine'); import time; time.sleep(60)"])
        other = group.start([sys.executable, "-c", FAMILY])
        group.start([sys.executable, "-c", mourner, str(victim.process.pid)])
        pids = []
        for line in group.lines():
            if line == "mine":
                victim.process.kill()
            else:
                pids = [int(pid) for pid in line.split()]
        assert group.failed() is victim
        assert other.process.poll() is None
    assert other.process.returncode == -signal.SIGTERM
    assert all(gone(pid) for pid in pids)


@pytest.mark.parametrize("mode", ["plain", "stubborn"])
def test_leaving_early_ends_the_whole_group(mode: str) -> None:
    with Group("x", grace_s=0.3) as group:
        group.start([sys.executable, "-c", FAMILY, mode])
        pids = [int(pid) for pid in next(iter(group.lines())).split()]
        assert all(psutil.pid_exists(pid) for pid in pids)
        begin = time.monotonic()
    assert time.monotonic() - begin < 5
    assert all(gone(pid) for pid in pids)


def test_killed_caller_takes_the_group_with_it() -> None:
    code = f"""
import sys
from wav.processes import Group
with Group("x") as group:
    group.start([sys.executable, "-c", {FAMILY!r}])
    for line in group.lines():
        print(line, flush=True)
"""
    caller = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert caller.stdout is not None
    child = int(caller.stdout.readline().split()[0])
    caller.send_signal(signal.SIGKILL)
    caller.wait()
    assert gone(child)


@pytest.mark.integration
def test_marked_processes_are_found_and_stopped() -> None:
    value = f"{os.getpid()}-{time.time_ns()}"
    command = [sys.executable, "-c", FAMILY, "stubborn"]
    process = subprocess.Popen(command, env=os.environ | {"TEST_MARK": value}, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    pids = {int(pid) for pid in process.stdout.readline().split()}
    found = marked("TEST_MARK", value)
    assert {one.pid for one in found} == pids
    stop(found, 0.3, lambda: marked("TEST_MARK", value))
    assert all(gone(pid) for pid in pids)
    assert not marked("TEST_MARK", value)


CHILD = """
import os, time
from wav.processes import end_with_starter
end_with_starter("STARTED_BY", "python")
print(os.getpid(), flush=True)
time.sleep(60)
"""
# starts CHILD below a shell that stays, as DVC does with a shell that does not exec
STARTER = """
import os, subprocess, sys
command = ["/bin/sh", "-c", '"$0" -c "$1"; true', sys.executable, sys.argv[1]]
subprocess.Popen(command, env={**os.environ, "STARTED_BY": "me"})
os.wait()
"""


def test_a_child_below_a_shell_ends_with_its_starter() -> None:
    starter = subprocess.Popen([sys.executable, "-c", STARTER, CHILD], stdout=subprocess.PIPE, text=True)
    assert starter.stdout is not None
    child = int(starter.stdout.readline())
    assert not gone(child, 0.3)
    starter.send_signal(signal.SIGKILL)
    starter.wait()
    assert gone(child)


def test_the_starters_variable_alone_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STARTED_BY", raising=False)
    processes.end_with_starter("STARTED_BY", "python")
    code = "from wav.processes import end_with_starter; end_with_starter('STARTED_BY', 'nobody'); print('goes on')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"STARTED_BY": "this test"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "goes on\n", "this process is the starter and lives"


def test_an_orphan_ends_at_once() -> None:
    """The starter was killed before the child could look: its new parent is no starter."""
    code = "import os, time\nif os.fork(): os._exit(0)\ntime.sleep(0.3)\n" + CHILD
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        ["setsid", *command],
        env=os.environ | {"STARTED_BY": "me"},
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    if not done.stdout:
        assert "the process that started this one has ended" in done.stderr
    else:  # a sub-reaper other than process 1 took it over, which nothing tells from a starter
        os.kill(int(done.stdout), signal.SIGKILL)
        pytest.skip("orphans of this machine do not go to process 1")
