"""The process group: lines come through, errors are named, nothing survives, one and two ranks train."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from wav.errors import TrainingError
from wav.training.launch import launch, run_group

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


def test_lines_and_status() -> None:
    code = "import sys; print('one'); print('two', file=sys.stderr); sys.exit(3)"
    lines = list(run_group([sys.executable, "-u", "-c", code], dict(os.environ), "x"))
    assert [line.text for line in lines[:-1]] == ["one", "two"]
    assert lines[-1].status == 3


def test_silence_is_broken() -> None:
    code = "import time; time.sleep(1.8)"
    lines = list(run_group([sys.executable, "-c", code], dict(os.environ), "x", heartbeat_s=0.5))
    assert any("x: still running after" in line.text for line in lines)


@pytest.mark.parametrize("mode", ["plain", "stubborn"])
def test_leaving_early_ends_the_whole_group(mode: str) -> None:
    lines = run_group([sys.executable, "-c", FAMILY, mode], dict(os.environ), "x", grace_s=0.3)
    pids = [int(pid) for pid in next(lines).text.split()]
    assert all(psutil.pid_exists(pid) for pid in pids)
    begin = time.monotonic()
    lines.close()
    assert time.monotonic() - begin < 5
    assert all(gone(pid) for pid in pids)


def test_killed_caller_takes_the_run_with_it() -> None:
    code = f"""
import os, sys
from wav.training.launch import run_group
for line in run_group([sys.executable, "-c", {FAMILY!r}], dict(os.environ), "x"):
    print(line.text, flush=True)
"""
    caller = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert caller.stdout is not None
    child = int(caller.stdout.readline().split()[0])
    caller.send_signal(signal.SIGKILL)
    caller.wait()
    assert gone(child)


def test_launch_trains_with_two_ranks(spec_of) -> None:
    """ZeRO-2 over gloo through torchrun; the metrics come back and the weights are whole."""
    spec = spec_of(pretrain_video={"steps": 3, "ranks": 2, "zero_stage": 2})
    lines: list[str] = []
    metrics = launch(spec, lines.append)
    assert metrics["steps"] == 3
    assert any("2 rank(s)" in line for line in lines)
    assert (spec.paths.output / "model" / "config.json").is_file()
    assert json.loads((spec.paths.output / "metrics.json").read_text()) == metrics


def fake(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    monkeypatch.setattr("wav.training.launch.command", lambda path, ranks: [sys.executable, "-u", "-c", code])


def test_launch_names_the_error(spec_of, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, "print('step 1'); print('ERROR: disk full; free space'); raise SystemExit(1)")
    with pytest.raises(TrainingError, match=r"^pretrain_video: disk full; free space$"):
        launch(spec_of(), lambda _: None)
    fake(monkeypatch, "import os; print('last words'); os.kill(os.getpid(), 9)")
    with pytest.raises(TrainingError, match=r"killed by SIGKILL.*resume.*last words"):
        launch(spec_of(), lambda _: None)


def test_launch_ends_the_run_when_the_caller_fails(spec_of, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, FAMILY)
    pids: list[int] = []

    def fail(line: str) -> None:
        pids.extend(int(pid) for pid in line.split())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        launch(spec_of(), fail)
    assert len(pids) == 2
    assert all(gone(pid) for pid in pids)
