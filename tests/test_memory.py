"""Peak memory counts what a stage starts, once."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flows import memory

#: takes 64 MiB, says so, and waits
HUNGRY = "import sys; block = bytearray(b'x') * (64 << 20); print('taken', flush=True); sys.stdin.read()"
MIB = 2**20
ROOT = Path(__file__).resolve().parents[1]


#: Watches its own children from a small process: a large one shares pages of libraries with others of the machine, and
#: its proportional share moves by tens of MiB when they end.
WATCHER = f"""
import os, subprocess, sys, time
from flows import memory
memory.INTERVAL_S, count, started = 0.05, int(sys.argv[1]), []
before, peak = memory.family_bytes(os.getpid()), memory.PeakMemory()
for _ in range(count):
    command = [sys.executable, "-S", "-c", {HUNGRY!r}]
    started.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
for child in started:
    assert child.stdout.readline() == "taken\\n"
time.sleep(0.5)
for child in started:
    child.communicate()
print(before, memory.family_bytes(os.getpid()), peak.stop() * 2**30)
"""


@pytest.mark.parametrize("children", [1, 2])
def test_children_are_in_the_peak_though_they_have_ended(children: int) -> None:
    watcher = subprocess.run(
        [sys.executable, "-c", WATCHER, str(children)], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert watcher.returncode == 0, watcher.stderr
    before, after, peak = map(float, watcher.stdout.split())
    assert after < before + 32 * MIB
    assert peak / MIB >= before / MIB + children * 64


def test_shared_pages_count_once() -> None:
    with mmap.mmap(-1, 128 * MIB) as shared:
        shared.write(b"x" * (128 * MIB))
        before = memory.family_bytes(os.getpid())
        child = os.fork()
        if child == 0:
            for place in range(0, 128 * MIB, mmap.PAGESIZE):
                shared[place]
            time.sleep(30)
            os._exit(0)
        try:
            time.sleep(0.5)
            assert memory.family_bytes(os.getpid()) < before + 64 * MIB
        finally:
            os.kill(child, 9)
            os.waitpid(child, 0)


def test_a_process_that_is_gone_takes_nothing() -> None:
    child = subprocess.Popen([sys.executable, "-S", "-c", ""])
    child.wait()
    assert memory.family_bytes(child.pid) == 0
