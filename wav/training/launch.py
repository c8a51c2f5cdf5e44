"""Run a training spec in a process group of its own and see that nothing of it outlives the call.

:func:`launch` is what flows call: it starts one process (or torchrun with several), hands on every line they print,
says so when they are silent, and ends them all on any exit: an error, a cancelled flow, Ctrl-C. Should the caller
itself be killed, the kernel ends its children (:mod:`wav.training.guard`).
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator
from pathlib import Path

from wav.errors import TrainingError
from wav.training import guard
from wav.training.spec import TrainSpec

ERROR_MARK = "ERROR: "
_LAST_LINES = 8


def launch(
    spec: TrainSpec,
    on_line: Callable[[str], None],
    ranks: int | None = None,
    heartbeat_s: float = 10.0,
    grace_s: float = 2.0,
) -> dict[str, float | int | str]:
    """Train ``spec`` and return its metrics (``metrics.json`` of the output folder).

    Args:
        spec: the run.
        on_line: gets every line the processes print, and a heartbeat line after ``heartbeat_s`` silent seconds.
        ranks: processes on this machine; None: ``spec.train.ranks`` (and always so on several nodes).
        heartbeat_s: seconds of silence before a line says that the run is alive.
        grace_s: seconds between SIGTERM (save and exit) and SIGKILL when the call is interrupted.

    Raises:
        TrainingError: the processes ended with an error; holds the last line that names it.
    """
    ranks = ranks or spec.train.ranks
    spec.work.mkdir(parents=True, exist_ok=True)
    path = spec.work / "spec.json"
    path.write_text(spec.to_json())
    last: deque[str] = deque(maxlen=_LAST_LINES)
    argv = command(path, ranks) if spec.train.nodes == 1 else several_nodes(path)
    lines = run_group(argv, environment(spec, ranks), spec.stage, heartbeat_s, grace_s)
    with contextlib.closing(lines):
        for line in lines:
            if line.status is None:
                last.append(line.text)
                on_line(line.text)
            elif line.status != 0:
                raise TrainingError(_failure(spec.stage, line.status, list(last)))
    metrics: dict[str, float | int | str] = json.loads((spec.paths.output / "metrics.json").read_text())
    return metrics


def command(spec_path: Path, ranks: int) -> list[str]:
    """Command line of a run: the loop itself, or torchrun around it for more than one rank."""
    module = ["-m", "wav.training.loop", str(spec_path)]
    if ranks == 1:
        return [sys.executable, *module]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return [sys.executable, *torchrun, *module]


def several_nodes(spec_path: Path) -> list[str]:
    """Command line of a run on several nodes (:mod:`wav.training.nodes`)."""
    return [sys.executable, "-m", "wav.training.nodes", "head", str(spec_path)]


def environment(spec: TrainSpec, ranks: int) -> dict[str, str]:
    """Environment of a run: rendezvous for a single process, threads, no accelerator probing on a CPU."""
    threads = spec.threads or max(1, (os.cpu_count() or 1) // ranks)
    extra = {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}
    if ranks == 1:
        extra |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        extra |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # one process needs no port; see engine.init_world
    if spec.device == "cpu":
        extra["DS_ACCELERATOR"] = "cpu"
    return {**os.environ, **extra}


class Line:
    """A printed line, or (``status`` set) the end of the group."""

    def __init__(self, text: str, status: int | None = None) -> None:
        self.text, self.status = text, status


def run_group(
    argv: list[str], env: dict[str, str], name: str, heartbeat_s: float = 10.0, grace_s: float = 2.0
) -> Generator[Line, None, None]:
    """Run a command in its own process group; yields its lines, then one :class:`Line` with the exit status.

    Leaving the iteration early (an exception in the caller, ``close()``) ends the whole group: SIGTERM, then
    SIGKILL after ``grace_s``.
    """
    guarded = [sys.executable, "-I", "-S", guard.__file__, str(os.getpid()), *argv]
    process = subprocess.Popen(
        guarded,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    lines: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=_read, args=(process, lines), daemon=True, name=f"{name}-output").start()
    started = spoke = time.monotonic()
    try:
        while True:
            try:
                text = lines.get(timeout=0.5)
            except queue.Empty:
                now = time.monotonic()
                if process.poll() is not None:
                    break  # a grandchild may hold the pipe open; the process itself is gone
                if now - spoke >= heartbeat_s:
                    spoke = now
                    yield Line(f"{name}: still running after {now - started:.0f} s")
                continue
            if text is None:
                break
            spoke = time.monotonic()
            yield Line(text)
        yield Line("", process.wait())
    finally:
        end_group(process, grace_s)


def _read(process: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
    assert process.stdout is not None
    for text in process.stdout:
        lines.put(text.rstrip("\n"))
    lines.put(None)


def end_group(process: subprocess.Popen[str], grace_s: float) -> None:
    """End a process and everything in its group: SIGTERM, ``grace_s`` seconds, SIGKILL."""
    if process.poll() is None:
        _signal_group(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace_s)
    _signal_group(process.pid, signal.SIGKILL)
    process.wait()


def _signal_group(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, number)


def _failure(stage: str, status: int, last: list[str]) -> str:
    """One sentence: the error the process itself named, else its last lines."""
    named = [line.partition(ERROR_MARK)[2] for line in last if ERROR_MARK in line]
    if named:
        return f"{stage}: {named[-1]}"
    if status < 0:
        cause = f"was killed by {signal.Signals(-status).name}"
        remedy = "run it again to resume from the last checkpoint (out of memory? lower micro_batch_size)"
    else:
        cause, remedy = f"ended with status {status}", "look at the log above"
    tail = " | ".join(line.strip() for line in last[-3:] if line.strip())
    return f"{stage}: the training process {cause}; {remedy}; it last said: {tail or 'nothing'}"
