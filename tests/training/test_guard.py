"""Processes end with whoever started them: through a shell, started too late, and ranks with their launcher."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from tests.training.test_launch import gone
from wav.training import guard

CHILD = """
import os, time
from wav.training.guard import end_with_starter
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
    guard.end_with_starter("STARTED_BY", "python")
    code = "from wav.training.guard import end_with_starter; end_with_starter('STARTED_BY', 'nobody'); print('goes on')"
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


def test_a_rank_knows_its_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(guard.LAUNCHER, raising=False)
    assert guard.launcher() is None
    monkeypatch.setenv(guard.LAUNCHER, str(os.getpid()))
    assert guard.launcher() is None
    code = "from wav.training.guard import *; die_with_parent(launcher()); print('goes on')"
    inner = f"import subprocess, sys; raise SystemExit(subprocess.call([sys.executable, '-c', {code!r}]))"
    argv = [sys.executable, guard.__file__, str(os.getpid()), sys.executable, "-c", inner]
    assert subprocess.run(argv, capture_output=True, text=True, check=False).stdout == "goes on\n"
    orphan = subprocess.run([sys.executable, "-c", code], env=os.environ | {guard.LAUNCHER: "1"}, check=False)
    assert orphan.returncode == 1
