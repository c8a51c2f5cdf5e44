"""Run a command and never stay silent: pass its output through, and say that it is alive when it says nothing.

``python infra/local/heartbeat.py NAME -- COMMAND...``; standard library only (it runs before anything is installed).
Exits with the command's status; an interrupt or termination is passed on to the command.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time

INTERVAL = float(os.environ.get("WAV_HEARTBEAT_SECONDS", "10"))


def run(name: str, command: list[str]) -> int:
    """Run ``command`` with its output passed through, and a line after every :data:`INTERVAL` silent seconds."""
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    except OSError as error:
        sys.stderr.write(f"{name}: cannot run {command[0]!r}: {error.strerror}\n")
        return 127
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda received, _frame: process.send_signal(received))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to the command as well
    assert process.stdout is not None
    descriptor, started, line_open = process.stdout.fileno(), time.monotonic(), False
    while True:
        ready, _, _ = select.select([descriptor], [], [], INTERVAL)
        if ready:
            chunk = os.read(descriptor, 65536)
            if not chunk:
                break
            line_open = chunk[-1:] not in (b"\n", b"\r")
            os.write(1, chunk)
        elif process.poll() is not None:
            break  # it ended, but a process it left behind still holds the pipe
        else:
            elapsed = int(time.monotonic() - started)
            prefix = "\n" if line_open else ""
            os.write(1, f"{prefix}[{name}] still working, {elapsed // 60}:{elapsed % 60:02d}\n".encode())
            line_open = False
    code = process.wait()
    return 128 - code if code < 0 else code


def main() -> int:
    """``heartbeat.py NAME -- COMMAND...``."""
    if len(sys.argv) < 4 or sys.argv[2] != "--":
        sys.stderr.write("usage: heartbeat.py NAME -- COMMAND...\n")
        return 2
    return run(sys.argv[1], sys.argv[3:])


if __name__ == "__main__":
    raise SystemExit(main())
