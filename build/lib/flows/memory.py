"""The memory a stage takes at its peak: its process and everything it started, sampled every second.

Pages that several processes share are counted once (the kernel's proportional set size), so the sum is what the machine
gives up, not what each process believes to have.
"""

from __future__ import annotations

import contextlib
import threading

import psutil

INTERVAL_S = 1.0


def family_bytes(pid: int) -> int:
    """Memory of a process and all its descendants together, shared pages divided among their users where Linux can."""
    total = 0
    with contextlib.suppress(psutil.Error):
        top = psutil.Process(pid)
        for process in (top, *top.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                found = process.memory_full_info()
                total += int(getattr(found, "pss", found.rss))
    return total


class PeakMemory:
    """Largest :func:`family_bytes` of this process from now until :meth:`stop`."""

    def __init__(self) -> None:
        self._peak = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="memory")
        self._thread.start()

    def _look(self) -> None:
        self._peak = max(self._peak, family_bytes(psutil.Process().pid))

    def _watch(self) -> None:
        while not self._done.wait(INTERVAL_S):
            self._look()

    def stop(self) -> float:
        """End the sampling; GiB at the peak."""
        self._done.set()
        self._thread.join()
        self._look()
        return round(self._peak / 2**30, 3)
