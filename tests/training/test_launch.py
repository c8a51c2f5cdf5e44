"""A run's processes: errors are named, nothing survives, ranks meet where nobody else can, two of them train."""

from __future__ import annotations

import json
import sys

import pytest

from tests.test_processes import FAMILY, gone
from wav.errors import ConfigError, TrainingError
from wav.training.launch import launch

pytestmark = pytest.mark.integration

LISTENING = """
import json, os, sys, psutil, torch.distributed as dist
from pathlib import Path
from wav.training.engine import init_world
world = init_world("cpu")
assert world.mean([float(world.rank)]) == [0.5]
found = [c.laddr.ip for c in psutil.Process().net_connections("inet") if c.status == psutil.CONN_LISTEN]
print("listens", *found, flush=True)
world.most(1)
dist.destroy_process_group()
Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
(Path(sys.argv[1]) / "metrics.json").write_text("{}")
"""


def test_ranks_of_one_machine_listen_on_loopback_alone(spec_of, monkeypatch: pytest.MonkeyPatch) -> None:
    """They meet through a file that nobody else may read, in a folder that nobody else may enter."""
    spec = spec_of(pretrain_video={"ranks": 2})
    argv = [sys.executable, "-c", LISTENING, str(spec.paths.output)]
    monkeypatch.setattr("wav.training.launch.command", lambda path: argv)
    lines: list[str] = []
    launch(spec, lines.append)
    said = [line.split()[1:] for line in lines if line.startswith("listens")]
    assert len(said) == 2
    assert {address for addresses in said for address in addresses} <= {"127.0.0.1"}
    assert (spec.work / "rendezvous").stat().st_mode & 0o777 == 0o700


def test_launch_trains_with_two_ranks(spec_of) -> None:
    """ZeRO-2 over gloo; the metrics come back and the weights are whole."""
    spec = spec_of(pretrain_video={"steps": 3, "ranks": 2, "zero_stage": 2})
    lines: list[str] = []
    metrics = launch(spec, lines.append)
    assert metrics["steps"] == 3
    assert any("2 rank(s)" in line for line in lines)
    assert (spec.paths.output / "model" / "config.json").is_file()
    assert json.loads((spec.paths.output / "metrics.json").read_text()) == metrics


def fake(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    monkeypatch.setattr("wav.training.launch.command", lambda path: [sys.executable, "-u", "-c", code])


def test_launch_names_the_error(spec_of, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, "print('step 1'); print('ERROR: disk full; free space'); raise SystemExit(1)")
    with pytest.raises(TrainingError, match=r"^pretrain_video: disk full; free space$"):
        launch(spec_of(), lambda _: None)
    fake(monkeypatch, "import os; print('last words'); os.kill(os.getpid(), 9)")
    with pytest.raises(TrainingError, match=r"killed by SIGKILL.*resume.*last words"):
        launch(spec_of(), lambda _: None)


def test_launch_ends_the_run_when_the_caller_fails(spec_of, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, FAMILY)
    pids: list[int] = []

    def fail(line: str) -> None:
        pids.extend(int(pid) for pid in line.split())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        launch(spec_of(), fail)
    assert len(pids) == 2
    assert all(gone(pid) for pid in pids)


def test_several_nodes_need_a_launcher(spec_of, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WAV_LAUNCHER", raising=False)
    with pytest.raises(ConfigError, match=r"pretrain_video.nodes = 2: WAV_LAUNCHER is not set; name .*srun"):
        launch(spec_of(pretrain_video={"nodes": 2}), lambda _: None)
    monkeypatch.setenv("WAV_LAUNCHER", f"{sys.executable} -c 'import sys; print(*sys.argv[1:]); sys.exit(3)'")
    with pytest.raises(TrainingError, match=r"ended with status 3; .*said: wav.training.loop .*/spec.json$"):
        launch(spec_of(pretrain_video={"nodes": 2}), lambda _: None)
