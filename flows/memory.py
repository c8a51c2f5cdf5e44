"""The memory a stage takes at its peak: its process and everything it started, sampled every second.

Pages that several processes share are counted once (the kernel's proportional set size), so the sum is what the machine
gives up, not what each process believes to have.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from pathlib import Path

import psutil

INTERVAL_S = 1.0


def proportional_bytes(pid: int) -> int:
    """Memory of a process with shared pages divided among their users; 0 where it is gone or another user's."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    except (OSError, StopIteration):
        pass
    try:
        return int(psutil.Process(pid).memory_info().rss)  # no such file in this kernel: shared pages count twice
    except psutil.Error:
        return 0


def family_bytes(pid: int) -> int:
    """Memory of a process and all its descendants together."""
    try:
        below: Iterable[psutil.Process] = psutil.Process(pid).children(recursive=True)
    except psutil.Error:
        below = ()
    return proportional_bytes(pid) + sum(proportional_bytes(process.pid) for process in below)


class PeakMemory:
    """Largest :func:`family_bytes` of this process from now until :meth:`stop`."""

    def __init__(self) -> None:
        self._peak = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="memory")
        self._thread.start()

    def _watch(self) -> None:
        while not self._done.wait(INTERVAL_S):
            self._peak = max(self._peak, family_bytes(os.getpid()))

    def stop(self) -> float:
        """End the sampling; GiB at the peak."""
        self._done.set()
        self._thread.join()
        self._peak = max(self._peak, family_bytes(os.getpid()))
        return round(self._peak / 2**30, 3)
