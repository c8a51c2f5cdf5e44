"""The one script of a GPU: parts end alone, within their time, and what they had found stays; a trial runs them all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
from gpu import PARTS, Part, run_part  # noqa: E402

#: Stands for ``benchmarks/gpu.py`` and reports as it does.
STUB = """
import json, subprocess, sys, time
from pathlib import Path
name, path = sys.argv[sys.argv.index("--inside") + 1], Path(sys.argv[sys.argv.index("--json") + 1])
path.write_text(json.dumps({"row": 1}))
if name == "hangs":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    path.write_text(json.dumps({"row": child.pid}))
    time.sleep(600)
raise SystemExit(3 if name == "fails" else 0)
"""


def part(name: str) -> Part:
    return Part(name, 60, "none", "none", "")


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gpu.py").write_text(STUB)
    monkeypatch.setattr("gpu.HERE", tmp_path)


def test_the_parts_fit_fifteen_minutes_and_name_what_exists() -> None:
    assert sum(found.seconds for found in PARTS) <= 15 * 60
    assert len({found.name for found in PARTS}) == len(PARTS)
    for found in PARTS:
        text = (ROOT / "benchmarks" / f"{found.module}.py").read_text()
        assert f"\ndef {found.function}(arguments: argparse.Namespace, report: Report) -> None:" in text, found.name


@pytest.mark.parametrize(("name", "ended"), [("ends", "done"), ("fails", "ended with status 3")])
def test_a_part_s_end_stands_beside_what_it_found(stub: None, name: str, ended: str) -> None:
    found = run_part(part(name), [], dict(os.environ), 60)
    assert (found["ended"], found["row"]) == (ended, 1)


def test_a_part_that_hangs_is_ended_with_all_that_it_started(stub: None) -> None:
    found = run_part(part("hangs"), [], dict(os.environ), 4.0)
    assert found["ended"] == "cut off after 4 s"
    child = Path(f"/proc/{found['row']}")
    deadline = time.monotonic() + 30
    while child.exists() and "Z" not in child.joinpath("stat").read_text().rpartition(")")[2][:3]:
        assert time.monotonic() < deadline, "what a part started outlives it"
        time.sleep(0.05)


def test_without_a_gpu_the_command_says_what_to_do() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "gpu.py")],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "no CUDA device; --trial runs every part" in done.stderr


#: Imports the parts as on a machine that has none of these packages, whatever torch and diffusers look for.
BARE = """
import sys, deepspeed, diffusers.models
absent = {"av", "boto3", "dvc", "h5py", "matplotlib", "prefect", "pyarrow", "pydantic_settings", "ruamel", "yaml"}
for name in [name for name in sys.modules if name.split(".")[0] in absent]:
    del sys.modules[name]
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in absent:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import gpu_planning, gpu_tests, gpu_training
"""


def test_the_parts_need_no_package_but_those_of_a_gpu_machine() -> None:
    done = subprocess.run(
        [sys.executable, "-c", BARE], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'benchmarks'}:{ROOT}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-1000:]


@pytest.mark.long
def test_every_part_of_a_trial_runs_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--trial", "--calls", "2", "--limit", "20"]
    done = subprocess.run([*command, "--json", str(path)], capture_output=True, text=True, check=False)
    found = json.loads(path.read_text())
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert {part.name: found[part.name]["ended"] for part in PARTS} == {part.name: "done" for part in PARTS}
    assert found["trial"]
    assert all("error" not in row for part in ("train", "engine") for row in found[part].values() if type(row) is dict)
    for row in found["engine"].values():
        assert type(row) is not dict or row["samples_per_second"] > 0
