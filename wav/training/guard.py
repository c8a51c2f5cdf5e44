"""Tie a process to its parent: the kernel kills it when the parent dies, however the parent dies.

Run as ``python guard.py PARENT_PID COMMAND...``: it asks for that, then becomes the command. Standard library only,
so that it costs a few milliseconds.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int | None = None) -> None:
    """Have the kernel send SIGKILL when the parent ends; exits at once if ``parent`` (a pid) already has.

    Linux only; elsewhere it does nothing, and only the caller's own clean-up ends the children.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if parent is not None and os.getppid() != parent:
        raise SystemExit(1)


if __name__ == "__main__":
    die_with_parent(int(sys.argv[1]))
    os.execvp(sys.argv[2], sys.argv[2:])
