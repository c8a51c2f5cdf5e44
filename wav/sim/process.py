"""One simulator process as its parent sees it: started with its own device and log, asked, ended, explained.

The process's output goes to a log below the local folder, its warnings to the parent's stderr as well. The log is
removed with an orderly end and kept after any failure, and every error that a process causes names it.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from wav.errors import SimulationError
from wav.local import local_folder
from wav.processes import ending
from wav.sim.rendering import simulator_environment

KEPT_LOGS = 20  #: Logs of failed simulators that are kept, the newest.
_numbers = itertools.count()


def _log_path() -> Path:
    """A new log's path; the oldest logs beyond :data:`KEPT_LOGS` are removed."""
    folder = local_folder() / "simulators"
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(OSError):  # others may remove logs, too
        for old in sorted(folder.glob("*.log"), key=lambda path: path.stat().st_mtime)[:-KEPT_LOGS]:
            old.unlink()
    return folder / f"{os.getpid()}-{next(_numbers)}.log"


class WorkerProcess:
    """One simulator process, which answers requests of (kind, payload) one after the other.

    Devices are dealt out by ``number``.
    """

    def __init__(self, number: int = 0) -> None:
        ours, theirs = socket.socketpair()
        self.log, self.failed = _log_path(), False
        stderr = os.dup(2)
        numbers = [theirs.fileno(), os.getpid(), stderr]
        with self.log.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-X", "faulthandler", "-m", "wav.sim.worker", *map(str, numbers)],
                env=simulator_environment(number),
                pass_fds=(theirs.fileno(), stderr),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        theirs.close()
        os.close(stderr)
        self.connection = Connection(ours.detach())

    def ask(self, kind: str, payload: Any, seconds: float) -> Any:
        """The answer to one request.

        Raises:
            SimulationError: the process is gone, or has not answered within ``seconds``; names its log, which stays.
        """
        try:
            self.connection.send((kind, payload))
            if self.connection.poll(seconds):
                return self.connection.recv()
            self.failed, why = True, f"gave no answer for {seconds:g} s"
        except (EOFError, OSError):
            self.failed = True
            try:
                why = ending(self.process.wait(timeout=2))
            except subprocess.TimeoutExpired:
                why = "closed its connection, but still runs"
        raise SimulationError(f"simulator process {self.process.pid} {why}; its output is in {self.log}")

    def tell(self, kind: str, payload: Any) -> None:
        """A message that has no answer; if the process is gone, the next request says so."""
        with contextlib.suppress(OSError):
            self.connection.send((kind, payload))

    def kill(self) -> None:
        """End it at once, after a second for Python's traceback (faulthandler, on SIGABRT) to reach the log."""
        self.failed = True
        self.process.send_signal(signal.SIGABRT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=1)
        self.process.kill()
        self.close()

    def close(self) -> None:
        """End the process, by force after two seconds."""
        self.connection.close()
        try:
            self.process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if not self.failed:
            self.log.unlink(missing_ok=True)
