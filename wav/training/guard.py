"""Tie a process to the one it works for, so that nothing of a run outlives who started it, however that one dies.

Run as ``python guard.py PARENT_PID COMMAND...``: it asks the kernel to be killed with its parent, then becomes the
command. :func:`end_with_starter` is for processes that may tidy up first, or whose starter is not their parent.
Standard library only, so that it costs a few milliseconds.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
import threading
import time
from pathlib import Path

_PR_SET_PDEATHSIG = 1
#: pid of the guarded process, for its children
LAUNCHER = "WAV_LAUNCHER_PID"
#: seconds between SIGTERM and SIGKILL for a process whose starter has ended
GRACE_S = 10.0


def die_with_parent(parent: int | None = None) -> None:
    """Have the kernel send SIGKILL when the parent ends; exits at once if ``parent`` (a pid) already has.

    Linux only; elsewhere it does nothing, and only the caller's own clean-up ends the children.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if parent is not None and os.getppid() != parent:
        raise SystemExit(1)


def launcher() -> int | None:
    """Pid of the guarded process that must be this one's parent; None where this is that process, or none is."""
    pid = int(os.environ.get(LAUNCHER) or 0)
    return None if pid in (0, os.getpid()) else pid


def end_with_starter(variable: str, name: str) -> None:
    """End this process (SIGTERM, later SIGKILL) when the one that set ``variable`` for it ends.

    That is the nearest ancestor whose own environment has another value or none: ``dvc repro`` for ``DVC_STAGE``,
    whether or not a shell stands between. Linux only; without ``variable`` it does nothing.

    Args:
        variable: environment variable that the starter gives to what it starts.
        name: part of the starter's command line; tells it from the init process that takes over orphans.

    Raises:
        SystemExit: the starter has ended already.
    """
    value = os.environ.get(variable)
    if not value or sys.platform != "linux":
        return
    starter = os.getppid()
    while starter > 1 and f"{variable}={value}" in _words(starter, "environ"):
        starter = _parent(starter)
    try:
        if starter <= 1 and name not in " ".join(_words(1, "cmdline")):
            raise ProcessLookupError
        handle = os.pidfd_open(starter)
    except ProcessLookupError:
        raise SystemExit(f"{variable} = {value}: the process that started this one has ended") from None
    threading.Thread(target=_end_after, args=(handle,), daemon=True, name=f"end with {name}").start()


def _words(pid: int, file: str) -> list[str]:
    """``environ`` or ``cmdline`` of a process; empty where it is gone or another user's."""
    try:
        return Path(f"/proc/{pid}/{file}").read_text(errors="replace").split("\0")
    except OSError:
        return []


def _parent(pid: int) -> int:
    """Parent of a process; 0 where it is gone."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _end_after(handle: int) -> None:
    """Wait for the process behind a pid file descriptor, then end this one."""
    watch = select.poll()
    watch.register(handle, select.POLLIN)
    while not watch.poll():
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_S)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    os.environ[LAUNCHER] = str(os.getpid())
    die_with_parent(int(sys.argv[1]))
    os.execvp(sys.argv[2], sys.argv[2:])
