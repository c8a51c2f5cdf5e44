"""Several nodes: the hostfile and the commands; two real network namespaces train as one, and end together."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from wav.errors import ConfigError
from wav.io.storage.commit import read_manifest
from wav.training import nodes
from wav.training.launch import launch
from wav.training.nodes import Host, choose_hosts, free_port, read_hostfile, remote_command
from wav.training.spec import TrainSpec, read_checkpoint_file


def test_hostfile_lines(tmp_path: Path) -> None:
    path = tmp_path / "hostfile"
    path.write_text("# the rack\nnode-a slots=8\n\n10.0.0.2   slots=4 # older\n")
    assert read_hostfile(path) == (Host("node-a", 8), Host("10.0.0.2", 4))
    path.write_text("node-a slots=8\nnode-b\n")
    with pytest.raises(ConfigError, match=r"hostfile:2: 'node-b' is not HOST slots=GPUS"):
        read_hostfile(path)
    with pytest.raises(ConfigError, match=r"WAV_HOSTFILE = '.*absent': No such file"):
        read_hostfile(tmp_path / "absent")


def test_the_hostfile_must_hold_the_run(spec_of: Callable[..., TrainSpec], tmp_path: Path) -> None:
    path = tmp_path / "hostfile"
    path.write_text("a slots=2\nb slots=1\nc slots=8\n")
    assert choose_hosts(spec_of(pretrain_video={"nodes": 2, "ranks": 1}), str(path)) == (Host("a", 2), Host("b", 1))
    with pytest.raises(ConfigError, match=r"pretrain_video.ranks = 2: .* gives b 1 slots"):
        choose_hosts(spec_of(pretrain_video={"nodes": 2, "ranks": 2}), str(path))
    with pytest.raises(ConfigError, match=r"pretrain_video.nodes = 4: .* has 3 hosts"):
        choose_hosts(spec_of(pretrain_video={"nodes": 4}), str(path))
    with pytest.raises(ConfigError, match=r"nodes = 2: WAV_HOSTFILE is not set"):
        choose_hosts(spec_of(pretrain_video={"nodes": 2}), "")
    with pytest.raises(ConfigError, match=r"first host '192.0.2.1' is not an address of this machine"):
        free_port("192.0.2.1")


def test_no_secret_is_sent_to_another_node() -> None:
    variables = {"AWS_SECRET_ACCESS_KEY": "hidden", "PREFECT_API_KEY": "hidden", "NCCL_SOCKET_IFNAME": "eth 1"}
    command = remote_command("ssh -p 23", "node-b", ["python", "-m", "x"], variables)
    assert command[:4] == ["ssh", "-p", "23", "node-b"]
    assert command[4].endswith("exec env 'NCCL_SOCKET_IFNAME=eth 1' python -m x")
    assert "hidden" not in " ".join(command)


def test_a_node_without_the_shared_folder_or_with_other_code_says_so(
    spec_of: Callable[..., TrainSpec], tmp_path: Path
) -> None:
    def said(spec: Path) -> str:
        argv = nodes.join_command(spec, 1, 2, "127.0.0.1:1")
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 1
        return done.stdout

    path = tmp_path / "spec.json"
    assert "must lie on a file system that all nodes share" in said(path)
    raw = json.loads(spec_of(pretrain_video={"nodes": 2}).to_json())
    path.write_text(json.dumps({**raw, "code": "other"}))
    assert "its code is not that of the run" in said(path)


#: stands for ssh: runs the command line in the network namespace of the host with that address
SHELL = """#!/bin/sh
host=$1; shift
exec ip netns exec "{name}-${{host##*.}}" sh -c "$*"
"""


class Rack:
    """Two network namespaces joined by a cable: 10.97.0.1 and 10.97.0.2."""

    def __init__(self, name: str) -> None:
        self.name = name

    def ip(self, *arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)

    def build(self) -> None:
        for number in (1, 2):
            self.ip("netns", "add", f"{self.name}-{number}")
        self.ip("link", "add", "eth-1", "netns", f"{self.name}-1", "type", "veth", "peer", "name", "eth-1",
                "netns", f"{self.name}-2")  # fmt: skip
        for number in (1, 2):
            inside = ("-n", f"{self.name}-{number}")
            self.ip(*inside, "addr", "add", f"10.97.0.{number}/24", "dev", "eth-1")
            for device in ("lo", "eth-1"):
                self.ip(*inside, "link", "set", device, "up")

    def remove(self) -> None:
        for number in (1, 2):
            subprocess.run(["ip", "netns", "del", f"{self.name}-{number}"], check=False, capture_output=True)

    def command(self, number: int, *argv: str) -> list[str]:
        """``argv`` on one of the two."""
        return ["ip", "netns", "exec", f"{self.name}-{number}", *argv]


@pytest.fixture
def rack() -> Iterator[Rack]:
    found = Rack(f"wav{os.getpid()}")
    if shutil.which("ip") is None:
        pytest.skip("no `ip` command (iproute2): network namespaces cannot be made")
    try:
        try:
            found.build()
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces are not permitted here: {error.stderr.strip()}")
        yield found
    finally:
        found.remove()


#: launch() as a process of the first node
LAUNCH = "import sys, pathlib; from wav.training.launch import launch; from wav.training.spec import TrainSpec\n"
LAUNCH += "from wav.errors import WavError\n"
LAUNCH += (
    "try: launch(TrainSpec.from_json(pathlib.Path(sys.argv[1]).read_text()), lambda line: print(line, flush=True))\n"
)
LAUNCH += "except WavError as error: sys.exit(str(error))"


class TwoNodes:
    """A run on both namespaces, started on the first."""

    def __init__(self, rack: Rack, spec: TrainSpec, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        shell, hostfile, path = folder / "shell", folder / "hostfile", folder / "spec.json"
        shell.write_text(SHELL.format(name=rack.name))
        shell.chmod(0o755)
        hostfile.write_text("10.97.0.1 slots=1\n10.97.0.2 slots=1\n")
        path.write_text(spec.to_json())
        variables = {"WAV_HOSTFILE": str(hostfile), "WAV_REMOTE_SHELL": str(shell), "GLOO_SOCKET_IFNAME": "eth-1"}
        self.process = subprocess.Popen(
            rack.command(1, sys.executable, "-c", LAUNCH, str(path)),
            env=os.environ | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def wait_for(self, text: str) -> str:
        """What it said until ``text`` came."""
        assert self.process.stdout is not None
        said = []
        for line in self.process.stdout:
            said.append(line)
            if text in line:
                return "".join(said)
        raise AssertionError(f"it never said {text!r}: {''.join(said)}")

    def family(self) -> list[psutil.Process]:
        """Everything that belongs to the run, as the kernel sees it."""
        return psutil.Process(self.process.pid).children(recursive=True)


def joiner(family: list[psutil.Process], node: int) -> psutil.Process:
    """The process that holds one node's ranks."""
    return next(p for p in family if p.cmdline()[2:4] == ["wav.training.nodes", "join"] and f"--node {node}" in
                " ".join(p.cmdline()))  # fmt: skip


@pytest.mark.long
def test_two_nodes_train_what_two_ranks_of_one_node_train(
    rack: Rack, spec_of: Callable[..., TrainSpec], tmp_path: Path
) -> None:
    """Same losses, same weights, whole checkpoints; a node's death ends the other; the run resumes."""
    one = spec_of(name="one", pretrain_video={"zero_stage": 2, "ranks": 2})
    launch(one, lambda _: None)
    two = spec_of(name="two", pretrain_video={"zero_stage": 2, "ranks": 1, "nodes": 2})
    said, code = (run := TwoNodes(rack, two, tmp_path / "rack")).process.communicate(timeout=300)[0], run.process.wait()
    assert code == 0, said
    assert "2 nodes, 10.97.0.1, 10.97.0.2, meeting at 10.97.0.1:" in said
    assert "2 rank(s)" in said
    metrics = [json.loads((spec.paths.output / "metrics.json").read_text()) for spec in (one, two)]
    for name in ("loss", "validation_loss", "grad_norm", "steps"):
        assert metrics[0][name] == metrics[1][name]
    digests = [read_checkpoint_file(spec.paths.output)["model_digest"] for spec in (one, two)]
    assert digests[0] == digests[1]
    names = [{e.path for e in read_manifest(s.work / "checkpoints" / "step-00000006").files} for s in (one, two)]
    assert names[0] == names[1]
    assert {"rank-00000.pt", "rank-00001.pt"} <= names[1]


@pytest.mark.long
@pytest.mark.parametrize("victim", [0, 1])
def test_the_death_of_a_node_ends_the_other_and_the_run_resumes(
    rack: Rack, spec_of: Callable[..., TrainSpec], tmp_path: Path, victim: int
) -> None:
    endless = {"ranks": 1, "nodes": 2, "steps": 5000, "checkpoint_every": 3, "log_every": 3}
    spec = spec_of(pretrain_video=endless)
    run = TwoNodes(rack, spec, tmp_path / "rack")
    run.wait_for("checkpoint of step 9 ")
    family = run.family()
    began = time.monotonic()
    joiner(family, victim).send_signal(signal.SIGKILL)
    said, _ = run.process.communicate(timeout=60)
    seconds = time.monotonic() - began
    assert run.process.returncode == 1
    assert f"node 10.97.0.{victim + 1} ended with status" in said or "Connection closed by peer" in said, said
    assert seconds < 30
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive, [p.cmdline() for p in alive]

    run = TwoNodes(rack, spec, tmp_path / "rack")
    run.wait_for("resumed from the checkpoint of step")
    family = run.family()
    run.process.send_signal(signal.SIGKILL)  # the first node's launcher: everything goes with it
    run.process.wait()
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not alive, [p.cmdline() for p in alive]
