"""Jobs for the workers of a test's cluster; imports next to nothing."""

from __future__ import annotations

import os
import time
from pathlib import Path


def begin_and_wait(folder: str, index: int) -> int:
    """Leave a file that names this process, wait until ``folder/go`` is there; the process's id."""
    (Path(folder) / f"begun-{index}-{os.getpid()}").touch()
    while not (Path(folder) / "go").exists():
        time.sleep(0.05)
    (Path(folder) / f"done-{index}-{os.getpid()}").touch()
    return os.getpid()


def leave() -> None:
    """End the process, as a command may that refuses its input."""
    raise SystemExit(3)


def child_and_wait(folder: str) -> None:
    """In a simulator process: leave a file that names it and its parent, wait until ``folder/go`` is there."""
    (Path(folder) / f"child-{os.getpid()}-{os.getppid()}").touch()
    while not (Path(folder) / "go").exists():
        time.sleep(0.05)
