"""Run a training spec in processes of its own and see that nothing of them outlives the call.

:func:`launch` is what flows call: it starts the ranks of this machine, or on several nodes the launcher that
``WAV_LAUNCHER`` names, hands on every line they print, says so when they are silent, and ends them all on any exit: an
error, a cancelled flow, Ctrl-C. Should the caller itself be killed, the kernel ends its children
(:mod:`wav.processes`).

The ranks of one machine meet through a file in the run's own folder, which nobody else may read; what they say to each
other goes over the loopback interface. Nothing listens where another machine could connect.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from wav.config import Runtime
from wav.errors import ConfigError, TrainingError
from wav.processes import Child, Group, ending
from wav.training import RENDEZVOUS
from wav.training.spec import TrainSpec

ERROR_MARK = "ERROR: "
_LOOPBACK = "lo" if sys.platform == "linux" else "lo0"


def launch(spec: TrainSpec, on_line: Callable[[str], None]) -> dict[str, float | int | str]:
    """Train ``spec`` and return its metrics (``metrics.json`` of the output folder).

    ``on_line`` gets every line the processes print, and one that says that they live after some silent seconds.

    Raises:
        ConfigError: several nodes, and no launcher for them.
        TrainingError: the processes ended with an error; holds the last line that names it.
    """
    spec.work.mkdir(parents=True, exist_ok=True)
    path = spec.work / "spec.json"
    path.write_text(spec.to_json())
    with Group(spec.stage) as group:
        if spec.train.nodes > 1:
            group.start(several_nodes(spec, path), environment(spec))
        else:
            for variables in rank_environments(spec):
                group.start(command(path), environment(spec) | variables)
        for line in group.lines():
            on_line(line)
        if (failed := group.failed()) is not None:
            raise TrainingError(_failure(spec.stage, failed, group.children))
    metrics: dict[str, float | int | str] = json.loads((spec.paths.output / "metrics.json").read_text())
    return metrics


def command(spec_path: Path) -> list[str]:
    """Command line of a rank."""
    return [sys.executable, "-m", "wav.training.loop", str(spec_path)]


def rank_environments(spec: TrainSpec) -> list[dict[str, str]]:
    """What tells the ranks of one machine who they are and where they meet."""
    folder, ranks = spec.work / "rendezvous", spec.train.ranks
    shutil.rmtree(folder, ignore_errors=True)  # a run that was killed may have left its own
    folder.mkdir(mode=0o700)
    meet = {RENDEZVOUS: str(folder / "store"), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    meet |= {"GLOO_SOCKET_IFNAME": _LOOPBACK, "NCCL_SOCKET_IFNAME": _LOOPBACK}
    return [meet | {"RANK": str(n), "LOCAL_RANK": str(n), "WORLD_SIZE": str(ranks)} for n in range(ranks)]


def several_nodes(spec: TrainSpec, spec_path: Path) -> list[str]:
    """Command line of several nodes: the launcher's words, then what every rank runs; ConfigError: no launcher."""
    launcher = shlex.split(Runtime().launcher)
    if not launcher:
        raise ConfigError(
            f"{spec.stage}.nodes = {spec.train.nodes}: WAV_LAUNCHER is not set; name what starts ranks on all nodes, "
            "such as 'deepspeed --hostfile FILE --module' or 'srun --nodes=2 --ntasks-per-node=8 python -m'"
        )
    return [*launcher, "wav.training.loop", str(spec_path)]


def environment(spec: TrainSpec) -> dict[str, str]:
    """Environment of every rank: threads, and no accelerator probing on a CPU."""
    threads = spec.threads or max(1, (os.cpu_count() or 1) // spec.train.ranks)
    extra = {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}
    if spec.device == "cpu":
        # else glibc gives a step's tensors back to the system and faults them in again, for a tenth of the step
        extra |= {"DS_ACCELERATOR": "cpu", "MALLOC_TRIM_THRESHOLD_": str(2**33), "MALLOC_MMAP_THRESHOLD_": str(2**25)}
    return {**os.environ, **extra}


def _failure(stage: str, failed: Child, children: list[Child]) -> str:
    """One sentence: the error that a process itself named, else the last lines of the one that failed."""
    named = [line.partition(ERROR_MARK)[2] for child in children for line in child.last if ERROR_MARK in line]
    if named:
        return f"{stage}: {named[-1]}"
    status = int(failed.process.returncode)
    remedy = "look at the log above"
    if status < 0:
        remedy = "run it again to resume from the last checkpoint (out of memory? lower micro_batch_size)"
    return f"{stage}: the training process {ending(status)}; {remedy}; it last said: {failed.last_words}"
