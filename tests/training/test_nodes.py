"""Several nodes: what tells a rank who it is; two network namespaces train as one, and end together."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.test_cancel import until
from tests.training.conftest import specs
from tests.training.test_resume import losses
from wav.errors import ConfigError, TrainingError
from wav.io.storage.commit import read_manifest
from wav.training import RENDEZVOUS
from wav.training.engine import adopt_launcher
from wav.training.launch import launch
from wav.training.spec import TrainSpec, read_checkpoint_file

pytestmark = pytest.mark.integration

PROJECT = Path(__file__).resolve().parents[2]
FAKE_KUBECTL = PROJECT / "tests" / "helpers" / "fake_kubectl.py"
PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", RENDEZVOUS)


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets the variables of a launcher, and no others."""

    def set_to(**variables: str) -> None:
        for name in (*PLACE, "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"):
            monkeypatch.setenv(name, "")
            monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_to


def test_a_rank_knows_its_place_from_any_launcher(place: Callable[..., None]) -> None:
    def found() -> list[str | None]:
        adopt_launcher()
        return [os.environ.get(name) for name in PLACE[:5]]

    place(SLURM_PROCID="9", SLURM_NTASKS="16", SLURM_LOCALID="1", MASTER_ADDR="node-a")
    assert found() == ["9", "16", "1", "node-a", "29500"]
    place(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="a", MASTER_PORT="7", SLURM_PROCID="5")
    assert found() == ["0", "2", "0", "a", "7"]
    place(RANK="1", WORLD_SIZE="2", LOCAL_RANK="1", **{RENDEZVOUS: "/a"})
    assert found() == ["1", "2", "1", None, None]
    place()
    with pytest.raises(ConfigError, match=r"RANK = '': must be a number; start a rank through"):
        found()
    place(SLURM_PROCID="9", SLURM_NTASKS="16", SLURM_LOCALID="1")
    with pytest.raises(ConfigError, match="MASTER_ADDR is not set"):
        found()


def test_a_node_without_the_shared_folder_or_with_other_code_says_so(
    spec_of: Callable[..., TrainSpec], tmp_path: Path
) -> None:
    """Ranks one after another in one process: it imports DeepSpeed once."""
    path = tmp_path / "spec.json"
    raw = json.loads(spec_of(pretrain_video={"nodes": 2}).to_json())
    path.write_text(json.dumps({**raw, "code": "other"}))
    (tmp_path / "damaged.json").write_bytes(b"\xff")
    ranks = [(str(tmp_path / "elsewhere.json"), "2"), (str(path), "2"), (str(path), "3")]
    ranks += [(str(tmp_path / "damaged.json"), "2")]
    code = "import json, os, sys\nfrom wav.training import loop\nfor spec, ranks in json.loads(sys.argv[1]):\n"
    code += "    os.environ['WORLD_SIZE'], sys.argv = ranks, ['loop', spec]\n    assert loop.main() == 1"
    rank = {"RANK": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    argv = [sys.executable, "-c", code, json.dumps(ranks)]
    done = subprocess.run(argv, env=os.environ | rank, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    share, other, count, damaged = done.stdout.splitlines()
    assert "must lie on a file system that all of them share" in share
    assert "its code is not that of the run" in other
    assert "WORLD_SIZE = 3: pretrain_video has 2 nodes of 1 ranks; start 2" in count
    assert "training spec: text: Invalid JSON" in damaged


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


#: launcher -> its command line on node {node}
LAUNCHERS = {
    "torchrun": "torch.distributed.run --nnodes=2 --node-rank={node} --nproc-per-node=1 --master-addr=10.97.0.1 "
    "--master-port=29511 -m wav.training.loop {spec}",
    "deepspeed": "deepspeed.launcher.runner --hostfile {folder}/hostfile --no_ssh --node_rank {node} "
    "--master_addr 10.97.0.1 --master_port 29511 --module wav.training.loop {spec}",
}


class TwoNodes:
    """A run on both namespaces, started on each by a launcher."""

    def __init__(self, rack: Rack, spec: TrainSpec, folder: Path, launcher: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path, self.logs = folder / "spec.json", [folder / "log-0", folder / "log-1"]
        path.write_text(spec.to_json())
        (folder / "hostfile").write_text("10.97.0.1 slots=1\n10.97.0.2 slots=1\n")
        variables = {"GLOO_SOCKET_IFNAME": "eth-1", "DS_ACCELERATOR": "cpu"}
        self.nodes: list[subprocess.Popen[Any]] = []
        for node, log in enumerate(self.logs):
            line = LAUNCHERS[launcher].format(node=node, folder=folder, spec=path)
            command = rack.command(node + 1, sys.executable, "-u", "-m", *line.split())
            with log.open("w") as output:
                environment = os.environ | variables
                self.nodes.append(subprocess.Popen(command, env=environment, stdout=output, stderr=output))

    def said(self) -> str:
        """By both nodes."""
        return "".join(log.read_text() for log in self.logs)

    def wait_for(self, text: str, seconds: float = 120.0) -> None:
        """Until a node says ``text``."""
        until(lambda: text in self.said(), seconds)

    def family(self) -> list[psutil.Process]:
        """Everything that belongs to the run, as the kernel sees it."""
        return [process for node in self.nodes for process in psutil.Process(node.pid).children(recursive=True)]

    def rank(self, node: int) -> psutil.Process:
        """The rank of a node."""
        below = psutil.Process(self.nodes[node].pid).children(recursive=True)
        return next(p for p in below if "wav.training.loop" in p.cmdline() and "torch.distributed.run" not in
                    p.cmdline() and not any("deepspeed" in word for word in p.cmdline()))  # fmt: skip


SPREAD = {"zero_stage": 2, "micro_batch_size": 2, "steps": 40, "checkpoint_every": 10}


@pytest.fixture(scope="module")
def alone(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainSpec:
    """A finished run of two ranks of one machine."""
    spec = specs(workspace, tmp_path_factory.mktemp("alone"))(pretrain_video={**SPREAD, "ranks": 2})
    launch(spec, lambda _: None)
    return spec


def assert_same(found: TrainSpec, wanted: TrainSpec) -> None:
    """Same losses, same weights, whole checkpoints."""
    metrics = [json.loads((spec.paths.output / "metrics.json").read_text()) for spec in (found, wanted)]
    for name in ("loss", "validation_loss", "grad_norm", "steps"):
        assert metrics[0][name] == metrics[1][name]
    digests = [read_checkpoint_file(spec.paths.output)["model_digest"] for spec in (found, wanted)]
    assert digests[0] == digests[1]
    last = [read_manifest(spec.work / "checkpoints" / "step-00000040") for spec in (found, wanted)]
    names = [{entry.path for entry in manifest.files} for manifest in last]
    assert names[0] == names[1]
    assert {"rank-00000.pt", "rank-00001.pt"} <= names[1]


@pytest.mark.long
@pytest.mark.parametrize("launcher", list(LAUNCHERS))
def test_two_nodes_train_what_two_ranks_of_one_node_train(
    rack: Rack, spec_of: Callable[..., TrainSpec], alone: TrainSpec, tmp_path: Path, launcher: str
) -> None:
    two = spec_of(pretrain_video={**SPREAD, "ranks": 1, "nodes": 2})
    run = TwoNodes(rack, two, tmp_path / "rack", launcher)
    assert [node.wait(300) for node in run.nodes] == [0, 0], run.said()
    assert "2 rank(s)" in run.said()
    assert_same(two, alone)


#: WAV_LAUNCHER of launchers that reach the other nodes by themselves
REACHING = {
    "srun": "srun --nodes=2 --ntasks-per-node=1 {python} -m",
    "deepspeed": "{python} -m deepspeed.launcher.runner --hostfile {folder}/hostfile --master_addr 10.97.0.1 "
    "--master_port 29500 --module",
    "kubernetes": "{python} -m infra.kubernetes --nodes 2 --gpus 0",
    "sky": "sky exec wav --num-nodes 2 sh infra/sky/node.sh",
}
#: command -> (words of its own, what it sets on node $node, how it runs the rest), as the real one does
COMMANDS = {
    "srun": (2, "SLURM_PROCID=$node SLURM_NTASKS=2 SLURM_LOCALID=0", '"$@"'),
    "sky": (4, 'SKYPILOT_NUM_NODES=2 SKYPILOT_NODE_RANK=$node SKYPILOT_NODE_IPS="$ADDRESSES"', '"$@"'),
    # nothing of the environment but what is written into the command; %n is the node
    "pdsh": (5, "-i PATH=/usr/bin:/bin HOME=$HOME", 'sh -c "$(echo "$*" | sed s/%n/$node/)"'),
}
ON_BOTH = """#!/bin/sh
shift {own}
ADDRESSES=$(printf '10.97.0.1\\n10.97.0.2')
for node in 0 1; do
    ip netns exec {rack}-$((node + 1)) env {variables} {rest} &
    pids="$pids $!"
done
status=0
for pid in $pids; do wait $pid || status=1; done
exit $status
"""


def make_commands(folder: Path, rack: Rack) -> None:
    """Commands that start a process on both nodes and wait for them."""
    folder.mkdir()
    for name, (own, variables, rest) in COMMANDS.items():
        (folder / name).write_text(ON_BOTH.format(own=own, rack=rack.name, variables=variables, rest=rest))
    kubectl = f'#!/bin/sh\nexec {sys.executable} {FAKE_KUBECTL} {folder.parent} {rack.name} "$@"\n'
    (folder / "kubectl").write_text(kubectl)
    (folder / "ssh").write_text("#!/bin/sh\n")
    for path in folder.iterdir():
        path.chmod(0o755)


@pytest.mark.long
@pytest.mark.parametrize("launcher", list(REACHING))
def test_a_launcher_that_reaches_the_nodes_trains_the_same(
    rack: Rack,
    spec_of: Callable[..., TrainSpec],
    alone: TrainSpec,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    launcher: str,
) -> None:
    make_commands(tmp_path / "bin", rack)
    (tmp_path / "hostfile").write_text("10.97.0.1 slots=1\n10.97.0.2 slots=1\n")
    (tmp_path / "variables").write_text("GLOO_SOCKET_IFNAME=eth-1\n")
    variables = {
        "PATH": f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "WAV_LAUNCHER": REACHING[launcher].format(python=sys.executable, folder=tmp_path),
        "GLOO_SOCKET_IFNAME": "eth-1",
        "DS_ENV_FILE": str(tmp_path / "variables"),
        **({"MASTER_ADDR": "10.97.0.1"} if launcher == "srun" else {}),
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(PROJECT)
    two = spec_of(pretrain_video={**SPREAD, "ranks": 1, "nodes": 2})
    lines: list[str] = []
    try:
        launch(two, lines.append)
    except TrainingError:
        pytest.fail("\n".join(lines))
    assert_same(two, alone)


@pytest.mark.long
def test_after_a_node_s_death_one_node_goes_on_with_the_same_losses(
    rack: Rack, spec_of: Callable[..., TrainSpec], alone: TrainSpec, tmp_path: Path
) -> None:
    two = spec_of(pretrain_video={**SPREAD, "ranks": 1, "nodes": 2})
    run = TwoNodes(rack, two, tmp_path / "rack", "torchrun")
    until(lambda: list(two.work.glob("checkpoints/step-*/manifest.json")), 300.0)
    family = run.family()
    for process in [psutil.Process(run.nodes[1].pid), *psutil.Process(run.nodes[1].pid).children(recursive=True)]:
        process.kill()
    assert 0 not in [node.wait(120) for node in run.nodes], run.said()
    assert not psutil.wait_procs(family, timeout=10)[1]
    one = replace(two, train=two.train.model_copy(update={"nodes": 1}))
    lines: list[str] = []
    launch(one, lines.append)
    assert any("resumed from the checkpoint of step" in line for line in lines), lines
    assert losses(one) == pytest.approx(losses(alone), rel=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("victim", [0, 1])
def test_the_death_of_a_rank_ends_both_nodes_and_the_run_resumes(
    rack: Rack, spec_of: Callable[..., TrainSpec], tmp_path: Path, victim: int
) -> None:
    endless = {"ranks": 1, "nodes": 2, "steps": 5000, "checkpoint_every": 3, "log_every": 3}
    spec = spec_of(pretrain_video=endless)
    run = TwoNodes(rack, spec, tmp_path / "rack", "torchrun")
    run.wait_for("checkpoint of step 9 ")
    family = run.family()
    run.rank(victim).send_signal(signal.SIGKILL)
    assert 0 not in [node.wait(60) for node in run.nodes]
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive, [p.cmdline() for p in alive]

    run = TwoNodes(rack, spec, tmp_path / "again", "torchrun")
    run.wait_for("resumed from the checkpoint of step")
    family = run.family()
    for node in run.nodes:
        node.send_signal(signal.SIGKILL)  # each launcher takes its ranks with it
        node.wait()
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not alive, [p.cmdline() for p in alive]
