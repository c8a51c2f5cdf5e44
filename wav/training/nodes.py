"""Training on several nodes (``nodes`` of a training section above 1): torchrun on each, joined at the first.

:func:`wav.training.launch.launch` starts ``nodes head SPEC`` on the node that runs the stage. It reads a DeepSpeed
hostfile (``WAV_HOSTFILE``, lines ``HOST slots=GPUS``, this machine first) and starts one and the same command per node,
here directly and elsewhere through ``WAV_REMOTE_SHELL`` (ssh)::

    python -m wav.training.nodes join SPEC --node 1 --nodes 2 --master HOST:PORT

Every node needs the same code at the same path, the run's folders on a file system that all of them share, and the
store's credentials in its own AWS chain: secrets are never sent. When a node ends badly the others are ended; a node
that loses the first one (its standard input closes) ends itself.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import queue
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from wav.config import Runtime
from wav.errors import ConfigError, WavError
from wav.training import guard
from wav.training.launch import ERROR_MARK, environment, run_group
from wav.training.spec import TrainSpec, code_digest

LOG = logging.getLogger("wav.training")
HOST_LINE = re.compile(r"(\S+)\s+slots=(\d+)")
#: variables that the other nodes get from the first one; none of these holds a secret
FORWARDED = ("WAV_", "NCCL_", "GLOO_", "FI_", "OMP_", "PYTHON", "DS_ACCELERATOR", "CUDA_DEVICE_ORDER")
STOP_S = 10.0


@dataclass(frozen=True)
class Host:
    """A line of the hostfile: an address that ssh and the other nodes know, and its GPUs."""

    name: str
    slots: int


class Terminated(SystemExit):
    """SIGTERM or SIGHUP came: everything started here has to end."""


def read_hostfile(path: Path) -> tuple[Host, ...]:
    """Hosts of a DeepSpeed hostfile; empty lines and ``#`` comments are skipped.

    Raises:
        ConfigError: no such file, or a line of another form; names it.
    """
    try:
        text = path.read_text()
    except OSError as error:
        raise ConfigError(f"WAV_HOSTFILE = {str(path)!r}: {error.strerror}; name a file of HOST slots=GPUS") from None
    hosts = []
    for number, line in enumerate(text.splitlines(), 1):
        plain = line.partition("#")[0].strip()
        if not plain:
            continue
        found = HOST_LINE.fullmatch(plain)
        if found is None:
            raise ConfigError(f"{path}:{number}: {plain!r} is not HOST slots=GPUS; correct the line")
        hosts.append(Host(found[1], int(found[2])))
    return tuple(hosts)


def choose_hosts(spec: TrainSpec, path: str) -> tuple[Host, ...]:
    """The first ``nodes`` hosts of the hostfile.

    Raises:
        ConfigError: there is no hostfile, or it has too few hosts or slots.
    """
    nodes, ranks = spec.train.nodes, spec.train.ranks
    if not path:
        raise ConfigError(f"{spec.stage}.nodes = {nodes}: WAV_HOSTFILE is not set; name a file of HOST slots=GPUS")
    hosts = read_hostfile(Path(path))
    if len(hosts) < nodes:
        raise ConfigError(f"{spec.stage}.nodes = {nodes}: {path} has {len(hosts)} hosts; add some or lower nodes")
    for host in hosts[:nodes]:
        if host.slots < ranks:
            raise ConfigError(f"{spec.stage}.ranks = {ranks}: {path} gives {host.name} {host.slots} slots; lower ranks")
    return hosts[:nodes]


def join_command(spec_path: Path, node: int, nodes: int, master: str) -> list[str]:
    """What each node runs; only ``--node`` differs."""
    place = ["--node", str(node), "--nodes", str(nodes), "--master", master]
    return [sys.executable, "-m", "wav.training.nodes", "join", str(spec_path), *place]


def remote_command(shell: str, host: str, argv: Sequence[str], variables: Mapping[str, str]) -> list[str]:
    """``argv`` on another host, in this working directory, with the variables of :data:`FORWARDED`."""
    passed = [f"{name}={value}" for name, value in sorted(variables.items()) if name.startswith(FORWARDED)]
    line = f"cd {shlex.quote(os.getcwd())} && exec env {shlex.join([*passed, *argv])}"
    return [*shlex.split(shell), host, line]


def torchrun_command(spec_path: Path, ranks: int, node: int, nodes: int, master: str) -> list[str]:
    """The torchrun of one node's ranks, meeting the others at ``master`` (``HOST:PORT``)."""
    address, _, port = master.rpartition(":")
    place = [f"--nnodes={nodes}", f"--node-rank={node}", f"--nproc-per-node={ranks}"]
    place += [f"--master-addr={address}", f"--master-port={port}"]
    return [sys.executable, "-m", "torch.distributed.run", *place, "-m", "wav.training.loop", str(spec_path)]


def free_port(host: str) -> int:
    """A port of this machine on which the nodes can meet.

    Raises:
        ConfigError: ``host`` is not this machine.
    """
    try:
        with socket.socket() as probe:
            probe.bind((host, 0))
            return int(probe.getsockname()[1])
    except OSError as error:
        raise ConfigError(
            f"WAV_HOSTFILE: its first host {host!r} is not an address of this machine ({error.strerror or error}); "
            "put this machine first"
        ) from None


class Group:
    """The nodes' processes as the first node sees them; lines of all of them come out of one queue."""

    def __init__(self, hosts: Sequence[Host]) -> None:
        self.hosts = hosts
        self.processes: list[subprocess.Popen[str]] = []
        self.lines: queue.Queue[str] = queue.Queue()
        self._readers: list[threading.Thread] = []

    def start(self, argv: Sequence[str]) -> None:
        """Start the next node; it dies with this process, and its standard input closes with it."""
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", guard.__file__, str(os.getpid()), *argv],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # a SIGTERM for this process's group reaches them in order, through stop()
        )
        self.processes.append(process)
        reader = threading.Thread(target=self._read, args=(process,), daemon=True)
        reader.start()
        self._readers.append(reader)

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self.lines.put(line.rstrip())

    def follow(self) -> bool:
        """Print what the nodes say until all have ended or one has failed; whether one named an error."""
        named = False
        while True:
            codes = [process.poll() for process in self.processes]
            over = any(codes) or all(code is not None for code in codes)
            if over:
                for reader in self._readers:
                    reader.join(1.0)
            with contextlib.suppress(queue.Empty):
                line = self.lines.get(timeout=0.0 if over else 0.2)
                while True:
                    named = named or ERROR_MARK in line
                    LOG.info("%s", line)
                    line = self.lines.get_nowait()
            if over:
                return named

    def failed(self) -> tuple[Host, int] | None:
        """The host whose processes ended badly first seen, and their status."""
        found = [(host, p.poll()) for host, p in zip(self.hosts, self.processes, strict=False) if p.poll()]
        return (found[0][0], int(found[0][1] or 0)) if found else None

    def stop(self, seconds: float) -> None:
        """Ask this machine's ranks to save and end, close the others' input, then kill what is left."""
        for process in self.processes:
            if process.stdin is not None:
                with contextlib.suppress(OSError):
                    process.stdin.close()
            if process is self.processes[0] and process.poll() is None:
                process.terminate()
        deadline = time.monotonic() + seconds
        for process in self.processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def head(spec_path: Path) -> int:
    """Run every node of a spec and follow them; the exit status."""
    spec, runtime = TrainSpec.from_json(spec_path.read_text()), Runtime()
    hosts = choose_hosts(spec, runtime.hostfile)
    master = f"{hosts[0].name}:{runtime.master_port or free_port(hosts[0].name)}"
    LOG.info("%s: %d nodes, %s, meeting at %s", spec.stage, len(hosts), ", ".join(h.name for h in hosts), master)
    group = Group(hosts)
    _on_termination()
    try:
        for node, host in enumerate(hosts):
            argv = join_command(spec_path, node, len(hosts), master)
            group.start(remote_command(runtime.remote_shell, host.name, argv, os.environ) if node else argv)
        named = group.follow()
        found = group.failed()
    finally:
        group.stop(STOP_S)
    if found is None:
        return 0
    host, status = found
    if not named:
        LOG.error(
            "%snode %s ended with status %d, so the others were ended; look at its lines above, and start the run "
            "again: it resumes from the last checkpoint", ERROR_MARK, host.name, status,
        )  # fmt: skip
    return 1


def join(spec_path: Path, node: int, nodes: int, master: str) -> int:
    """Run this node's ranks until they end, or until the first node is gone.

    Raises:
        ConfigError: the spec is not here, or this node has other code.
    """
    if not spec_path.is_file():
        raise ConfigError(
            f"node {node} ({socket.gethostname()}): {spec_path} is not here; the run's folders must lie on a file "
            "system that all nodes share"
        )
    spec = TrainSpec.from_json(spec_path.read_text())
    if spec.code != code_digest():
        raise ConfigError(f"node {node} ({socket.gethostname()}): its code is not that of the run; update it")
    _on_termination()
    threading.Thread(target=_end_with_input, daemon=True).start()
    argv = torchrun_command(spec_path, spec.train.ranks, node, nodes, master)
    lines = run_group(argv, environment(spec, spec.train.ranks), f"node {node}", heartbeat_s=3600.0)
    with contextlib.closing(lines):
        for line in lines:
            if line.status is not None:
                return 128 - line.status if line.status < 0 else line.status
            LOG.info("%s", line.text)
    return 1


def _end_with_input() -> None:
    """End this process when its standard input closes: the first node, or the connection to it, is gone."""
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def _on_termination() -> None:
    def end(number: int, _frame: FrameType | None) -> None:
        raise Terminated(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, end)


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="wav.training.nodes", description="train on several nodes")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("head", help="start all nodes and follow them").add_argument("spec", type=Path)
    joining = commands.add_parser("join", help="run this node's ranks")
    joining.add_argument("spec", type=Path)
    joining.add_argument("--node", type=int, required=True, help="number of this node, from 0")
    joining.add_argument("--nodes", type=int, required=True)
    joining.add_argument("--master", required=True, help="HOST:PORT on node 0")
    chosen = parser.parse_args(arguments)
    logging.basicConfig(stream=sys.stdout, format="%(message)s", level=logging.WARNING, force=True)
    LOG.setLevel(logging.INFO)
    try:
        if chosen.command == "head":
            return head(chosen.spec)
        return join(chosen.spec, chosen.node, chosen.nodes, chosen.master)
    except WavError as error:
        LOG.error("%s%s", ERROR_MARK, error)
        return 1


if __name__ == "__main__":
    raise SystemExit(main())
