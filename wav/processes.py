"""Child processes: started in a group of their own, read line by line, stopped as a whole, never left behind.

A child that :func:`guarded` starts is killed by the kernel when this process ends, however it ends (Linux). Run as
``python processes.py PARENT_PID COMMAND...`` this file is what arranges that, so at import it needs the standard
library alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import psutil

#: in the environment of everything that a worker of the work pool starts
WORKER_MARK = "WAV_WORKER"
_PR_SET_PDEATHSIG = 1
_LAST_LINES, _GRACE_S = 12, 10.0


def die_with_parent(parent: int | None = None) -> None:
    """Have the kernel send SIGKILL when the parent ends; exits at once if ``parent`` (a pid) already has.

    On systems other than Linux it does nothing, and only the parent's own clean-up ends its children.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
        if parent is not None and os.getppid() != parent:
            raise SystemExit(1)


def guarded(command: Sequence[str]) -> list[str]:
    """``command`` as a child that dies with this process: the same process, after it has asked the kernel for it."""
    return [sys.executable, "-I", "-S", __file__, str(os.getpid()), *command]


def end_with_starter(variable: str, name: str) -> None:
    """End this process (SIGTERM, later SIGKILL) when the one that set ``variable`` for it ends; at once if it has.

    That is the nearest ancestor whose own environment has another value or none: ``dvc repro`` for ``DVC_STAGE``,
    whether or not a shell stands between. ``name``, a part of its command line, tells it from the init process that
    takes over orphans. Linux only; without ``variable``, or a second time, it does nothing.
    """
    import psutil

    value, watcher = os.environ.get(variable), f"end with {name}"
    if not value or sys.platform != "linux" or any(thread.name == watcher for thread in threading.enumerate()):
        return
    try:
        starter = next(p for p in psutil.Process().parents() if _variable(p, variable) != value)
        if starter.pid == 1 and name not in " ".join(starter.cmdline()):
            raise ProcessLookupError
        handle = os.pidfd_open(starter.pid)
    except (StopIteration, ProcessLookupError, psutil.Error):
        raise SystemExit(f"{variable} = {value}: the process that started this one has ended") from None

    def watch() -> None:
        select.select([handle], [], [])
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_GRACE_S)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True, name=watcher).start()


def _variable(process: psutil.Process, variable: str) -> str | None:
    """Environment variable that a process was started with; None where it has none or may not be asked."""
    import psutil

    try:
        value: str | None = process.environ().get(variable)
    except (psutil.Error, OSError):
        return None
    return value


def marked(variable: str, value: str) -> list[psutil.Process]:
    """Running processes that were started with this environment variable, by this user."""
    import psutil

    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if _variable(process, variable) == value and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def stop(
    first: Sequence[psutil.Process], grace_s: float, everything: Callable[[], list[psutil.Process]] | None = None
) -> None:
    """Ask ``first`` to end (SIGTERM), give all ``everything`` finds ``grace_s`` seconds, kill what is left."""
    import psutil

    for process in first:
        with contextlib.suppress(psutil.Error):
            process.terminate()
    deadline = time.monotonic() + grace_s
    if everything is None:
        _, left = psutil.wait_procs(first, timeout=grace_s)
    else:
        while (left := everything()) and time.monotonic() < deadline:
            psutil.wait_procs(left, timeout=0.1)
    for process in left:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(left, timeout=5)


def stop_groups(processes: Sequence[subprocess.Popen[str]], grace_s: float) -> None:
    """End processes that lead a group, and everything in their groups: SIGTERM, ``grace_s`` seconds, SIGKILL."""
    for process in processes:
        if process.poll() is None:
            _signal_group(process.pid, signal.SIGTERM)
    deadline = time.monotonic() + grace_s
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))
        _signal_group(process.pid, signal.SIGKILL)
    for process in processes:
        process.wait()


def _signal_group(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, number)


def ending(status: int) -> str:
    """How a process ended, for a sentence: ``was killed by SIGKILL``, ``ended with status 3``."""
    return f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"


class Child:
    """A process of a :class:`Group`: what it was started as and the last lines it printed."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.last: deque[str] = deque(maxlen=_LAST_LINES)

    @property
    def last_words(self) -> str:
        """The last things it said, on one line."""
        return " | ".join(line.strip() for line in list(self.last)[-3:] if line.strip()) or "nothing"


class Group:
    """Processes that work together and end together; a context manager, which leaves nothing of them.

    Each leads a process group of its own and dies with this process. Leaving the block, however that happens, ends
    what still runs: SIGTERM, ``grace_s`` seconds, SIGKILL. ``name`` stands in the line that breaks a silence.
    """

    def __init__(self, name: str, grace_s: float = 2.0) -> None:
        self.name, self.children, self._grace_s = name, list[Child](), grace_s
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._readers: list[threading.Thread] = []

    def __enter__(self) -> Group:
        return self

    def __exit__(self, *_: object) -> None:
        stop_groups([child.process for child in self.children], self._grace_s)

    def start(self, command: Sequence[str], env: Mapping[str, str] | None = None, cwd: Path | None = None) -> Child:
        """Start one more process; what it prints, errors included, comes out of :meth:`lines`."""
        process = subprocess.Popen(
            guarded(command),
            env=env,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        child = Child(process)
        reader = threading.Thread(target=self._read, args=(child,), daemon=True, name=f"{self.name}-output")
        reader.start()
        self.children.append(child)
        self._readers.append(reader)
        return child

    def _read(self, child: Child) -> None:
        assert child.process.stdout is not None
        for text in child.process.stdout:
            child.last.append(text.rstrip("\n"))
            self._lines.put(child.last[-1])
        self._lines.put(None)

    def lines(self, heartbeat_s: float = 10.0) -> Iterator[str]:
        """Lines of all processes until all have ended or one ended badly; ``heartbeat_s`` of silence give one more."""
        began = spoke = time.monotonic()
        closed = 0
        while closed < len(self.children) and not any(child.process.poll() for child in self.children):
            try:
                text = self._lines.get(timeout=0.5)
            except queue.Empty:
                now = time.monotonic()
                if all(child.process.poll() is not None for child in self.children):
                    break  # a grandchild may hold a pipe open; the processes themselves are gone
                if now - spoke >= heartbeat_s:
                    spoke = now
                    yield f"{self.name}: still running after {now - began:.0f} s"
                continue
            closed += text is None
            if text is not None:
                spoke = time.monotonic()
                yield text
        for child, reader in zip(self.children, self._readers, strict=True):
            if closed == len(self.children):
                child.process.wait()
            if child.process.poll() is not None:
                reader.join(1.0)
        while not self._lines.empty():
            if (text := self._lines.get()) is not None:
                yield text

    def failed(self) -> Child | None:
        """The process that ended badly: one that a signal killed before those that ended because it was gone."""
        bad = [child for child in self.children if child.process.poll()]
        return min(bad, key=lambda child: int(child.process.returncode)) if bad else None


if __name__ == "__main__":
    die_with_parent(int(sys.argv[1]))
    os.execvp(sys.argv[2], sys.argv[2:])
