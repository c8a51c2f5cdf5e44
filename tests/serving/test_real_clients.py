"""Episodes of the tabletop suite and of LIBERO through the field's clients, in environments of their own.

The actions are those of the policy in process. Environments are made in ``WAV_TEST_VENVS`` where that is set, and kept.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import Listener
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.libero import KIT, needs_assets
from tests.helpers.serving import serving
from tests.helpers.stage_folders import DATA, PLANNER, make_stages
from wav.config import DataSettings
from wav.policy.export import policy_from_stages
from wav.policy.policy import Observation, Policy
from wav.sim.registry import make_env, task_specs

pytestmark = [pytest.mark.long, pytest.mark.simulator]

HERE = Path(__file__).resolve().parent
CLIENT = HERE.parents[1] / "clients" / "wav-client"
PAGE = HERE.parents[1] / "docs" / "serving.md"
EXECUTE, STEPS = 4, 22
SUITES = ["tabletop", pytest.param("libero_object", marks=needs_assets)]


@pytest.fixture(scope="module")
def venvs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Makes an environment with the given packages; its Python."""
    kept = os.environ.get("WAV_TEST_VENVS")
    folder = Path(kept) if kept else tmp_path_factory.mktemp("venvs")

    def make(name: str, *packages: str, base: str = sys.executable) -> Path:
        python = folder / name / "bin" / "python"
        if not python.exists():
            subprocess.run([base, "-m", "venv", str(folder / name)], check=True)
            here = shutil.copytree(CLIENT, tmp_path_factory.mktemp("client") / "wav-client")  # pip builds in it
            wanted = [str(here) if package == "wav-client" else package for package in packages]
            subprocess.run([str(python), "-m", "pip", "install", "-q", *wanted], check=True)
        return python

    return make


@dataclass(frozen=True)
class Suite:
    """A suite with the policy that is served, and its equal in process."""

    data: DataSettings
    task: str
    served: Policy
    in_process: Policy


@pytest.fixture(scope="module")
def suites(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Makes a suite by its name, once."""

    @cache
    def make(name: str) -> Suite:
        data = DATA.model_copy(update={"suites": (name,), "tasks": (), "text_tokens": 32})
        stages = make_stages(tmp_path_factory.mktemp(name), data=data)
        served, again = (
            policy_from_stages(stages.joint, stages.latents, data, PLANNER, batch_size=2, device="cpu")[0]
            for _ in range(2)
        )
        return Suite(data, next(iter(task_specs(name))), served, again)

    return make


@pytest.fixture(autouse=True)
def assets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WAV_LIBERO_ASSETS", str(KIT))


class Simulator:
    """A suite for a process that has no simulator; keeps what was seen and done."""

    def __init__(self, suite: Suite) -> None:
        self.suite = suite
        self.env, self.listener = make_env(suite.data.suite, suite.data), Listener(("127.0.0.1", 0), authkey=b"test")
        self.port = self.listener.address[1]
        self.seen: list[Observation] = []
        self.done: list[np.ndarray] = []

    def serve(self) -> None:
        """Answer one process until it ends; the first observation of an episode is that of its reset."""
        with self.listener.accept() as link:
            try:
                while True:
                    request = link.recv()
                    if request[0] == "reset":
                        now = self.env.reset(self.suite.task, 3)
                    elif request[0] == "step":
                        self.done.append(np.frombuffer(request[1], np.float32))
                        now = self.env.step(self.done[-1])
                    else:
                        self.seen.append(now)
                    images = {view: (image.tobytes(), image.shape) for view, image in now.images.items()}
                    link.send((images, now.state.tobytes(), now.instruction))
            except EOFError:
                pass
        self.env.close()


def expected(policy: Any, seen: list[Observation], episode: int = 0) -> np.ndarray:
    """What the policy does in process where it sees every EXECUTE-th of these observations."""
    policy.reset("row", episode, 7)
    chunks = [policy.act([observation], ["row"]).actions[0, :EXECUTE] for observation in seen[::EXECUTE]]
    return np.concatenate(chunks)[: len(seen)]


@pytest.mark.parametrize("name", SUITES)
def test_openpi_client(venvs: Any, suites: Any, name: str) -> None:
    python = venvs("openpi", "openpi-client==0.1.2", "typing_extensions")
    suite = suites(name)
    simulator = Simulator(suite)
    answering = threading.Thread(target=simulator.serve, daemon=True)
    answering.start()
    with serving(suite.served, execute_steps=EXECUTE) as server:
        arguments = [str(argument) for argument in (server.port, simulator.port, EXECUTE, STEPS, name)]
        subprocess.run([str(python), str(HERE / "openpi_robot.py"), *arguments], check=True, timeout=300)
        (example,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), flags=re.M | re.S)
        code = example.replace("8000", str(server.port))
        shown = subprocess.run([str(python), "-c", code], check=True, timeout=60, capture_output=True, text=True).stdout
    assert f"({DATA.action_chunk}, {DATA.action_dim})" in shown
    answering.join(20)
    assert len(simulator.done) == STEPS
    np.testing.assert_array_equal(simulator.done, expected(suite.in_process, simulator.seen))


@pytest.mark.parametrize("name", SUITES)
def test_vla_eval(venvs: Any, suites: Any, name: str, tmp_path: Path) -> None:
    python = venvs("vla-eval", "vla-eval==0.8.0", "wav-client")
    suite = suites(name)
    simulator = Simulator(suite)
    answering = threading.Thread(target=simulator.serve, daemon=True)
    answering.start()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = {
        "server": {"url": f"ws://127.0.0.1:{port}"},
        "output_dir": str(tmp_path / "results"),
        "benchmarks": [
            {
                "benchmark": "vla_benchmark:Simulator",
                "episodes_per_task": 2,
                "max_steps": STEPS,
                "params": {"seed": 0},
            }
        ],
    }
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    environment = {
        **os.environ,
        "PYTHONPATH": f"{HERE}{os.pathsep}{CLIENT}",
        "WAV_TEST_SIMULATOR": str(simulator.port),
        "no_proxy": "127.0.0.1",
    }
    with serving(suite.served, execute_steps=EXECUTE) as server:
        asking = ["-m", "wav_client.vla_eval", "--address", f"127.0.0.1:{port}", f"--args.port={server.port}"]
        model = subprocess.Popen([str(python), *asking], env=environment, cwd=tmp_path)
        try:
            wait_for(f"http://127.0.0.1:{port}/health", model)
            run = [str(python.parent / "vla-eval"), "run", "--config", "config.yaml", "--no-docker"]
            made = subprocess.run(
                run, env=environment, cwd=tmp_path, check=True, timeout=300, capture_output=True, text=True
            )
        finally:
            model.terminate()
            model.wait(20)
    answering.join(20)
    assert "Spec mismatch" not in made.stderr
    assert "cannot be forwarded" not in made.stderr
    assert len(simulator.done) == 2 * STEPS
    # every episode is a connection of its own, whose first episode is number 0; the last observation is not sent
    per_episode = STEPS + 1
    for number in range(2):
        seen = simulator.seen[number * per_episode :][:STEPS]
        done = simulator.done[number * STEPS :][:STEPS]
        np.testing.assert_array_equal(done, expected(suite.in_process, seen))


def wait_for(address: str, process: subprocess.Popen[bytes]) -> None:
    """Until a server answers."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for _ in range(600):
        assert process.poll() is None
        try:
            opener.open(address, timeout=5).read()
        except OSError:
            time.sleep(0.1)
        else:
            return
    pytest.fail(f"{address}: no answer")


@pytest.mark.parametrize("version", ["3.8", "3.12"])
def test_our_client_on_other_pythons(version: str, venvs: Any, suites: Any) -> None:
    found = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
    if not found:
        pytest.skip(f"no Python {version} here")
    python = venvs(f"client-{version}", "wav-client", base=str(found[-1]))
    code = (
        "import sys, numpy as np\n"
        "from wav_client import Client, RefusedError\n"
        "from wav_client.realtime import Runner\n"
        "image = np.zeros((48, 64, 3), np.uint8)\n"
        "seen = {'observation/image': image, 'observation/wrist_image': image, 'prompt': 'lift the red cube'}\n"
        "seen['observation/state'] = np.zeros(8)\n"
        "with Client(port=int(sys.argv[1])) as client:\n"
        "    client.reset('e', 3)\n"
        "    assert client.act(seen)['actions'].shape == (6, 7)\n"
        "    report = Runner(client.act, lambda: seen, lambda action: None, rate=50).run(30)\n"
        "    assert report.steps == 30 and report.plans > 1, report\n"
        "    try:\n"
        "        client.act({**seen, 'prompt': 3})\n"
        "    except RefusedError as error:\n"
        "        assert 'prompt: int' in str(error)\n"
    )
    environment = {"PATH": "/usr/bin", "PYTHONPATH": str(CLIENT)}  # not the copy that a kept environment has
    with serving(suites("tabletop").served) as server:
        subprocess.run([str(python), "-c", code, str(server.port)], check=True, timeout=120, env=environment)
